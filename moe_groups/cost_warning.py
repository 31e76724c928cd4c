"""Warn of groups that cost much more memory in the step than they need to."""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_groups.arguments import SplitBy
from moe_groups.errors import CostlyGroupsWarning
from moe_groups.plan import PlannedGroup, Table, lines
from moe_groups.step_config import StepConfig
from moe_groups.step_memory import on_ranks
from moe_groups.units import show_bytes
from moe_groups.world import ep_size_of, world_size

if TYPE_CHECKING:
    from moe_groups.cut_search import Line
    from moe_groups.step_cost import StepSettings

FACTOR = 1.5
WORTH_A_WORD = 64 << 20
"""Bytes that could be saved; on smaller models nothing is said."""


def warn_if_costly(
    groups: Sequence[PlannedGroup],
    table: Table,
    split_by: SplitBy,
    step: StepConfig | None,
    data_parallel_size: int | None,
) -> None:
    """Warn where T + R is more than 1.5 times the least that this ``split_by`` allows.

    The least is :func:`least_peak`, which no search is needed for.

    Silent where the number of ranks is not known, or does not fit the experts.
    """
    world = data_parallel_size or world_size()
    config = step or StepConfig()
    if world is None or config.offloads or not _fits(table, world * config.tensor_ranks):
        return
    from moe_groups.plan_hints import cost_lines
    from moe_groups.step_cost import step_cost

    alike = Counter((table.sizes_of(rows), key.parallel_group) for _, key, _, rows in groups)
    tiles = [on_ranks(*tile, world, count, config.tensor_ranks) for tile, count in alike.items()]
    peak = int(step_cost(tiles, config.settings).peak.max())
    if peak < WORTH_A_WORD:
        return
    costed = cost_lines(list(lines(table.families)), table, world, config.tensor_ranks)
    least = int(least_peak(costed, config.settings))
    if peak > FACTOR * least and peak - least > WORTH_A_WORD:
        assumed = "" if step else " (assumed; say how you step with step=StepConfig(...))"
        warnings.warn(
            f"the optimizer step over these {len(groups)} groups will peak at {show_bytes(peak)} "
            f"on {world} ranks with {config.label}{assumed}; no groups with "
            f"split_by={split_by!r} peak below {show_bytes(least)}, and "
            "step_memory_budget='auto' or plan_param_groups finds those that come near.",
            CostlyGroupsWarning,
            stacklevel=5,
        )


def least_peak(lines: Sequence["Line"], settings: "StepSettings") -> float:
    """A lower bound of T + R, bytes, over all ways to cut ``lines``, in closed form.

    The worst rank has at least what the ranks have on average. Of gradients that is a line's
    elements over its ranks; without exact partitions each parameter counts whole in every partition
    that it reaches into, and those are no larger than that of the whole line, padding included. On
    top, on average, comes the norm of the largest parameter's pieces; later the copies of the
    partition that it is in.
    """
    from moe_groups.step_cost import MASTER, NORM

    held, piece = 0.0, 0.0
    for line in lines:
        partition = sum(line.sizes) / line.ranks
        whole = sum(size * max(1, size / (partition + 2)) for size in line.sizes) / line.ranks
        held += line.count * (partition if settings.compact else whole)
        piece = max(piece, max(line.sizes) / line.ranks)
    if settings.wrapper == "bf16_optimizer":
        elements = sum(line.count * sum(line.sizes) for line in lines)
        low = settings.weight_bytes * elements if settings.keeps_low_precision else 0
        return low + settings.temporaries * piece
    upcast = MASTER if settings.grad_bytes != MASTER else 0
    return max(
        settings.grad_bytes * held + NORM * piece,
        (upcast + settings.temporaries) * piece,
    )


def _fits(table: Table, world: int) -> bool:
    return all(world % ep_size_of(key.parallel_group) == 0 for key in table.families)
