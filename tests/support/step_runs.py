"""Measured steps of real engines, and the predictions for the rank."""

import gc
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from deepspeed.ops.adam import FusedAdam
from torch import nn

from moe_groups import (
    MoE,
    StepConfig,
    compact_gradients,
    create_moe_param_groups,
    estimate_step_memory,
    lean_step,
    plan_param_groups,
)
from moe_groups.memory.estimate import on_ranks
from moe_groups.memory.group_layout import GroupOnRanks
from moe_groups.memory.measure import measure_step_memory
from moe_groups.memory.step_cost import step_cost
from tests.support.training import initialize

OPTIONS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
"""Options of torch's AdamW, by ``StepConfig.optimizer``."""


class Shape(NamedTuple):
    """The sizes of a model's parameters, on which a step depends.

    Attributes:
        dense: elements of each dense parameter; each layer adds its gate.
        expert: elements of each parameter of one expert.
        layers: number of MoE layers.
        local: number of experts of a layer on each rank.
        ep_size: ranks over which the experts are distributed.
        hidden: hidden size; the gates have ``hidden`` elements for each expert.
    """

    dense: tuple[int, ...] = (90_000, 40_001)
    expert: tuple[int, ...] = (60_000, 60_000, 60_000)
    layers: int = 2
    local: int = 2
    ep_size: int = 2
    hidden: int = 64

    def times(self, factor: int) -> "Shape":
        """The same with ``factor`` times the elements."""
        dense, expert = ([factor * n for n in sizes] for sizes in (self.dense, self.expert))
        return self._replace(dense=tuple(dense), expert=tuple(expert))

    def over(self, divisor: int) -> "Shape":
        """The same with the elements of every parameter divided by ``divisor``."""
        dense, expert = ([n // divisor for n in sizes] for sizes in (self.dense, self.expert))
        return self._replace(
            dense=tuple(dense), expert=tuple(expert), hidden=self.hidden // divisor
        )


class Expert(nn.Module):
    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)


class Model(nn.Module):
    """A model that only needs gradients: its loss is the sum of its parameters."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.dense = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in shape.dense)
        self.layers = nn.ModuleList(
            MoE(
                shape.hidden,
                Expert(shape.expert),
                num_experts=shape.local * shape.ep_size,
                ep_size=shape.ep_size,
            )
            for _ in range(shape.layers)
        )
        self.to(dtype)

    def forward(self) -> torch.Tensor:
        # One after the other, because a sum of all would hold an fp32 copy of each.
        total = torch.zeros((), device=next(self.parameters()).device)
        for param in self.parameters():
            total = total + param.sum()
        return total


class Case(NamedTuple):
    """A way to train ``shape``.

    Attributes:
        step: the input of the prediction, from which the config is made.
        groups: a ``split_by``, "stock", "planned" (the lowest peak), "planned mixed" (the same,
            but groups may mix layers) or "budget" (the fewest groups that meet it).
        cap: elements of a group; for "planned" the largest number of groups, for "budget" bytes.
        accumulate: micro-batches in a step.
        clip: gradient clipping, 0 for none.
        zero: further settings of the ``zero_optimization`` section.
        further: further settings of the config.
    """

    step: StepConfig = StepConfig()
    groups: str = "module"
    cap: int | None = None
    shape: Shape = Shape()
    accumulate: int = 1
    clip: float = 0.0
    zero: tuple[tuple[str, Any], ...] = ()
    further: tuple[tuple[str, Any], ...] = ()


class Figures(NamedTuple):
    """Bytes of one step on this rank."""

    transient: int
    held: int
    step_peak: int


class Run(NamedTuple):
    """Predicted and measured figures of one rank.

    Attributes:
        expected_first: T and T + R of the first step, which creates the optimizer's state.
        expected: T and T + R of later steps.
        first: measured figures of the first step.
        later: measured figures of each later step.
        group_count: number of groups that were stepped.
        seconds: wall time of each further step.
    """

    expected_first: Figures
    expected: Figures
    first: Figures
    later: list[Figures]
    group_count: int
    seconds: list[float]


def make_groups(model: nn.Module, case: Case, world: int) -> list[dict[str, Any]]:
    if case.groups == "stock":
        trained = [param for param in model.parameters() if param.requires_grad]
        whole = {"params": trained, "name": "dense"}
        dense, *experts = stock_split(whole, max_group_size=case.cap)
        # Their order is that of a set; DeepSpeed drops empty groups.
        experts.sort(key=lambda group: str(group["name"]))
        return [group for group in (dense, *experts) if group["params"]]
    if case.groups in ("planned", "planned mixed", "budget"):
        planned = case.groups != "budget"
        plan = plan_param_groups(
            model,
            split_by="parallel_group" if case.groups == "planned mixed" else "module",
            max_groups=case.cap if planned else None,
            step_memory_budget="auto" if planned or case.cap is None else case.cap,
            step=case.step,
            data_parallel_size=world,
        )
        return plan.groups_of(model)
    return create_moe_param_groups(model, split_by=case.groups, max_group_size=case.cap)  # type: ignore[arg-type]


def deepspeed_config(case: Case) -> dict[str, Any]:
    step = case.step
    zero: dict[str, Any] = {"stage": step.zero_stage, **dict(case.zero)}
    bf16 = {"enabled": step.weight_bytes == 2, "immediate_grad_update": step.immediate_grad_update}
    if step.bf16_optimizer_states:
        bf16 |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    if step.offloads:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": case.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": bf16,
        "data_types": {"grad_accum_dtype": "fp32" if step.accumulates_fp32 else "bf16"},
        "zero_optimization": zero,
    } | dict(case.further)


def tiles_of(groups: list[dict[str, Any]], world: int) -> list[GroupOnRanks]:
    """The groups on the ranks of the world, from DeepSpeed's own attributes."""
    found = []
    for group in groups:
        sizes = tuple(param.numel() for param in group["params"])
        parallel_group = group["params"][0].group_name if group.get("moe") else None
        found.append(on_ranks(sizes, parallel_group, world))
    return found


def expected_figures(
    groups: list[dict[str, Any]], step: StepConfig, rank: int, world: int, first: bool
) -> Figures:
    cost = step_cost(tiles_of(groups, world), step.settings, first)
    return Figures(int(cost.transient[rank]), int(cost.held[rank]), int(cost.peak[rank]))


def start(case: Case) -> tuple[Any, list[dict[str, Any]]]:
    """An engine, and the groups that were given to it."""
    with torch.device(get_accelerator().current_device_name()):
        model = Model(case.shape, torch.float32 if case.step.weight_bytes == 4 else torch.bfloat16)
    groups = make_groups(model, case, torch.distributed.get_world_size())
    given = [dict(group, params=list(group["params"])) for group in groups]
    optimizer: torch.optim.Optimizer
    if case.step.optimizer == "FusedAdam":
        optimizer = FusedAdam(groups, lr=1e-3)
    else:
        # On the host the fused kernel replaces DeepSpeedCPUAdam; both allocate nothing.
        options = OPTIONS[case.step.optimizer if not case.step.offloads else "fused"]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, **options)  # type: ignore[arg-type]
    engine = initialize(model, optimizer, deepspeed_config(case))
    gc.unfreeze()  # walking frozen objects costs each measurement a second
    if case.step.lean_step is not None:
        lean_step(engine, case.step.lean_step)
    elif case.step.compact_gradients:
        compact_gradients(engine)
    return engine, given


def steps(engine: Any, case: Case, count: int) -> Iterator[tuple[Figures, float]]:
    """Figures and seconds of each of ``count`` steps."""
    for _ in range(count):
        for micro in range(case.accumulate):
            engine.backward(engine())
            if micro < case.accumulate - 1:
                engine.step()
        time.sleep(0.02)  # threads of gloo release their buckets a moment later
        get_accelerator().synchronize()
        with measure_step_memory(engine.device) as memory:
            begin = time.perf_counter()
            engine.step()
            get_accelerator().synchronize()
            seconds = time.perf_counter() - begin
        yield Figures(memory.transient, memory.held, memory.step_peak), seconds


def run(case: Case, count: int = 3) -> Run:
    """Train ``count`` steps on this rank of a real or a fake world."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine, groups = start(case)
    predicted = estimate_step_memory(groups, step=case.step, data_parallel_size=world)
    peaks = step_cost(tiles_of(groups, world), case.step.settings).peak
    assert predicted.step_peak == peaks.max()
    assert predicted.worst_rank == peaks.argmax()
    (first, _), *later = steps(engine, case, count)
    return Run(
        expected_figures(groups, case.step, rank, world, first=True),
        expected_figures(groups, case.step, rank, world, first=False),
        first,
        [figures for figures, _ in later],
        len(groups),
        [seconds for _, seconds in later],
    )


def run_all(cases: list[Case], count: int = 3) -> list[Run]:
    """Run one engine after the other in this process."""
    from tests.support.ranks import forget_process_groups

    found = []
    for case in cases:
        # Engines are cycles: their tensors would be released in a step of the next engine.
        forget_process_groups()
        found.append(run(case, count))
    return found
