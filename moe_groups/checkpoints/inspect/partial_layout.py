"""A layout of what is left, where the optimizer states of some ranks are missing or damaged."""

from collections.abc import Mapping

from moe_groups.checkpoints.layout import (
    FlatGroup,
    FlatParam,
    Layout,
    Rank,
    merge_ranks,
    readable_options,
)
from moe_groups.checkpoints.shard import Shard
from moe_groups.tags import LABELS


def partial_layout(shards: Mapping[Rank, Shard]) -> Layout:
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
