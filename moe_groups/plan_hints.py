"""What else would lower the peak of a plan, in bytes."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_groups.arguments import SplitBy
from moe_groups.inputs import GroupInput
from moe_groups.keys import Line, Table
from moe_groups.plan import lines
from moe_groups.rules import NoDecay, Overrides, Rules
from moe_groups.step_config import StepConfig
from moe_groups.step_memory import on_ranks
from moe_groups.table import read_table
from moe_groups.units import show_bytes

if TYPE_CHECKING:
    from moe_groups.cut_search import Line as CostLine
    from moe_groups.planning import Candidate


def hints(
    given: GroupInput,
    rules: tuple[float | None, NoDecay | None, Overrides],
    split_by: SplitBy,
    step: StepConfig,
    world: int,
    chosen: "Candidate",
    costed: list["CostLine"],
) -> list[str]:
    """What else would lower the peak, with no more groups than were chosen."""
    from moe_groups.planning import price, trade_off

    def best(config: StepConfig, lines_: list["CostLine"]) -> int:
        curve = trade_off(lines_, config.settings)
        return min((c.peak for c in curve if c.groups <= chosen.groups), default=chosen.peak)

    others: list[tuple[str, int]] = []
    if split_by != "parallel_group":
        table = read_table(given, Rules(*rules), "parallel_group")
        coarse = cost_lines(list(lines(table.families)), table, world, step.tensor_ranks)
        others.append(("split_by='parallel_group' (mixes layers)", best(step, coarse)))
    if step.optimizer in ("for-loop", "foreach"):
        fused = replace(step, optimizer="fused")
        peak = min(price(costed, chosen.cuts, fused.settings).peak, best(fused, costed))
        others.append(("AdamW(fused=True)", peak))
    if not (step.compact_gradients or step.uses_bf16_optimizer or step.grad_accum_dtype == "fp32"):
        compact = replace(step, compact_gradients=True)
        others.append(("compact_gradients(engine)", best(compact, costed)))
    return [
        f"{what} would peak at {show_bytes(peak)}, {show_bytes(chosen.peak - peak)} less"
        for what, peak in others
        if peak < 0.95 * chosen.peak
    ]


def cost_lines(found: list[Line], table: Table, world: int, tensor_ranks: int) -> list["CostLine"]:
    """The lines as the search wants them: sizes, and where their partitions are."""
    from moe_groups.cut_search import Line as CostLine

    places: dict[str | None, Any] = {}
    costed = []
    for key, _, rows in found:
        if key.parallel_group not in places:
            places[key.parallel_group] = on_ranks(
                (1,), key.parallel_group, world, tensor_ranks=tensor_ranks
            )
        place = places[key.parallel_group]
        dense = key.parallel_group is None
        sizes = table.sizes_of(rows)
        costed.append(CostLine(sizes, place.ranks, place.partition_of, dense=dense))
    return costed
