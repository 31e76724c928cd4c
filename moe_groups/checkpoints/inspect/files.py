"""Are the files of a checkpoint there, and of one save?"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moe_groups._common.own_folder import is_plain
from moe_groups.checkpoints.files import (
    LATEST,
    STATES,
    CheckpointFiles,
    check_saved,
    missing_experts,
    shard_name,
)
from moe_groups.checkpoints.inspect.expected import Expected, without_folder
from moe_groups.checkpoints.inspect.report import Problem
from moe_groups.checkpoints.inspect.weights import EngineState
from moe_groups.checkpoints.layout import Rank
from moe_groups.checkpoints.manifest import FILE_NAME, UNFINISHED, SavedFile
from moe_groups.checkpoints.torch_file import digest_of
from moe_groups.errors import CheckpointError

_SHARD_NAME = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def check_latest(files: CheckpointFiles) -> tuple[list[Problem], list[str]]:
    """Problems and notes about the file that says which tag is loaded."""
    path = files.directory / LATEST
    if not path.is_file():
        return [], [f"there is no file {LATEST!r}: load_checkpoint needs the tag {files.tag!r}"]
    named = path.read_bytes().decode(errors="replace").strip()
    if not is_plain(named) or not os.path.isdir(files.directory / named):
        text = f"{LATEST} names the checkpoint {named!r}, which is not in its directory."
        return [Problem("latest", LATEST, text)], []
    if named != files.tag:
        return [], [f"{LATEST} names {named!r}: that is loaded where no tag is given"]
    return [], []


def check_finished(files: CheckpointFiles) -> Iterator[Problem]:
    """Was the save stopped before its end?"""
    try:
        check_saved(files)
    except CheckpointError as error:
        yield Problem("unfinished", UNFINISHED, without_folder(files, str(error)))


def check_presence(
    files: CheckpointFiles, expected: Expected, engines: Mapping[int, EngineState]
) -> Iterator[Problem]:
    """Files that are missing, left over, or of another size than at the save."""
    listed = {} if expected.manifest is None else expected.manifest.files
    like = next(iter(files.shards.values()), None) or _listed_shard(listed)
    names = {shard_name(like, rank): rank for rank in expected.ranks}
    said = {name: size for name, size in listed.items() if name.endswith(STATES)}
    for name, rank in sorted(names.items(), key=lambda item: item[1]):
        if rank not in files.shards:
            yield _missing(name, f"the optimizer state of {_named(rank, expected)}")
            said.pop(name, None)
    for rank, path in files.shards.items():
        if rank not in expected.ranks:
            text = (
                f"{path.name} is left over from another save: this checkpoint was saved by "
                f"{expected.data_parallel_size} data-parallel ranks."
            )
            yield Problem("extra", path.name, text)
    ours = {path.name for rank, path in files.shards.items() if rank in expected.ranks}
    strays = {path.name for path in files.shards.values()} - ours
    for name, saved in said.items():
        if name not in strays:
            yield from _check_file(files.folder / name, name, saved)
    if not listed:
        yield from _check_weights(files, expected, engines)


def _listed_shard(listed: Iterable[str]) -> Path:
    """A name like those of the optimizer states, where none of them is left."""
    names = (Path(name) for name in sorted(listed) if name.endswith("optim_states.pt"))
    return next((name for name in names if "zero_pp_rank" in name.name), Path(_SHARD_NAME))


def _named(rank: Rank, expected: Expected) -> str:
    several = len({rank.model for rank in expected.ranks}) > 1
    return f"rank {rank.data}" + (f" of model-parallel rank {rank.model}" if several else "")


def _missing(name: str, what: str = "") -> Problem:
    return Problem("missing", name, f"{name} is missing" + (f": {what}." if what else "."))


def _check_file(path: Path, name: str, saved: SavedFile) -> Iterator[Problem]:
    if not path.is_file():
        yield _missing(name)
    elif path.stat().st_size != saved.size:
        text = f"{name} has {path.stat().st_size:,} bytes; when it was saved it had {saved.size:,}."
        yield Problem("size", name, text)
    elif saved.digest and digest_of(path) not in (None, saved.digest):
        text = f"{name} and {FILE_NAME} are of different saves: its records have other CRC-32."
        yield Problem("content", name, text)


def _check_weights(
    files: CheckpointFiles, expected: Expected, engines: Mapping[int, EngineState]
) -> Iterator[Problem]:
    """Without a list of the files: those that DeepSpeed's naming asks for."""
    names = [path.name for path in files.others()]
    for model in sorted({rank.model for rank in expected.ranks}):
        if model not in files.models:
            yield _missing(f"mp_rank_{model:02d}_model_states.pt", "weights and counters")
        elif model in engines:
            for name in missing_experts(names, model, engines[model].num_experts):
                yield _missing(name, "the weights of an expert")


def check_steps(
    files: CheckpointFiles, expected: Expected, engines: Mapping[int, EngineState]
) -> Iterator[Problem]:
    """The engine's step in the files of weights and in the manifest."""
    said = expected.said("step", int)
    source = "the manifest"
    for model, engine in sorted(engines.items()):
        if engine.global_steps is None:
            continue
        name = files.models[model].name
        if said is None:
            said, source = engine.global_steps, name
        elif engine.global_steps != said:
            text = f"{name} was saved at step {engine.global_steps}, {source} says {said}."
            yield Problem("step", name, text)
