"""The experts of a checkpoint on the ranks of another expert-parallel size, without a model."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from moe_groups.checkpoints.layout import (
    FlatGroup,
    FlatParam,
    Layout,
    Rank,
    merge_ranks,
    of_any_expert,
    params_by_name,
)
from moe_groups.checkpoints.layout_diff import unnumbered_problem
from moe_groups.errors import CheckpointError
from moe_groups.groups.origin import Origin, OriginRow
from moe_groups.topology import Topology, sharing_ranks

_WAY_OUT = 'Convert while loading: protect_checkpoints(engine, regroup="auto").'


class _Member(NamedTuple):
    """A parameter of an expert: the expert's number over all ranks, and where it is."""

    number: int
    row: OriginRow
    group: FlatGroup
    param: FlatParam


_Part: TypeAlias = tuple[str, int]
"""Experts of one layer in one of the caller's groups: their name up to the number; the group."""
_Parts: TypeAlias = Mapping[_Part, Sequence[_Member]]


def with_ep_size(source: Layout, ep_size: int, data_before_experts: bool) -> Layout:
    """The layout of a run with another ``ep_size``; each expert parameter is a group by itself.

    Args:
        source: of the checkpoint; it says what the groups of each rank were made from.
        ep_size: of all MoE layers.
        data_before_experts: ``use_data_before_expert_parallelism`` of DeepSpeed's config.

    Raises:
        InvalidArgumentError: the data-parallel ranks are no multiple of ``ep_size``.
        CheckpointError: the experts of a layer are no multiple of it, or the manifest does not say
            which experts there are, or in which order.
    """
    if problem := unnumbered_problem(source):
        raise CheckpointError(f"ep_size={ep_size}: {problem}.")
    world = source.data_parallel_size
    sharing_ranks(f"ep_size_{ep_size}", world)
    topology = Topology(
        world_size=world, ep_size=ep_size, use_data_before_expert_parallel=data_before_experts
    )
    place = {rank: at for ranks in topology.groups("expert") for at, rank in enumerate(ranks)}
    columns, origins = [], {}
    for model in source.model_ranks:
        ranks = [rank for rank in sorted(source.order) if rank.model == model]
        parts, first = _parts(source, ranks), source.origins[ranks[0]]
        counts = _counts(parts, ep_size, any(source.origins[rank].frozen_experts for rank in ranks))
        made = {
            place[shared[0]]: _column(first, parts, counts, f"ep_size_{ep_size}", shared, place)
            for shared in map(tuple, topology.groups("expert_data"))
        }
        for rank in ranks:
            dense = [group for group in source.of(rank) if group.parallel_group is None]
            experts, origins[rank] = made[place[rank.data]]
            columns.append((rank, dense + experts))
    return merge_ranks(columns, origins)


def _runs(origin: Origin) -> Iterator[tuple[_Part | None, list[OriginRow]]]:
    """Rows that stand together: experts of one layer, or what is no expert's (None)."""

    def part(row: OriginRow) -> _Part | None:
        if row.parallel_group is None:
            return None
        return of_any_expert(row.name).partition("*")[0], row.variant.source

    for found, rows in itertools.groupby(origin.rows, part):
        yield found, list(rows)


def _parts(source: Layout, ranks: Sequence[Rank]) -> _Parts:
    """The expert parameters of all ranks with one model-parallel rank, by their numbers."""
    found: dict[_Part, dict[str, _Member]] = {}
    for rank in {source.order[rank]: rank for rank in reversed(ranks)}.values():
        place = params_by_name(source.of(rank))
        seen: set[_Part] = set()
        for part, rows in _runs(source.origins[rank]):
            if part is None:
                continue
            own = [_member(row, *place[row.name]) for row in rows]
            numbers = [member.number for member in own]
            if part in seen or numbers != sorted(numbers):
                raise CheckpointError(
                    f"create_moe_param_groups was given the parameters of {part[0]}* in another "
                    "order than expert by expert, so their order with another ep_size is not "
                    f"known. {_WAY_OUT}"
                )
            seen.add(part)
            known = found.setdefault(part, {})
            for member in own:
                known.setdefault(str(member.param.global_name), member)
    return {part: sorted(own.values(), key=lambda each: each.number) for part, own in found.items()}


def _member(row: OriginRow, group: FlatGroup, param: FlatParam) -> _Member:
    assert param.expert is not None  # unnumbered_problem
    return _Member(param.expert, row, group, param)


def _counts(parts: _Parts, ep_size: int, frozen: bool) -> dict[str, int]:
    """Experts of each layer on a rank of the new run."""
    numbers: dict[str, set[int]] = {}
    for (path, _), members in parts.items():
        numbers.setdefault(path, set()).update(member.number for member in members)
    for path, found in numbers.items():
        if frozen or found != {*range(len(found))}:
            raise CheckpointError(
                f"some experts were frozen, and nothing says how many there are of {path}*. "
                f"{_WAY_OUT}"
            )
        if len(found) % ep_size:
            raise CheckpointError(
                f"the {len(found)} experts of {path}* cannot be distributed over ep_size={ep_size} "
                "ranks: give a divisor of their number."
            )
    return {path: len(found) // ep_size for path, found in numbers.items()}


def _column(
    origin: Origin,
    parts: _Parts,
    counts: Mapping[str, int],
    parallel_group: str,
    shared: tuple[int, ...],
    place: Mapping[int, int],
) -> tuple[list[FlatGroup], Origin]:
    """The expert groups of ranks that share them, and what all groups of these come from."""
    ep_rank = place[shared[0]]
    rows: list[OriginRow] = []
    groups = []
    for part, own in _runs(origin):
        if part is None:
            rows += own
            continue
        path, count = part[0], counts[part[0]]
        for number, row, group, param in parts[part]:
            if number // count != ep_rank:
                continue
            local = number - ep_rank * count
            name = f"{path}{local}{str(param.global_name).removeprefix(f'{path}{number}')}"
            rows.append(row._replace(name=name, parallel_group=parallel_group, number=local))
            groups.append(
                replace(
                    group,
                    ranks=shared,
                    params=(param._replace(name=name, offset=0),),
                    parallel_group=parallel_group,
                    ep_rank=ep_rank,
                )
            )
    return groups, replace(origin, rows=tuple(rows))
