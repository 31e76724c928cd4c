"""The layout of a checkpoint read from DeepSpeed's own files, where there is no manifest.

Each rank's file names the parameters in each of its partitions, and where they are
(``param_slice_mappings``); put behind each other in the order of the ranks, they are the
group. Which ranks share a group of experts is DeepSpeed's arrangement for its ``ep_size``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_groups.checkpoints.files import CheckpointFiles
from moe_groups.checkpoints.layout import (
    FlatGroup,
    FlatParam,
    Layout,
    Rank,
    lay_out,
    merge_ranks,
    readable_options,
    round_robin,
)
from moe_groups.checkpoints.manifest import read_manifest
from moe_groups.checkpoints.shard import SameStep, Shard, read_shard
from moe_groups.checkpoints.torch_file import read_torch_file, reading
from moe_groups.errors import CheckpointError
from moe_groups.tags import LABELS

Shapes = Mapping[str, tuple[int, ...]]


def layout_of_shards(
    shards: Mapping[Rank, Shard], shapes: Mapping[int, Shapes] | None = None
) -> Layout:
    """Put the files of all ranks together.

    Args:
        shards: of every rank of the checkpoint.
        shapes: shapes of parameters by name for each model-parallel rank, where known.

    Raises:
        CheckpointError: a rank's file is missing, or files do not fit together.
    """
    built: dict[tuple[int, tuple[int, ...], int], FlatGroup] = {}
    columns = []
    for rank in sorted(shards):
        groups = []
        for index in range(len(shards[rank].options)):
            ranks = shards[rank].sharing(index, rank.data)
            key = rank.model, ranks, index
            if key not in built:
                column = [_shard(shards, Rank(rank.model, data)) for data in ranks]
                known = (shapes or {}).get(rank.model, {})
                built[key] = _build(column, rank.model, ranks, index, known)
            groups.append(built[key])
        columns.append((rank, groups))
    return merge_ranks(columns)


def _shard(shards: Mapping[Rank, Shard], rank: Rank) -> Shard:
    if rank not in shards:
        raise CheckpointError(
            f"the optimizer state of data-parallel rank {rank.data} (model-parallel rank "
            f"{rank.model}) is missing: files of the other ranks say that it belongs to the "
            "checkpoint."
        )
    return shards[rank]


def _build(
    column: Sequence[Shard], model: int, ranks: tuple[int, ...], index: int, shapes: Shapes
) -> FlatGroup:
    first = column[0]
    partition = first.partition(index)
    params = _join_fragments(column, index, partition)
    if first.reorders and not _has_gaps(params):
        params = list(lay_out(round_robin(params, len(ranks))))
    options = first.options[index]
    parallel_group = first.parallel_group(index)
    group = FlatGroup(
        name=str(options.get("name", "")),
        ranks=ranks,
        params=tuple(param._replace(shape=shapes.get(param.name)) for param in params),
        model_rank=model,
        parallel_group=parallel_group,
        ep_rank=None if parallel_group is None else _ep_rank(ranks),
        labels={key: options[key] for key in LABELS if key in options},
        options=readable_options(options),
    )
    if group.partition != partition:
        raise CheckpointError(
            f"{first.path.parent}: the parameters of group {index} ({group.name!r}) fill "
            f"partitions of {group.partition} elements, but the files have {partition}."
        )
    return group


def _join_fragments(column: Sequence[Shard], index: int, partition: int) -> list[FlatParam]:
    found: dict[str, FlatParam] = {}
    for place, shard in enumerate(column):
        if index >= len(shard.options):
            raise CheckpointError(
                f"{shard.path} has {len(shard.options)} groups, {column[0].path.name} has "
                f"{len(column[0].options)}."
            )
        if shard.partition(index) != partition:
            raise CheckpointError(
                f"{shard.path}: its partition of group {index} has {shard.partition(index)} "
                f"elements, that in {column[0].path.name} has {partition}."
            )
        for name, start, numel in shard.fragments(index):
            first = place * partition + start
            known = found.get(name, FlatParam(name, 0, first))
            if known.end != first:
                raise CheckpointError(
                    f"{shard.path}: {name} goes on at element {first} of group {index}, but on the "
                    f"rank before it ended at {known.end}: the files are not of one checkpoint."
                )
            found[name] = known._replace(numel=known.numel + numel)
    return sorted(found.values(), key=lambda param: param.offset)


def _has_gaps(params: Sequence[FlatParam]) -> bool:
    """See :func:`moe_groups.checkpoints.shard.stated_fragments`."""
    return params[-1].end > sum(param.numel for param in params) if params else False


def _ep_rank(ranks: tuple[int, ...]) -> int:
    """See :meth:`Shard.sharing` for the two arrangements."""
    neighbours = len(ranks) > 1 and ranks[1] - ranks[0] == 1
    return ranks[0] // len(ranks) if neighbours else ranks[0]


_SWAPPED = "offloaded_tensors"


def read_layout(files: CheckpointFiles) -> Layout:
    """The groups of all ranks.

    Raises:
        CheckpointError: the manifest is damaged, or there is none and DeepSpeed's files are
            incomplete, damaged, of two saves, or of a wrapper that does not say what lies where.
    """
    if files.manifest.is_file():
        return read_manifest(files.manifest).layout
    check_states(files)
    shards = {rank: read_shard(path, files.trust) for rank, path in files.shards.items()}
    steps = SameStep()
    for shard in shards.values():
        steps.check(shard)
    shapes = {model: _shapes(path, files.trust) for model, path in files.models.items()}
    return layout_of_shards(shards, shapes)


def check_states(files: CheckpointFiles) -> None:
    """Refuse a checkpoint whose optimizer states are not in files of ZeRO-1, ZeRO-2 or BF16.

    Raises:
        CheckpointError: says where they are.
    """
    if (files.folder / _SWAPPED).is_dir():
        raise CheckpointError(
            f"{files.folder} holds optimizer states that were offloaded to NVMe ({_SWAPPED}): "
            "files of DeepSpeed's swapper, which do not say what groups they hold."
        )
    if not files.shards:
        raise CheckpointError(
            f"{files.folder} has no optimizer states of ZeRO-1, ZeRO-2 or BF16_Optimizer "
            "(zero_pp_rank_*_optim_states.pt)."
        )


def _shapes(path: Path, trust: bool) -> dict[str, tuple[int, ...]]:
    """Shapes that DeepSpeed saved beside the dense weights, of its first rank's parameters."""
    model = read_torch_file(path, trust)
    with reading(path):
        return {
            name: tuple(shape)
            for group in model.get("param_shapes") or []
            for name, shape in group.items()
        }
