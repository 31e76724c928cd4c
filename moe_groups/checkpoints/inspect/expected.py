"""What a checkpoint ought to hold, and which of its files are missing or of another size."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from moe_groups._common.own_folder import is_plain
from moe_groups.checkpoints.files import (
    LATEST,
    STATES,
    CheckpointFiles,
    check_saved,
    missing_experts,
    shard_name,
)
from moe_groups.checkpoints.inspect.report import Problem, ProblemKind
from moe_groups.checkpoints.layout import Layout, Rank
from moe_groups.checkpoints.manifest import (
    FILE_NAME,
    UNFINISHED,
    Manifest,
    SavedFile,
    read_manifest,
)
from moe_groups.checkpoints.read_layout import check_states, layout_of_shards
from moe_groups.checkpoints.shard import WRAPPERS, Shard, read_shard
from moe_groups.checkpoints.torch_file import digest_of, read_torch_file, reading
from moe_groups.errors import CheckpointError

_MOST = 1 << 16  # a larger number of ranks or experts is none that a run has
_SHARD_NAME = "zero_pp_rank_0_mp_rank_00_optim_states.pt"

T = TypeVar("T")


@dataclass(slots=True)
class Expected:
    """The manifest's view of the checkpoint, or that of the files that can be read without one.

    Attributes:
        files: the checkpoint.
        manifest: None where there is none that can be used.
        layout: of the groups; empty where neither a manifest nor all ranks' files say it.
        ranks: whose optimizer states belong to the checkpoint.
        data_parallel_size: ranks of the run.
        engines: what the model's files say of the run, by model-parallel rank.
        shards: files that were read for the layout.
        unread: files whose size the manifest contradicts, or that another save left: not read.
        problems: what was found on the way.
    """

    files: CheckpointFiles
    manifest: Manifest | None = None
    layout: Layout = field(default_factory=lambda: Layout((), {}))
    ranks: frozenset[Rank] = frozenset()
    data_parallel_size: int = 0
    engines: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    shards: dict[Rank, Shard] = field(default_factory=dict)
    unread: set[Path] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def report(self, kind: ProblemKind, file: str, text: str) -> None:
        """Add a problem; the text has names of files alone."""
        folder = self.files.folder
        text = text.replace(f"{folder}/", "").replace(str(folder), self.files.tag)
        self.problems.append(Problem(kind, file, text))

    def said(self, key: str, kind: type[T]) -> T | None:
        """What the manifest says beside the layout; None where it says nothing usable."""
        value = None if self.manifest is None else self.manifest.about.get(key)
        return value if isinstance(value, kind) else None

    def counted(self, key: str) -> int | None:
        """A number of the engine, of the first model-parallel rank that says it."""
        found = (content.get(key) for content in self.engines.values())
        return next((value for value in found if type(value) is int), None)

    @property
    def steps(self) -> int | None:
        """Steps of the engine."""
        step = self.said("step", int)
        return self.counted("global_steps") if step is None else step

    def named(self, rank: Rank) -> str:
        """A rank, with its model-parallel rank where there are several."""
        several = len({rank.model for rank in self.ranks}) > 1
        return f"rank {rank.data}" + (f" of model-parallel rank {rank.model}" if several else "")


def expect(files: CheckpointFiles) -> Expected:
    """Compare the names and sizes of the files with what says how they ought to be.

    Sizes come first: what the manifest contradicts is not opened.

    Raises:
        CheckpointError: no checkpoint of ZeRO-1, ZeRO-2 or BF16_Optimizer.
    """
    found = Expected(files)
    try:
        check_saved(files)
    except CheckpointError as error:
        found.report("unfinished", UNFINISHED, str(error))
    if files.manifest.is_file():
        try:
            found.manifest = read_manifest(files.manifest)
        except CheckpointError as error:
            found.report("manifest", files.manifest.name, str(error))
    if found.manifest is None or files.shards:
        check_states(files)
    listed = _compare_sizes(found)
    _read_engines(found)
    if found.manifest is None:
        _read_shards(found)
    _find_missing(found, listed)
    _find_extra(found)
    _compare_steps(found)
    return found


def _compare_sizes(found: Expected) -> dict[str, SavedFile]:
    """The manifest's groups and list of files."""
    if found.manifest is None:
        return {}
    layout, wrapper = found.manifest.layout, found.manifest.wrapper
    if wrapper not in WRAPPERS:
        raise CheckpointError(
            f"{found.files.folder} was saved by {wrapper}; checkpoints of ZeRO-1, ZeRO-2 and "
            "BF16_Optimizer can be inspected."
        )
    if problem := layout.problem():
        raise CheckpointError(problem)
    found.layout, found.ranks = layout, frozenset(layout.order)
    found.data_parallel_size = layout.data_parallel_size
    listed = {name: file for name, file in found.manifest.files.items() if name.endswith(STATES)}
    for name, (size, digest) in listed.items():
        path = found.files.folder / name
        if path.is_file() and path.stat().st_size != size:
            text = f"{name} has {path.stat().st_size:,} bytes; when it was saved it had {size:,}."
            found.report("size", name, text)
            found.unread.add(path)
        elif path.is_file() and digest and digest_of(path) not in (None, digest):
            text = f"{name} and {FILE_NAME} are of different saves: its records have other CRC-32."
            found.report("content", name, text)
    return listed


def _read_engines(found: Expected) -> None:
    for model, path in found.files.models.items():
        if path not in found.unread:
            try:
                content = read_torch_file(path, found.files.trust)
            except CheckpointError:  # reported when its content is examined
                continue
            found.engines[model] = content if isinstance(content, Mapping) else {}


def _read_shards(found: Expected) -> None:
    """Without a manifest: the groups, if the files of all ranks are there and fit together."""
    files, sizes = found.files, {}
    for rank, path in sorted(files.shards.items(), key=lambda item: (item[0].data, item[0].model)):
        try:
            found.shards[rank] = read_shard(path, files.trust)
        except CheckpointError:
            if not found.shards and _is_readable(path, files.trust):  # of another wrapper
                raise
            continue
        with contextlib.suppress(CheckpointError), reading(path):
            sizes[rank] = found.shards[rank].data_parallel_size
    said = (n for n in (*sizes.values(), found.counted("dp_world_size")) if _is_number(n) and n)
    size = found.data_parallel_size = next(said, None) or len({rank.data for rank in files.shards})
    models = {rank.model for rank in files.shards} | {*files.models}
    for content in found.engines.values():
        degrees = content.get("checkpoint_parallel_dimensions")
        if isinstance(degrees, Mapping):
            stages, tensor = degrees.get("pp_degree"), degrees.get("tp_degree")
            if _is_number(stages) and _is_number(tensor):
                models |= {*range(stages * tensor)}
    found.ranks = frozenset(Rank(model, data) for model in models for data in range(size))
    if {rank for rank, own in sizes.items() if own == size} >= found.ranks:
        try:
            with reading(files.folder):
                used = {rank: found.shards[rank] for rank in sorted(found.ranks)}
                found.layout = layout_of_shards(used)
        except CheckpointError as error:  # files that contradict each other
            found.report("content", "", str(error))


def _is_number(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MOST


def _is_readable(path: Path, trust: bool) -> bool:
    try:
        read_torch_file(path, trust)
    except CheckpointError:
        return False
    return True


def _find_missing(found: Expected, listed: Mapping[str, SavedFile]) -> None:
    """Those that the manifest lists, or that DeepSpeed's naming asks for."""
    files = found.files
    names = [*files.shards.values(), *(Path(name) for name in sorted(listed))]
    likes = (path for path in names if "zero_pp_rank" in path.name)
    like = next(likes, Path(_SHARD_NAME))
    wanted = dict.fromkeys(listed, "")
    for rank in sorted(found.ranks - files.shards.keys()):
        wanted[shard_name(like, rank)] = f": the optimizer state of {found.named(rank)}"
    others = [path.name for path in files.others()]
    for model in sorted({rank.model for rank in found.ranks}) if not listed else ():
        if model not in files.models:
            wanted[f"mp_rank_{model:02d}_model_states.pt"] = ": weights and counters"
        counts = found.engines.get(model, {}).get("num_experts") or ()
        if isinstance(counts, list | tuple) and all(map(_is_number, counts)):
            lost = missing_experts(others, model, counts)
            wanted |= dict.fromkeys(lost, ": the weights of an expert")
    for name, what in wanted.items():
        if not (files.folder / name).is_file():
            found.report("missing", name, f"{name} is missing{what}.")


def _find_extra(found: Expected) -> None:
    for rank, path in found.files.shards.items():
        if rank not in found.ranks:
            found.unread.add(path)
            text = (
                f"{path.name} is left over from another save: this checkpoint was saved by "
                f"{found.data_parallel_size} data-parallel ranks."
            )
            found.problems = [p for p in found.problems if p.file != path.name]
            found.report("extra", path.name, text)


def _compare_steps(found: Expected) -> None:
    """The engine's step in the files of weights and in the manifest."""
    said, source = found.said("step", int), "the manifest"
    for model, content in sorted(found.engines.items()):
        name, step = found.files.models[model].name, content.get("global_steps")
        if said is None:
            said, source = step if type(step) is int else None, name
        elif type(step) is int and step != said:
            text = f"{name} was saved at step {step}, {source} says {said}."
            found.report("step", name, text)


def check_latest(files: CheckpointFiles) -> Iterator[Problem | str]:
    """Problems and notes about the file that says which tag is loaded."""
    path = files.directory / LATEST
    if not path.is_file():
        yield f"there is no file {LATEST!r}: load_checkpoint needs the tag {files.tag!r}"
        return
    named = path.read_bytes().decode(errors="replace").strip()
    if not is_plain(named) or not os.path.isdir(files.directory / named):
        text = f"{LATEST} names the checkpoint {named!r}, which is not in its directory."
        yield Problem("latest", LATEST, text)
    elif named != files.tag:
        yield f"{LATEST} names {named!r}, which is loaded if no tag is given"
