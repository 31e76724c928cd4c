"""What a checkpoint ought to hold, also where some of its files are missing or damaged."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from moe_groups.checkpoints.files import CheckpointFiles
from moe_groups.checkpoints.inspect.report import Problem
from moe_groups.checkpoints.inspect.weights import EngineState
from moe_groups.checkpoints.layout import (
    FlatGroup,
    FlatParam,
    Layout,
    Rank,
    merge_ranks,
    readable_options,
)
from moe_groups.checkpoints.manifest import Manifest, read_manifest
from moe_groups.checkpoints.read_layout import check_states, layout_of_shards
from moe_groups.checkpoints.shard import WRAPPERS, Shard, read_shard
from moe_groups.checkpoints.torch_file import DAMAGE, read_torch_file
from moe_groups.errors import CheckpointError
from moe_groups.tags import LABELS

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Expected:
    """What the files ought to be.

    Attributes:
        ranks: whose optimizer states belong to the checkpoint.
        layout: of the groups; of those ranks alone that could be read, where not complete.
        complete: does the layout hold every parameter of every rank?
        manifest: None where there is none that can be used.
        data_parallel_size: ranks of the run.
        problems: what was found on the way.
    """

    ranks: frozenset[Rank]
    layout: Layout
    complete: bool
    data_parallel_size: int
    manifest: Manifest | None = None
    problems: tuple[Problem, ...] = ()

    def said(self, key: str, kind: type[T]) -> T | None:
        """What the manifest says beside the layout; None where it says nothing usable."""
        value = None if self.manifest is None else self.manifest.about.get(key)
        return value if isinstance(value, kind) else None


def expected_layout(files: CheckpointFiles, engines: Mapping[int, EngineState]) -> Expected:
    """From the manifest, or from those of DeepSpeed's files that can be read.

    Args:
        files: the checkpoint.
        engines: counters by model-parallel rank.

    Raises:
        CheckpointError: no checkpoint of ZeRO-1, ZeRO-2 or BF16_Optimizer.
    """
    manifest, problems = None, []
    if files.manifest.is_file():
        try:
            manifest = read_manifest(files.manifest)
        except CheckpointError as error:
            text = without_folder(files, str(error))
            problems.append(Problem("manifest", files.manifest.name, text))
    if manifest is None or files.shards:
        check_states(files)
    if manifest is not None:
        return _from_manifest(files, manifest)
    return _from_shards(files, engines, problems)


def _from_manifest(files: CheckpointFiles, manifest: Manifest) -> Expected:
    if manifest.wrapper not in WRAPPERS:
        raise CheckpointError(
            f"{files.folder} was saved by {manifest.wrapper}; checkpoints of ZeRO-1, ZeRO-2 and "
            "BF16_Optimizer can be inspected."
        )
    layout = manifest.layout
    if problem := layout.problem():
        raise CheckpointError(problem)
    ranks = frozenset(layout.order)
    return Expected(ranks, layout, True, layout.data_parallel_size, manifest)


def _from_shards(
    files: CheckpointFiles, engines: Mapping[int, EngineState], problems: list[Problem]
) -> Expected:
    shards = _readable(files)
    size = _data_parallel_size(shards, engines) or len({rank.data for rank in files.shards})
    models = {rank.model for rank in files.shards} | set(files.models)
    for engine in engines.values():
        models |= set(range(engine.model_parallel_size or 1))
    ranks = frozenset(Rank(model, data) for model in models for data in range(size))
    used = {rank: shard for rank, shard in shards.items() if rank in ranks and _says(shard) == size}
    layout, complete = Layout((), {}), used.keys() == ranks
    try:
        if complete:
            layout = layout_of_shards(used)
    except (CheckpointError, *DAMAGE) as error:  # files that contradict each other
        complete = False
        problems.append(Problem("content", "", _no_fit(files, error)))
    if not complete:
        with contextlib.suppress(CheckpointError, *DAMAGE):
            layout = _partial_layout(used)
    return Expected(ranks, layout, complete, size, None, tuple(problems))


def _no_fit(files: CheckpointFiles, error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return without_folder(files, str(error))
    return f"the optimizer states do not fit together ({type(error).__name__}: {error})."


def _readable(files: CheckpointFiles) -> dict[Rank, Shard]:
    shards: dict[Rank, Shard] = {}
    for rank, path in sorted(files.shards.items()):
        try:
            shards[rank] = read_shard(path)
        except CheckpointError:
            if not shards:
                _check_supported(path)
    return shards


def _check_supported(path: Path) -> None:
    """Raise where a shard is sound, but of another wrapper."""
    try:
        read_torch_file(path)
    except CheckpointError:
        return
    read_shard(path)


def _says(shard: Shard) -> int | None:
    try:
        return shard.data_parallel_size
    except DAMAGE:
        return None


def _data_parallel_size(
    shards: Mapping[Rank, Shard], engines: Mapping[int, EngineState]
) -> int | None:
    """As the first rank's file says, which the last save wrote for sure."""
    first = sorted(shards, key=lambda rank: (rank.data, rank.model))
    said = [_says(shards[rank]) for rank in first]
    said += [engine.data_parallel_size for engine in engines.values()]
    return next((size for size in said if size), None)


def _partial_layout(shards: Mapping[Rank, Shard]) -> Layout:
    """The groups with what of their parameters is in these ranks' partitions.

    The expert-parallel rank of a group is left open, and with it the numbers of its experts.

    Args:
        shards: of some ranks of a run.
    """
    built: dict[tuple[int, tuple[int, ...], int], FlatGroup] = {}
    columns = []
    for rank, shard in shards.items():
        keys = [
            (rank.model, shard.sharing(index, rank.data), index)
            for index in range(len(shard.options))
        ]
        for key in keys:
            built.setdefault(key, _partial_group(shards, *key))
        columns.append((rank, [built[key] for key in keys]))
    return merge_ranks(columns)


def _partial_group(
    shards: Mapping[Rank, Shard], model: int, ranks: tuple[int, ...], index: int
) -> FlatGroup:
    found: dict[str, FlatParam] = {}
    present = [(place, Rank(model, data)) for place, data in enumerate(ranks)]
    present = [(p, rank) for p, rank in present if rank in shards]
    present = [(p, rank) for p, rank in present if index < len(shards[rank].options)]
    for place, rank in present:
        shard = shards[rank]
        for name, start, numel in shard.fragments(index):
            offset = place * shard.partition(index) + start
            param = found.get(name, FlatParam(name, 0, offset))
            found[name] = param._replace(numel=param.numel + numel)
    first = shards[present[0][1]]
    options = first.options[index]
    return FlatGroup(
        name=str(options.get("name", "")),
        ranks=ranks,
        params=tuple(sorted(found.values(), key=lambda param: param.offset)),
        model_rank=model,
        parallel_group=first.parallel_group(index),
        labels={key: options[key] for key in LABELS if options.get(key) is not None},
        options=readable_options(options),
    )


def without_folder(files: CheckpointFiles, message: str) -> str:
    """An error's message with file names alone."""
    return message.replace(f"{files.folder}/", "").replace(str(files.folder), files.tag)
