"""Plan param groups by what their optimizer step costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moe_groups._common.arguments import (
    TILE,
    Bytes,
    Count,
    NotNegative,
    Positive,
    SplitBy,
    checked,
    shown,
)
from moe_groups._common.text import show_bytes
from moe_groups.errors import InvalidArgumentError, PlanError
from moe_groups.groups.families import read_table
from moe_groups.groups.grouping import (
    DEEPSPEED_MAX_GROUP_SIZE,
    fingerprint,
    lines,
    name_groups,
    split_like_deepspeed,
)
from moe_groups.groups.inputs import GroupInput, ParamGroup, ParamsInput, read_input
from moe_groups.groups.keys import Line, PlannedGroup, Table
from moe_groups.groups.make import make_groups
from moe_groups.groups.rules import NoDecay, Overrides, Rules
from moe_groups.memory.estimate import (
    SizedGroup,
    StepMemory,
    data_parallel_world,
    estimate,
    estimate_step_memory,
    on_ranks,
)
from moe_groups.memory.step_config import StepConfig, step_of

if TYPE_CHECKING:
    from moe_groups.memory.cuts import Line as CostLine
    from moe_groups.memory.search import Candidate


def lean(step: StepConfig) -> StepConfig:
    """The same with :func:`lean_step`."""
    return replace(step, compact_gradients=False, lean_step=step.lean_step or TILE)


def hints(
    split_by: SplitBy,
    step: StepConfig,
    chosen: "Candidate",
    costed: list["CostLine"],
    coarse: list["CostLine"],
) -> list[str]:
    """What else would lower the peak, with no more groups than were chosen.

    Args:
        costed: the lines of ``split_by``.
        coarse: those of whole parallel groups.
    """
    from moe_groups.memory.search import price, trade_off

    def best(config: StepConfig, lines_: list["CostLine"]) -> int:
        curve = trade_off(lines_, config.settings)
        return min((c.peak for c in curve if c.groups <= chosen.groups), default=chosen.peak)

    others: list[tuple[str, int]] = []
    if split_by != "parallel_group":
        others.append(("split_by='parallel_group' (mixes layers)", best(step, coarse)))
    if step.optimizer in ("for-loop", "foreach"):
        fused = replace(step, optimizer="fused")
        peak = min(price(costed, chosen.cuts, fused.settings).peak, best(fused, costed))
        others.append(("AdamW(fused=True)", peak))
    if step.lean_step is None:
        peak = price(costed, chosen.cuts, lean(step).settings).peak
        others.append((f"lean_step(engine) with these {chosen.groups} groups", peak))
    plain = not (step.compact_gradients or step.lean_step or step.uses_bf16_optimizer)
    if plain and step.grad_accum_dtype != "fp32":
        compact = replace(step, compact_gradients=True)
        others.append(("compact_gradients(engine)", best(compact, costed)))
    return [
        f"{what} would peak at {show_bytes(peak)}, {show_bytes(chosen.peak - peak)} less"
        for what, peak in others
        if peak < 0.95 * chosen.peak
    ]


def stock_groups(table: Table) -> list[SizedGroup]:
    """DeepSpeed's own groups with its default cap, for a table of whole parallel groups."""
    return [
        (group or "dense", table.sizes_of(rows), group)
        for group, _, rows in split_like_deepspeed(table, DEEPSPEED_MAX_GROUP_SIZE)
    ]


def cost_lines(found: list[Line], table: Table, world: int, tensor_ranks: int) -> list["CostLine"]:
    """The lines in the form of the search: sizes, and where their partitions are."""
    from moe_groups.memory.cuts import Line as CostLine

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


@dataclass(frozen=True, slots=True)
class TradeOff:
    """A point of the trade-off curve.

    Attributes:
        groups: number of groups.
        step_peak: T + R on the worst rank, bytes.
        lean_peak: the same with :func:`lean_step`.
    """

    groups: int
    step_peak: int
    lean_peak: int


@dataclass(frozen=True, slots=True)
class ParamGroupPlan:
    """Ordered groups, before any optimizer exists.

    Attributes:
        groups: name, key, expert number and rows of the parameters of each group.
        sizes: elements of each parameter of the model, by row.
        split_by: the level at which groups are separated.
        step: how the model will be stepped.
        data_parallel_size: ranks of the data-parallel world.
        curve: the best plans found with this ``split_by``, from few groups to low peaks.
        hints: what else would lower the peak, and what ``split_by`` costs.
        rules: weight decay, decay rule and overrides that the groups were made with.
        made_for: digest of the parameters' sizes, tags and dtypes.
    """

    groups: list[PlannedGroup]
    sizes: list[int] = field(repr=False)
    split_by: SplitBy
    step: StepConfig
    data_parallel_size: int
    curve: list[TradeOff]
    hints: list[str]
    rules: tuple[float | None, NoDecay | None, Overrides] = field(repr=False)
    made_for: bytes = field(repr=False)

    def sized(self) -> list[SizedGroup]:
        """Name, sizes and parallel group of each group, the input of an estimate."""
        return [
            (name, tuple(self.sizes[row] for row in rows), key.parallel_group)
            for name, key, _, rows in self.groups
        ]

    @property
    def memory(self) -> StepMemory:
        """The predicted memory of the step with these groups."""
        return estimate_step_memory(self)

    @checked
    def groups_of(self, params: ParamsInput) -> list[ParamGroup]:
        """The group dicts of the plan, as :func:`create_moe_param_groups` returns them.

        Args:
            params: what the plan was made for, or the same model built again.

        Raises:
            PlanError: the parameters are not those that the plan was made for.
            MoEGroupsError: as :func:`create_moe_param_groups`.
        """
        rules = Rules(*self.rules)

        def planned(given: GroupInput) -> list[PlannedGroup]:
            self._check_made_for(read_table(given, rules, self.split_by))
            return self.groups

        return make_groups(params, rules, planned, self.split_by, planned=True)

    def _check_made_for(self, table: Table) -> None:
        if made_for(table) == self.made_for:
            return
        rows = sum(len(rows) for experts in table.families.values() for rows in experts.values())
        planned = sum(len(rows) for *_, rows in self.groups)
        what = f"{rows} trainable parameters where it had {planned}"
        if rows == planned:
            what = "the same number of parameters, with other sizes, tags, dtypes or order"
        raise PlanError(
            f"the plan was made for another model: this one has {what}. Plan again, with the model "
            "as this rank trains it."
        )

    def __str__(self) -> str:
        lines_ = [str(self.memory), *(f"hint: {hint}" for hint in self.hints)]
        return "\n".join(lines_)


@checked
def plan_param_groups(
    params: ParamsInput,
    *,
    step_memory_budget: Bytes = "auto",
    max_groups: Positive | None = None,
    split_by: SplitBy = "parallel_group",
    step: StepConfig | None = None,
    data_parallel_size: Count | None = None,
    weight_decay: NotNegative | None = None,
    no_decay: NoDecay | None = None,
    overrides: Overrides | None = None,
) -> ParamGroupPlan:
    """Cut and order the groups for the memory of ``engine.step()``.

    Args:
        params: as for :func:`create_moe_param_groups`; meta parameters suffice.
        step_memory_budget: bytes, or a string like "2GiB": the fewest groups whose step
            peak T + R fits on every rank. "auto": the lowest peak that is worth its groups
            (each further group must save 64 MiB), and not above that of DeepSpeed's
            own split where ``split_by`` allows it, as its default always does.
        max_groups: the lowest peak with at most this number of groups.
        split_by: groups never mix more than this level, at any cost. The default mixes layers,
            which is what lowers the peak most.
        step: wrapper, optimizer and dtypes; None: the engine's where one has the parameters,
            else ZeRO-2, foreach AdamW, bf16 gradients.
        data_parallel_size: ranks that share dense parameters; None: the world size of
            ``torch.distributed``.
        weight_decay: as for :func:`create_moe_param_groups`, like the next two.

    Raises:
        PlanError: no plan fits; the message names the smallest budget, or the smallest number
            of groups, that works.
        InvalidArgumentError: an argument is out of range, the model or its engine is of ZeRO-3, or
            the cost of its engine's step is not known.
        MoEGroupsError: as :func:`create_moe_param_groups`.

    Example:
        >>> plan = plan_param_groups(model, step_memory_budget="2GiB",
        ...                          data_parallel_size=64)              # doctest: +SKIP
        >>> groups = plan.groups_of(model)                               # doctest: +SKIP
    """
    if max_groups is not None and step_memory_budget != "auto":
        raise InvalidArgumentError(
            f"max_groups={shown(max_groups)} goes without step_memory_budget: give one of them."
        )
    rules = (weight_decay, no_decay, overrides or ())
    given = read_input(params)
    table = read_table(given, Rules(*rules), split_by)
    return make_group_plan(
        given, table, rules, split_by, step, data_parallel_size, step_memory_budget, max_groups
    )


def make_group_plan(
    given: GroupInput,
    table: Table,
    rules: tuple[float | None, NoDecay | None, Overrides],
    split_by: SplitBy,
    step: StepConfig | None,
    data_parallel_size: int | None,
    budget: Bytes,
    max_groups: int | None = None,
) -> ParamGroupPlan:
    """:func:`plan_param_groups` for parameters that have been read."""
    from moe_groups.memory.search import best_order, choose, price, trade_off

    step, world = step_of(given.params, step), data_parallel_world(data_parallel_size)
    if step.offloads:
        raise InvalidArgumentError(
            "with the optimizer on the host ('CPUAdam') the step holds next to nothing on the "
            "device, and grouping changes nothing there: see estimate_step_memory."
        )
    found = list(lines(table.families))
    costed = cost_lines(found, table, world, step.tensor_ranks)
    curve = trade_off(costed, step.settings)
    coarse, coarse_lines = table, costed
    if split_by != "parallel_group":
        coarse = read_table(given, Rules(*rules), "parallel_group")
        coarse_lines = cost_lines(list(lines(coarse.families)), coarse, world, step.tensor_ranks)
    stock = estimate(stock_groups(coarse), step, world).step_peak
    chosen = choose(curve, budget, max_groups, split_by, stock)
    named = name_groups(zip(found, map(_tiles, chosen.cuts), strict=True), table, given.groups)
    tiles = [
        line.tile(*ends) for line, cut in zip(costed, chosen.cuts, strict=True) for ends in cut
    ]
    return ParamGroupPlan(
        groups=[named[index] for index in best_order(tiles, step.settings)[1]],
        sizes=table.sizes,
        split_by=split_by,
        step=step,
        data_parallel_size=world,
        curve=[
            TradeOff(one.groups, one.peak, price(costed, one.cuts, lean(step).settings).peak)
            for one in curve
        ],
        hints=hints(split_by, step, chosen, costed, coarse_lines),
        rules=rules,
        made_for=made_for(table),
    )


def _tiles(cut: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]] | None:
    return cut if len(cut) > 1 else None


def made_for(table: Table) -> bytes:
    """A digest of what a plan depends on: sizes, tags, variants and dtypes."""
    return fingerprint(
        [
            table.sizes,
            *(
                (key, number, [*rows][:1], len(rows))
                for key, experts in table.families.items()
                for number, rows in experts.items()
            ),
        ]
    )
