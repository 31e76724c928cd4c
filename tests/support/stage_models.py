"""One model over any mix of pipeline, tensor, expert and data parallelism, with the same numbers.

Blocks are ``x + mlp(norm(x))``, some of them ``x + moe(norm(x))``; the mlp is tensor-parallel like
Megatron's. Weights and data depend only on names and numbers, not on the ranks that hold them.
"""

import functools
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import (
    PipelineParallelGrid,
    PipeModelDataParallelTopology,
)
from torch import nn
from torch.nn.functional import gelu

from moe_groups import CarriedLoss, CarryLoss, MoE, attach_loss
from tests.support.models import HIDDEN
from tests.support.training import config, initialize, make_groups

INNER = 32
COEFFICIENT = 0.05


class Run(NamedTuple):
    """Sizes and options of a run; the remaining ranks are data-parallel.

    Attributes:
        pp: stages with equal numbers of layers; with ``plain`` no PipelineModule is used.
        tp: tensor-parallel ranks.
        ep: ``ep_size`` of each MoE block, as many as there are blocks; 0 for a dense one.
        carry: how the load-balancing loss is added to the loss: "carry", "attach", or "no".
        split: the groups, see :func:`tests.support.training.make_groups`.
        off: MoE blocks that drop their loss.
        data_first: use_data_before_expert_parallelism.
        tied: the first and the last layer share their weight.
        checkpoint: activation_checkpoint_interval.
        reentrant: checkpoint with DeepSpeed's function instead of torch's non-reentrant one.
        bare: number of last layers that are not wrapped to carry the loss.
    """

    pp: int = 1
    tp: int = 1
    ep: tuple[int, ...] = (1,) * 8
    carry: str = "carry"
    split: str = "module"
    wrapper: str = "bf16"
    plain: bool = False
    expert_tp: bool = False
    data_first: bool = False
    micro_batches: int = 4
    off: tuple[int, ...] = ()
    tied: bool = False
    checkpoint: int = 0
    reentrant: bool = True
    bare: int = 0
    cap: int | None = None
    other: dict[str, Any] = {}  # noqa: RUF012  (never changed)


class _Copy(torch.autograd.Function):
    """Identity forward, sum of gradients backward (Megatron's f)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous().float()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad.to(torch.bfloat16), None


class _Reduce(torch.autograd.Function):
    """Sum forward, identity backward (Megatron's g)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        total = x.float()
        torch.distributed.all_reduce(total, group=group)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class Mlp(nn.Module):
    """Column-parallel, gelu, row-parallel; without ``cut``, an expert is uncut on all ranks."""

    def __init__(self, grid: Any, cut: bool = True) -> None:
        super().__init__()
        self.cut = cut and grid.get_slice_parallel_world_size() > 1
        self.grid = grid
        width = INNER // grid.get_slice_parallel_world_size() if self.cut else INNER
        self.up = nn.Linear(HIDDEN, width, bias=False)
        self.down = nn.Linear(width, HIDDEN, bias=False)
        if width < INNER:
            for param in self.parameters():
                param.model_parallel = True  # type: ignore[attr-defined]
        self.shift = nn.Parameter(torch.zeros(HIDDEN))  # uncut on all ranks

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mlp":
        return Mlp(self.grid, self.cut)  # process groups cannot be copied; `fill` runs later

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = self.grid.get_slice_parallel_group()
        if self.cut:
            x = _Copy.apply(x, group)  # type: ignore[no-untyped-call]
        y: torch.Tensor = self.down(gelu(self.up(x)))
        if self.cut:
            y = _Reduce.apply(y, group)  # type: ignore[no-untyped-call]
        return y + self.shift


class Dense(nn.Module):
    def __init__(self, number: int, run: Run, grid: Any) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(HIDDEN), Mlp(grid)
        fill(self, f"block{number}", grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.mlp(self.norm(x))
        return y


class Sparse(nn.Module):
    def __init__(self, number: int, run: Run, grid: Any) -> None:
        super().__init__()
        self.norm, self.off = nn.LayerNorm(HIDDEN), number in run.off
        self.attach = run.carry == "attach"
        self.moe = MoE(
            HIDDEN,
            Mlp(grid, cut=run.expert_tp),
            num_experts=4,
            ep_size=run.ep[number],
            k=2,
            drop_tokens=run.expert_tp,  # False gives capacities that may be odd and are cut in two
            capacity_factor=2.0,  # no token is dropped
            min_capacity=0,
            use_rts=False,
            top2_2nd_expert_sampling=False,
            enable_expert_tensor_parallelism=run.expert_tp,
            expert_group_name=f"block{number}",
        )
        fill(self, f"block{number}", grid, run)

    def forward(self, x: torch.Tensor) -> Any:
        y, loss, _ = self.moe(self.norm(x))
        loss = loss * 0 if self.off else loss
        if self.attach:
            return x + attach_loss(y, COEFFICIENT * loss)
        return x + y, loss


class Ends(nn.Module):
    """The first or the last layer."""

    def __init__(self, name: str, grid: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        fill(self, name, grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


class TiedEnds(nn.Module):
    """First and last layer in one; a pipeline ties the parameter called ``weight``."""

    def __init__(self, grid: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN, HIDDEN))
        fill(self, "ends", grid)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def fill(module: nn.Module, name: str, grid: Any, run: Run = Run()) -> None:  # noqa: B008  (immutable)
    """Set numbers that depend on the parameter's name and the global number of its expert."""
    tensor_rank, width = grid.get_slice_parallel_rank(), grid.get_slice_parallel_world_size()
    parameters: list[tuple[str, Any]] = list(module.named_parameters())
    for own, param in parameters:
        shape, dim, where = list(param.shape), None, own
        if getattr(param, "model_parallel", False):
            dim = 0 if "up" in own else 1
            shape[dim] *= width
        if not getattr(param, "allreduce", True):
            ep_size = int(param.group_name.split("_")[2])
            rank = torch.distributed.get_rank()
            if run.data_first:
                stage = torch.distributed.get_world_size() // run.pp
                place = rank % stage // (stage // ep_size)
            else:
                place = (rank // width if run.expert_tp else rank) % ep_size
            number = place * param.num_local_experts + param.expert_number
            where = f"{number} {own.partition('deepspeed_experts.')[2].partition('.')[2]}"
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {where}".encode()))
        full = torch.randn(shape, generator=generator) * 0.2
        if "norm" in own:
            full = 1 + 0.1 * full
        with torch.no_grad():
            param.copy_(full if dim is None else full.chunk(width, dim)[tensor_rank])


def regression(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = (output.float() - wanted.float()).square().mean()
    return loss


class Plain(nn.Module):
    """The same layers without a pipeline; one module computes the whole loss."""

    def __init__(self, run: Run, grid: Any) -> None:
        super().__init__()
        run = run._replace(carry="no")
        kinds = [Sparse if size else Dense for size in run.ep]
        first: nn.Module = TiedEnds(grid) if run.tied else Ends("first", grid)
        last: nn.Module = first if run.tied else Ends("last", grid)
        blocks = [kind(number, run, grid) for number, kind in enumerate(kinds)]
        self.layers = nn.ModuleList([first, *blocks, last])

    def forward(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        total: Any = 0.0
        for layer in self.layers:
            made = layer(x)
            x, loss = made if isinstance(made, tuple) else (made, 0.0)
            total = total + loss
        whole: torch.Tensor = regression(x, wanted) + COEFFICIENT * total
        return whole


def start_run(run: Run) -> Any:
    """Start an engine."""
    world = torch.distributed.get_world_size()
    data = world // run.pp // run.tp
    topology = PipeModelDataParallelTopology(run.pp, run.tp, data)
    changes: dict[str, Any] = {
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": run.micro_batches // data,
        "use_data_before_expert_parallelism": run.data_first,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    cfg = config(run.wrapper, **(changes | run.other))
    grid = PipelineParallelGrid(topology=topology)
    if run.plain:
        model: nn.Module = Plain(run, grid)
        optimizer = torch.optim.AdamW(make_groups(model, run.split, run.cap), lr=2e-3)
        return initialize(model, optimizer, cfg, mpu=grid)
    wrap: tuple[Callable[..., Any], ...] = (CarryLoss,) if run.carry == "carry" else ()
    specs: list[Any] = [(Ends, "first", grid)]
    specs += [(Sparse if size else Dense, n, run, grid) for n, size in enumerate(run.ep)]
    specs += [(Ends, "last", grid)]
    wrapped = len(specs) - run.bare
    layers = [LayerSpec(*(wrap if n < wrapped else ()), *spec) for n, spec in enumerate(specs)]
    if run.tied:
        weight = "block.weight" if wrap else "weight"
        tied = TiedLayerSpec("ends", *wrap, TiedEnds, grid, tied_weight_attr=weight)
        layers[0] = layers[-1] = tied
    loss_fn: Any = CarriedLoss(regression, COEFFICIENT) if wrap else regression
    model = PipelineModule(
        layers,
        topology=topology,
        loss_fn=loss_fn,
        partition_method="uniform",
        activation_checkpoint_interval=run.checkpoint,
        **({} if run.reentrant else {"activation_checkpoint_func": _recomputed}),
    )
    optimizer = torch.optim.AdamW(make_groups(model, run.split, run.cap), lr=2e-3)
    return initialize(model, optimizer, cfg)


_recomputed = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


def micro_batches(engine: Any, run: Run, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of a step's micro-batches, which do not depend on the number of ranks."""
    steps = engine.gradient_accumulation_steps()
    rank = engine.mpu.get_data_parallel_rank()
    for number in range(rank * steps, (rank + 1) * steps):
        generator = torch.Generator().manual_seed(1000 * step + number)
        x = torch.randn(4, 6, HIDDEN, generator=generator).bfloat16()
        yield x, torch.tanh(x.flip(-1))


def train_run(engine: Any, run: Run, steps: int, first: int = 0) -> list[float]:
    """Train, and return each step's mean loss over its micro-batches, as PipelineEngine does."""
    history = []
    for step in range(first, first + steps):
        batches = micro_batches(engine, run, step)
        if not run.plain:
            history.append(float(engine.train_batch(batches)))
            continue
        total = torch.zeros(())
        for x, wanted in batches:
            loss = engine(x, wanted)
            engine.backward(loss)
            engine.step()
            total += loss.detach().float()
        torch.distributed.all_reduce(total)
        sharers = torch.distributed.get_world_size() // engine.mpu.get_data_parallel_world_size()
        history.append(float(total) / sharers / run.micro_batches)
    return history
