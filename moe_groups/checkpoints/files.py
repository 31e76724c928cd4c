"""The files of a DeepSpeed checkpoint, found by their names (``runtime/engine.py``)."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moe_groups._common.own_folder import is_plain
from moe_groups.checkpoints.layout import Rank
from moe_groups.checkpoints.manifest import FILE_NAME, UNFINISHED, SavedFile, read_manifest
from moe_groups.checkpoints.torch_file import check_archive, digest_of, read_torch_file
from moe_groups.errors import CheckpointError

_SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_TARGETS = "moe_groups_*.json"
LATEST = "latest"
STATES = "_states.pt"
"""How names of DeepSpeed's files end."""
_SHOWN = 8
SCHEDULER_FILES = "scheduler*.[pb][ti]*"
"""Where Trainer (``scheduler.pt``) and Accelerate (``scheduler.bin``) keep a scheduler."""


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """What is in the folder of one tag.

    Attributes:
        directory: what ``load_checkpoint`` is given.
        tag: name of the folder in it.
        shards: optimizer states by rank.
        models: dense weights and counters by model-parallel rank.
        trust: may code of the checkpoint's author run? See :func:`read_torch_file`.
    """

    directory: Path
    tag: str
    shards: Mapping[Rank, Path]
    models: Mapping[int, Path]
    trust: bool = False

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.directory / self.tag

    @property
    def manifest(self) -> Path:
        """Our file, whether it is there or not."""
        return self.folder / FILE_NAME

    def others(self) -> list[Path]:
        """Files that hold no optimizer state and no groups: experts' weights, scripts."""
        known = {*self.shards.values(), *self.models.values(), self.manifest}
        found = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path for path in found if path not in known)

    def states(self, optimizer: bool = True) -> list[Path]:
        """Files of weights, and of optimizer states."""
        weights = [*self.models.values(), *self.others()]
        found = [path for path in weights if _is_state(path.name, optimizer=False)]
        return sorted(found + [*self.shards.values()] * optimizer)

    def beside(self) -> list[Path]:
        """Files of a trainer in the directory, of which the tag is the newest checkpoint."""
        latest = self.directory / LATEST
        found = self.directory.iterdir() if latest.is_file() else ()
        return [p for p in found if p.is_file() and p != latest and not p.match(_TARGETS)]


def find_checkpoint(
    directory: str | Path, tag: str | None = None, trust: bool = False
) -> CheckpointFiles:
    """The checkpoint in ``directory``, or the one whose own folder that is.

    Args:
        directory: as for ``load_checkpoint``, or the folder of a tag.
        tag: None for what the file ``latest`` says.
        trust: may code of the checkpoint's author run?

    Raises:
        CheckpointError: no checkpoint is there, or it cannot be read.
    """
    try:
        return replace(_find(Path(directory), tag), trust=trust)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or directory} cannot be read: {error.strerror}."
        ) from error


def _find(directory: Path, tag: str | None) -> CheckpointFiles:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory.")
    if tag is None:
        tag = read_latest(directory)
    if tag is None:
        if any(map(_is_optimizer_state, directory.iterdir())):
            whole = directory.resolve()
            return list_files(whole.parent, whole.name)
        raise CheckpointError(
            f"{directory} is no checkpoint of DeepSpeed: it has neither the file {LATEST!r} nor "
            "optimizer states. A checkpoint that was not saved to its end has no such file; give "
            "the tag if you know it."
        )
    check_tag(tag)
    if not (directory / tag).is_dir():
        raise no_such_tag(directory, tag)
    return list_files(directory, tag)


def no_such_tag(directory: Path, tag: str) -> CheckpointError:
    """The error for a tag that is not there; it names those that are, the newest first."""
    folders = [path for path in directory.glob("*") if any(path.glob(f"*{STATES}"))]
    tags = [path.name for path in sorted(folders, key=lambda path: -path.stat().st_mtime)]
    known = ", ".join(map(repr, tags[:_SHOWN])) + ", ..." * (len(tags) > _SHOWN)
    there = f"its checkpoints are {known}" if tags else "it has no other checkpoint either"
    return CheckpointError(f"{directory} has no checkpoint {tag!r}: {there}.")


def read_latest(directory: Path, file: str = LATEST) -> str | None:
    """The tag that the file ``latest`` names; None where there is no such file.

    Raises:
        CheckpointError: the file is empty or damaged, or what it holds is no tag.
        OSError: it cannot be read.
    """
    path = directory / file
    if not path.is_file():
        return None
    try:
        tag = path.read_text().strip()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if not tag:
        raise CheckpointError(
            f"{path} is empty: a save was stopped while it was written. Give the tag of a "
            "checkpoint that was saved to its end."
        )
    check_tag(tag, f" in {path}")
    return tag


def check_tag(tag: str, where: str = "") -> None:
    """Does the tag name a folder below the directory of a checkpoint, and nothing else?

    Args:
        tag: from an argument, ``latest`` or anywhere else.
        where: it was found, for the message.

    Raises:
        CheckpointError: it does not.
    """
    try:
        tag.encode()  # as it is kept in the file
        plain = is_plain(tag)
    except UnicodeEncodeError:
        plain = False
    if not plain:
        raise CheckpointError(
            f"the tag {tag!r}{where} is not the name of a folder in the checkpoint's directory (or "
            "of one deeper in it, like 'a/b'). For a folder that is elsewhere, give the directory "
            "that it is in, and its name as the tag."
        )


def _is_optimizer_state(path: Path) -> bool:
    return _SHARD.fullmatch(path.name) is not None


def list_files(directory: Path, tag: str) -> CheckpointFiles:
    """The files of this checkpoint, whatever is missing.

    Raises:
        CheckpointError: the tag leads elsewhere.
        OSError: the folder cannot be read.
    """
    check_tag(tag)
    shards: dict[Rank, Path] = {}
    models: dict[int, Path] = {}
    for path in sorted(path for path in (directory / tag).iterdir() if path.is_file()):
        if match := _SHARD.fullmatch(path.name):
            shards[Rank(int(match[2]), int(match[1]))] = path
        elif match := _MODEL.fullmatch(path.name):
            models[int(match[1])] = path
    return CheckpointFiles(directory, tag, shards, models)


def shard_name(like: Path, rank: Rank) -> str:
    """The file name of another rank's optimizer state in the same checkpoint."""
    match = _SHARD.fullmatch(like.name)
    assert match is not None
    prefix = like.name[: match.start(1)]
    middle = like.name[match.end(1) : match.start(2)]
    return f"{prefix}{rank.data}{middle}{rank.model:02d}{like.name[match.end(2) :]}"


def check_saved(files: CheckpointFiles) -> None:
    """Was the save that began last finished? Files of an earlier one may be among the rest.

    Raises:
        CheckpointError: it was not.
    """
    marker = files.folder / UNFINISHED
    if marker.exists() and not files.manifest.is_file():  # which comes last
        raise CheckpointError(
            f"{files.folder} was not saved to its end: its files may be of different steps, or cut "
            f"off. Load another tag. If you know that it is whole, remove {marker.name} from it."
        )


def check_whole(files: CheckpointFiles, share: slice = slice(None), optimizer: bool = True) -> None:
    """Are all files there, whole, and of one save?

    What the manifest says of each file is compared with it. Without a list of the files each has
    to be an archive with all its records, and those that DeepSpeed's naming asks for are there.

    Args:
        files: of the checkpoint.
        share: of the files, where several ranks check them together.
        optimizer: check the optimizer states too.

    Raises:
        CheckpointError: names a file that is not, or the save was not finished.
    """
    check_saved(files)
    saved = read_manifest(files.manifest).files if files.manifest.is_file() else {}
    try:
        for name in sorted(name for name in saved if _is_state(name, optimizer))[share]:
            _check_file(files.folder / name, saved[name])
        states = [] if saved else files.states(optimizer)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or files.folder} cannot be read: {error.strerror}."
        ) from error
    for path in states[share]:
        check_archive(path)
    models = sorted({rank.model for rank in files.shards} | {*files.models})
    for model in [] if saved else models[share]:
        _check_weights(files, model)


def _is_state(name: str, optimizer: bool) -> bool:
    return name.endswith(STATES) and (optimizer or not _SHARD.fullmatch(name))


def _check_file(path: Path, saved: SavedFile) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {FILE_NAME} lists it.")
    size = path.stat().st_size
    if size != saved.size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, but had {saved.size:,} when it was saved: it is cut off, "
            f"or of another save. Without {FILE_NAME}, sizes are not compared."
        )
    if saved.digest is not None and digest_of(path) != saved.digest:
        raise CheckpointError(
            f"{path} and {FILE_NAME} are of different saves: the records of the file have other "
            f"CRC-32 than when {FILE_NAME} was written. Copy all files of the checkpoint again, or "
            "load another tag."
        )


def list_saved(folder: Path) -> dict[str, SavedFile]:
    """The files of a checkpoint that is written to its end, for its manifest.

    Raises:
        OSError: the folder cannot be read.
    """
    return {
        str(path.relative_to(folder)): SavedFile(path.stat().st_size, digest_of(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (FILE_NAME, UNFINISHED)
    }


def _check_weights(files: CheckpointFiles, model: int) -> None:
    """Without a list of the files: are a model-parallel rank's weights there?"""
    if model not in files.models:
        raise CheckpointError(
            f"{files.folder} has no weights of model-parallel rank {model} "
            f"(mp_rank_{model:02d}_model_states.pt)."
        )
    content = read_torch_file(files.models[model], files.trust)
    counts = content.get("num_experts") if isinstance(content, Mapping) else None
    names = [path.name for path in files.others()]
    if isinstance(counts, list) and (lost := [*missing_experts(names, model, counts)]):
        more = f", and so are {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CheckpointError(
            f"{files.folder / lost[0]}, the weights of an expert, is missing{more}. Copy all files "
            "of the checkpoint again, or load another tag."
        )


def missing_experts(
    names: Iterable[str], model_rank: int, num_experts: Iterable[int]
) -> Iterator[str]:
    """Files of experts that DeepSpeed's naming asks for, where it names any file so."""
    found = {match[0]: int(match[3]) for match in map(_EXPERT.fullmatch, names) if match}
    if model_rank not in found.values():
        return
    for layer, count in enumerate(num_experts):
        for expert in range(count):
            name = f"layer_{layer}_expert_{expert}_mp_rank_{model_rank:02d}_model_states.pt"
            if name not in found:
                yield name
