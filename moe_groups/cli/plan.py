"""Compute the plan of ``moe-groups plan``, and the splits to compare with it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from moe_groups._common.arguments import SplitBy
from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.families import read_table
from moe_groups.groups.grouping import DEEPSPEED_MAX_GROUP_SIZE, lines, make_plan
from moe_groups.groups.inputs import read_input
from moe_groups.groups.keys import Table
from moe_groups.groups.rules import Rules
from moe_groups.memory.estimate import SizedGroup, StepMemory, estimate
from moe_groups.memory.plan import TradeOff, lean, plan_param_groups, stock_groups
from moe_groups.memory.step_config import StepConfig
from moe_groups.meta_models.rank import shard_for_rank, undivided_layers
from moe_groups.meta_models.source import load_model, names_function
from moe_groups.topology import ep_size_of


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The arguments of ``moe-groups plan``; None if not given."""

    source: str
    world_size: int
    step: StepConfig
    ep_size: int | None = None
    tp_size: int = 1
    pp_size: int = 1
    pp_rank: int | None = None
    experts: Literal["list", "fused"] | None = None
    split_by: SplitBy = "parallel_group"
    step_memory_budget: str = "auto"
    max_groups: int | None = None
    max_group_size: int | None = None

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (self.tp_size * self.pp_size)


@dataclass(frozen=True, slots=True)
class RankModel:
    """One rank's model.

    Attributes:
        model: the model, on meta.
        pp_rank: its pipeline stage; None if the source decided.
        total: number of elements of the whole model, if known.
        held: number of elements on the rank.
        in_experts: number of elements of experts on the rank.
        ep_sizes: EP sizes, ascending.
        notes: where the result differs from the request.
    """

    model: nn.Module
    pp_rank: int | None
    total: int | None
    held: int
    in_experts: int
    ep_sizes: list[int]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mark:
    """A split to mark on the trade-off curve.

    Attributes:
        lean_peak: its step peak with ``lean_step``; None with the optimizer on the host.
    """

    key: Literal["stock", "no_cap", "plan"]
    label: str
    memory: StepMemory
    lean_peak: int | None

    @property
    def groups(self) -> int:
        return len(self.memory.groups)


@dataclass(frozen=True, slots=True)
class PlanReport:
    """All results; the last of ``marks`` are the requested groups."""

    request: PlanRequest
    rank: RankModel
    marks: list[Mark]
    curve: list[TradeOff]
    hints: list[str]

    @property
    def memory(self) -> StepMemory:
        return self.marks[-1].memory


def make_report(request: PlanRequest) -> PlanReport:
    """Build the model, plan groups, and estimate the other splits.

    Raises:
        MoEGroupsError: the source, the topology or the budget cannot be used.
    """
    if request.step.offloads and (
        request.step_memory_budget != "auto" or request.max_groups is not None
    ):
        raise InvalidArgumentError(
            "with the optimizer on the host its step needs no memory on the device: leave out the "
            "budget and the number of groups."
        )
    rank = _rank_model(request)
    _check_fits(rank, request)
    curve: list[TradeOff] = []
    hints: list[str] = []
    if request.max_group_size is not None or request.step.offloads:
        label = "no cap" if request.max_group_size is None else f"cap {request.max_group_size:,}"
        chosen = _mark("plan", label, _capped(rank, request, request.max_group_size), request)
    else:
        plan = plan_param_groups(
            rank.model,
            step_memory_budget=request.step_memory_budget,
            max_groups=request.max_groups,
            split_by=request.split_by,
            step=request.step,
            data_parallel_size=request.data_parallel_size,
        )
        chosen = _mark("plan", "the plan", plan.sized(), request)
        curve, hints = plan.curve, plan.hints
    others = [
        _mark(
            "stock",
            f"DeepSpeed's split, cap {DEEPSPEED_MAX_GROUP_SIZE:,}",
            stock_groups(_table(rank.model)),
            request,
        ),
        _mark("no_cap", f"by {request.split_by}, no cap", _capped(rank, request, None), request),
    ]
    return PlanReport(request, rank, [*others, chosen], curve, [*rank.notes, *hints])


# ---- the rank's model -----------------------------------------------------------------


def _rank_model(request: PlanRequest) -> RankModel:
    if names_function(request.source):
        given = {
            "--ep": request.ep_size,
            "--pp-rank": request.pp_rank,
            "--experts": request.experts,
        }
        if unused := [name for name, value in given.items() if value is not None]:
            raise InvalidArgumentError(
                f"{', '.join(unused)}: not with module:function, which builds one rank's model "
                "as it is."
            )
        return _measured(load_model(request.source), None, None)
    whole = load_model(request.source)
    total = sum(param.numel() for param in whole.parameters())
    best: RankModel | None = None
    for stage in range(request.pp_size) if request.pp_rank is None else [request.pp_rank]:
        model = shard_for_rank(
            whole,
            ep_size=request.ep_size or 1,
            tp_size=request.tp_size,
            pp_size=request.pp_size,
            pp_rank=stage,
            experts=request.experts or "list",
        )
        found = _measured(model, stage, total)
        if best is None or found.held > best.held:
            best = found
    assert best is not None
    if kept := undivided_layers(whole, request.ep_size or 1):
        best.notes.append(
            f"every rank has all experts of {len(kept)} layers outside of the decoder, because "
            f"--ep {request.ep_size} does not divide their number; the first is {kept[0].path!r}"
        )
    return best


def _measured(model: nn.Module, pp_rank: int | None, total: int | None) -> RankModel:
    held = sum(param.numel() for param in model.parameters())
    table = _table(model)
    in_experts: Counter[str] = Counter()
    for key, _, rows in lines(table.families):
        if key.parallel_group:
            in_experts[key.parallel_group] += sum(table.sizes_of(rows))
    sizes = sorted(ep_size_of(name) for name in in_experts)
    return RankModel(model, pp_rank, total, held, in_experts.total(), sizes)


def _check_fits(rank: RankModel, request: PlanRequest) -> None:
    stage = request.world_size // request.pp_size
    for size in rank.ep_sizes:
        if stage % size:
            raise InvalidArgumentError(
                f"expert-parallel size {size} does not divide the {stage} ranks of a pipeline "
                "stage (world size / pp), over which the experts are distributed."
            )


# ---- splits to compare with -----------------------------------------------------------


def _mark(
    key: Literal["stock", "no_cap", "plan"],
    label: str,
    groups: list[SizedGroup],
    request: PlanRequest,
) -> Mark:
    step, world = request.step, request.data_parallel_size
    peak = None if step.offloads else estimate(groups, lean(step), world).step_peak
    return Mark(key, label, estimate(groups, step, world), peak)


def _capped(rank: RankModel, request: PlanRequest, cap: int | None) -> list[SizedGroup]:
    """The groups of ``create_moe_param_groups(max_group_size=cap)``."""
    given = read_input(rank.model)
    table = read_table(given, Rules(None, None, ()), request.split_by)
    return [
        (name, table.sizes_of(rows), key.parallel_group)
        for name, key, _, rows in make_plan(table, lambda key: cap, given.groups)
    ]


def _table(model: nn.Module) -> Table:
    """The parameters, with all experts of one parallel group together."""
    return read_table(read_input(model), Rules(None, None, ()), "parallel_group")
