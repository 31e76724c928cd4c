"""Warn of groups that need much more memory in the step than necessary.

A search for a plan takes up to seconds, so there is none. A lower bound for all groups
(:func:`least_peak`) rules out cases in which nothing can be gained. In the others some simple
ways to cut are priced exactly, and the warning names the best of them: there is no warning if only
the search would find better groups, and the named peak can always be reached.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

from moe_groups._common.arguments import SplitBy
from moe_groups._common.text import show_bytes
from moe_groups._common.warn import warn
from moe_groups.errors import CostlyGroupsWarning
from moe_groups.groups.grouping import lines, padded_partition
from moe_groups.groups.keys import PlannedGroup, Table, Tiles
from moe_groups.groups.packing import pack
from moe_groups.memory.estimate import on_ranks
from moe_groups.memory.step_config import StepConfig
from moe_groups.topology import ep_size_of, sharing_ranks, world_size

FACTOR = 1.5
WORTH_A_WORD = 64 << 20
"""Bytes that could be saved; if fewer, there is no warning."""

Counted: TypeAlias = Counter[tuple[tuple[int, ...], str | None]]
"""How many groups have parameters of these sizes and this parallel group."""


def warn_if_costly(
    groups: Sequence[PlannedGroup],
    table: Table,
    split_by: SplitBy,
    step: StepConfig | None,
    data_parallel_size: int | None,
) -> None:
    """Warn if T + R is more than 1.5 times that of simple groups with this ``split_by``.

    Does nothing if the number of ranks is not known, or does not fit the experts, or with
    ``lean_step``, whose peak hardly depends on the groups.
    """
    world = data_parallel_size or world_size()
    config = step or StepConfig()
    if (
        world is None
        or config.offloads
        or config.lean_step
        or not _fits(table, world * config.tensor_ranks)
    ):
        return
    made = Counter((table.sizes_of(rows), key.parallel_group) for _, key, _, rows in groups)
    peak = peak_of(made, world, config)
    uncut = Counter(
        (table.sizes_of(rows), key.parallel_group) for key, _, rows in lines(table.families)
    )
    if not _is_costly(peak, least_peak(uncut, world, config)):
        return
    cuts = simple_cuts(uncut, world, config.tensor_ranks)
    enough, number = min((peak_of(cut, world, config, True), cut.total()) for cut in cuts)
    if _is_costly(peak, enough):
        assumed = "" if step else " (assumed; say how you step with step=StepConfig(...))"
        warn(
            f"the optimizer step over these {len(groups)} groups will peak at {show_bytes(peak)} "
            f"on {world} ranks with {config.label}{assumed}; with split_by={split_by!r} "
            f"{show_bytes(enough)} is enough, in {number} groups: see "
            "step_memory_budget='auto' or plan_param_groups.",
            CostlyGroupsWarning,
        )


def _fits(table: Table, world: int) -> bool:
    return all(world % ep_size_of(key.parallel_group) == 0 for key in table.families)


def _is_costly(peak: int, other: int) -> bool:
    return peak > FACTOR * other and peak - other > WORTH_A_WORD


def peak_of(groups: Counted, world: int, step: StepConfig, ascending: bool = False) -> int:
    """T + R of the worst rank, stepped in this order or from small partitions to large ones."""
    from moe_groups.memory.step_cost import step_cost

    tiles = [on_ranks(*group, world, count, step.tensor_ranks) for group, count in groups.items()]
    if ascending:
        tiles.sort(key=lambda tile: tile.layout.partition)
    return int(step_cost(tiles, step.settings).peak.max())


def simple_cuts(uncut: Counted, world: int, tensor_ranks: int) -> Iterator[Counted]:
    """No cap; a few parameters for each rank, which hold no gradient twice; small partitions."""

    def cut(tiles_of: Callable[[tuple[int, ...], int], Tiles]) -> Counted:
        found: Counted = Counter()
        for (sizes, group), count in uncut.items():
            for start, stop in tiles_of(sizes, sharing_ranks(group, world, tensor_ranks)):
                found[sizes[start:stop], group] += count
        return found

    yield uncut
    for many in (1, 2, 4):
        yield cut(
            lambda sizes, ranks: list(
                pairwise([*range(0, len(sizes), ranks * many), len(sizes)])  # noqa: B023
            )
        )
    largest = max(
        padded_partition(sum(sizes), sharing_ranks(group, world, tensor_ranks))
        for sizes, group in uncut
    )
    for part in (2, 4, 8, 16, 64):
        yield cut(lambda sizes, ranks: pack(sizes, max(1, largest // part * ranks)))  # noqa: B023


def least_peak(
    uncut: Mapping[tuple[tuple[int, ...], str | None], int], world: int, step: StepConfig
) -> int:
    """Lower bound in bytes of T + R on the worst rank, for any cut and order of these groups.

    Rank 0 has the first partition of every group. So with bf16 accumulation it holds, until
    the last group has stepped, the whole of the first parameter of each, and of all parameters
    at least what the ranks share evenly. The largest parameter is in some group, whose
    partition is at least its share.

    Args:
        uncut: the groups without a cap.
    """
    from moe_groups.memory.step_cost import NORM

    settings = step.settings
    even = first = elements = largest_slice = gathered = 0
    partitions: list[int] = []  # of each group's largest parameter
    for (sizes, group), count in uncut.items():
        ranks = sharing_ranks(group, world, step.tensor_ranks)
        total, largest = sum(sizes), max(sizes)
        share = -(-total // ranks)
        even += count * share
        first += count * max(share, sizes[0])
        elements += count * total
        largest_slice = max(largest_slice, -(-largest // ranks))
        partitions += [padded_partition(largest, ranks)] * min(count, 2)
        if ranks > 1 and settings.gather_copies:
            gathered = max(gathered, settings.weight_bytes * largest)
    partitions = [*sorted(partitions)[-2:]]
    last = partitions[-1]
    if settings.wrapper == "bf16_optimizer":
        low = settings.weight_bytes * elements if settings.keeps_low_precision else 0
        return low + max(settings.temporary_bytes * last, gathered)
    upcast = settings.upcast_bytes
    during = upcast + settings.temporary_bytes
    known = [settings.grad_bytes * even + NORM * largest_slice, during * last, gathered]
    if not settings.compact:
        held = settings.grad_bytes * first
        known.append(held + upcast * last)
        if len(partitions) > 1:
            known.append(held + during * partitions[-2])
    return max(known)
