"""Layouts of runs, built by hand from the groups of a model: what DeepSpeed's wrappers do."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from moe_groups.checkpoints.layout import (
    FlatGroup,
    FlatParam,
    Layout,
    Rank,
    lay_out,
    merge_ranks,
    readable_options,
)
from moe_groups.groups.origin import origin_of
from moe_groups.tags import LABELS, parallel_group_of

Names = Mapping[int, tuple[str, int | None]]
"""``id(parameter)`` to its name and the number of its expert on the rank."""


def layout_of(
    groups: Sequence[Mapping[str, Any]],
    names: Names,
    world: int,
    *,
    alignment: int = 1,
    neighbours: bool = False,
    model_rank: int = 0,
) -> Layout:
    """The layout of a run in which every rank has these groups, of experts of its own.

    It says what the groups were made from where ``create_moe_param_groups`` made them.

    Args:
        groups: of the optimizer.
        world: data-parallel ranks.
        neighbours: ranks that share experts are neighbours, not every ep_size-th.
    """
    columns = []
    for rank in range(world):
        own = [
            _flat_group(group, names, rank, world, alignment, neighbours, model_rank)
            for group in groups
        ]
        columns.append((Rank(model_rank, rank), [group for group in own if group.params]))
    named = [(str(group["name"]), group["params"]) for group in groups]
    origin = origin_of(named, lambda param: names[id(param)][0])
    return merge_ranks(columns, {rank: origin for rank, _ in columns} if origin else None)


def _flat_group(
    group: Mapping[str, Any],
    names: Names,
    rank: int,
    world: int,
    alignment: int,
    neighbours: bool,
    model_rank: int,
) -> FlatGroup:
    base = parallel_group_of(group["name"]) if group.get("moe") else None
    ep_size = int(base.split("_")[2]) if base else 1
    share = world // ep_size
    ep_rank = rank // share if neighbours else rank % ep_size
    ranks = [r for r in range(world) if (r // share if neighbours else r % ep_size) == ep_rank]
    stepped = [p for p in group["params"] if p.requires_grad and p.numel()]
    params = [_flat_param(param, *names[id(param)], ep_rank) for param in stepped]
    return FlatGroup(
        name=str(group["name"]),
        ranks=tuple(ranks),
        params=lay_out(params, alignment),
        model_rank=model_rank,
        parallel_group=base,
        ep_rank=ep_rank if base else None,
        labels={key: group[key] for key in LABELS if key in group},
        options=readable_options(group),
    )


def _flat_param(param: torch.Tensor, name: str, number: int | None, ep_rank: int) -> FlatParam:
    local = getattr(param, "num_local_experts", None) or 100  # where it only has to be kept
    expert = None if number is None else local * ep_rank + number
    dtype = str(param.dtype).removeprefix("torch.")
    return FlatParam(name, math.prod(param.shape), 0, tuple(param.shape), dtype, expert)


def columns(layout: Layout) -> dict[Rank, list[FlatGroup]]:
    """Each rank's groups, to compare layouts whatever the order of their tables."""
    return {rank: layout.of(rank) for rank in sorted(layout.order)}


def cast(layout: Layout) -> Layout:
    """The layout after the engine has given all parameters one dtype."""
    groups = [
        replace(group, params=tuple(param._replace(dtype="bfloat16") for param in group.params))
        for group in layout.groups
    ]
    return replace(layout, groups=tuple(groups))
