"""Warn of groups that cost much more memory in the step than they need to."""

import warnings
from collections import Counter
from collections.abc import Sequence

from moe_groups.arguments import SplitBy
from moe_groups.errors import CostlyGroupsWarning
from moe_groups.plan import PlannedGroup, Table, lines
from moe_groups.step_config import StepConfig
from moe_groups.step_memory import on_ranks
from moe_groups.units import show_bytes
from moe_groups.world import ep_size_of, world_size

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
    """Warn where T + R is more than 1.5 times what a plan with this ``split_by`` needs.

    Silent where the number of ranks is not known, or does not fit the experts.
    """
    world = data_parallel_size or world_size()
    config = step or StepConfig()
    if world is None or config.offloads or not _fits(table, world * config.tensor_ranks):
        return
    from moe_groups.plan_hints import cost_lines
    from moe_groups.planning import trade_off
    from moe_groups.step_cost import step_cost

    alike = Counter((table.sizes_of(rows), key.parallel_group) for _, key, _, rows in groups)
    tiles = [on_ranks(*tile, world, count, config.tensor_ranks) for tile, count in alike.items()]
    peak = int(step_cost(tiles, config.settings).peak.max())
    if peak < WORTH_A_WORD:
        return
    costed = cost_lines(list(lines(table.families)), table, world, config.tensor_ranks)
    least = trade_off(costed, config.settings)[-1]
    if peak > FACTOR * least.peak and peak - least.peak > WORTH_A_WORD:
        assumed = "" if step else " (assumed; say how you step with step=StepConfig(...))"
        warnings.warn(
            f"the optimizer step over these {len(groups)} groups will peak at {show_bytes(peak)} "
            f"on {world} ranks with {config.label}{assumed}; with split_by={split_by!r} "
            f"{show_bytes(least.peak)} is enough, in {least.groups} groups: see "
            "step_memory_budget='auto' or plan_param_groups.",
            CostlyGroupsWarning,
            stacklevel=5,
        )


def _fits(table: Table, world: int) -> bool:
    return all(world % ep_size_of(key.parallel_group) == 0 for key in table.families)
