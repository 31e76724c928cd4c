"""Real DeepSpeed training runs that the distributed tests compare."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from deepspeed.ops.adam import FusedAdam
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from moe_groups import MoE, create_moe_param_groups
from tests.support.models import HIDDEN, TinyMoE

WRAPPERS = {
    "zero1": "DeepSpeedZeroOptimizer",
    "zero2": "DeepSpeedZeroOptimizer",
    "zero2_fp32_grads": "DeepSpeedZeroOptimizer",
    "bf16": "BF16_Optimizer",
    "fp32": "AdamW",  # no wrapper
    "half": "FP16_Optimizer",  # bf16 weights without ZeRO: runs where fp16 does not
    "half_unfused": "FP16_UnfusedOptimizer",
    "fp16": "FP16_Optimizer",
}
"""Wrappers for :func:`start`, and DeepSpeed's class that steps."""

EPS = torch.finfo(torch.float32).eps
NORM_TOLERANCE = EPS * math.sqrt(7072)
"""Relative, for two norms of one gradient: sums of the squares of all elements in two orders.

A :class:`TinyMoE` has 7,072 elements. Each addition rounds up or down, so the errors add up like
the steps of a random walk.
"""
CLIPPED_TOLERANCE = 0.01 * 3 * NORM_TOLERANCE + EPS
"""Absolute, for weights after one step of Adam with gradients that two such norms scaled.

Adam's update is at most the rate, 0.01. Its relative change is at most 2.1 times that of the
gradients of a few steps (Cauchy-Schwarz); 3 leaves room for Adam's own rounding. The weights, none
of which is far above 1, round once more.
"""

GroupsOf = Callable[[nn.Module], list[dict[str, Any]]]


class TorchFusedAdam(FusedAdam):
    """torch's AdamW under a type for which DeepSpeed chooses FP16_Optimizer.

    DeepSpeed's own CPU kernel takes minutes to compile.
    """

    def __init__(self, params: list[dict[str, Any]], **options: Any) -> None:
        self.adamw = torch.optim.AdamW(params, **options)
        self.__dict__.update(self.adamw.__dict__)

    def step(self, closure: None = None) -> None:
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups
        self.adamw.step(closure)


def config(wrapper: str, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed config for one of :data:`WRAPPERS`."""
    cfg: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.05,
        "zero_allow_untested_optimizer": True,
    }
    if wrapper == "fp16":
        cfg["fp16"] = {"enabled": True, "initial_scale_power": 8}
    elif wrapper != "fp32":
        cfg["bf16"] = {"enabled": True}
        fp32 = wrapper in ("bf16", "zero2_fp32_grads")
        cfg["data_types"] = {"grad_accum_dtype": "fp32" if fp32 else "bf16"}
    if wrapper.startswith("zero") or wrapper == "bf16":
        stage = 2 if wrapper.startswith("zero2") else 1
        cfg["zero_optimization"] = {"stage": stage, "contiguous_gradients": True}
    return cfg | changes


def make_groups(model: nn.Module, split: str, cap: int | None = None) -> list[dict[str, Any]]:
    """``split`` is a ``split_by``, or "stock" for DeepSpeed's own (in the order of a set)."""
    if split == "stock":
        group = {"params": list(model.parameters()), "name": "dense"}
        dense, *experts = stock_split(group, max_group_size=cap)
        return [dense, *sorted(experts, key=lambda group: str(group["name"]))]
    return create_moe_param_groups(model, split_by=split, max_group_size=cap)  # type: ignore[arg-type]


def groups_by(split: str, cap: int | None = None) -> GroupsOf:
    return lambda model: make_groups(model, split, cap)


def start(
    wrapper: str,
    groups_of: GroupsOf,
    model: nn.Module | None = None,
    layer: type[nn.Module] = MoE,
    model_options: dict[str, Any] | None = None,
    fused: bool = False,
    lr_scheduler: Callable[[Any], Any] | None = None,
    **changes: Any,
) -> Any:
    """An engine over ``model`` (a TinyMoE by default) with AdamW.

    Args:
        wrapper: one of :data:`WRAPPERS`.
        groups_of: makes the optimizer's groups.
        lr_scheduler: makes a learning-rate scheduler of the optimizer.
        changes: further or other entries of the config.
    """
    if model is None:
        model = TinyMoE(layer, **(model_options or {}))
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.01}
    if wrapper in ("half", "fp16"):
        optimizer: Any = TorchFusedAdam(groups_of(model), **options)
    else:
        optimizer = torch.optim.AdamW(groups_of(model), fused=fused, **options)
    return initialize(model, optimizer, config(wrapper, **changes), lr_scheduler=lr_scheduler)


def moving_in(step: int) -> Callable[[Any], Any]:
    """A scheduler with a rate of 0 except in optimizer step ``step``, counted from 0.

    For runs that differ in the rounding of a norm and clip by it: the rounding sometimes flips
    the last bit of a bf16 weight, and after that the difference of the runs has no bound.
    """
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda now: float(now == step)
    )


def initialize(model: nn.Module, optimizer: Any, cfg: dict[str, Any], **options: Any) -> Any:
    """The engine of ``deepspeed.initialize``, without its prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=cfg, **options)
    return engine


def batches(steps: int, first: int = 0, rows: int = 4) -> Iterator[tuple[torch.Tensor, ...]]:
    """Data that differs per step and per rank, the same in every run."""
    rank = torch.distributed.get_rank()
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(rows, 6, HIDDEN, generator=generator)
        yield x, torch.tanh(x.flip(-1))


def train(engine: Any, steps: int, first: int = 0) -> dict[str, list[float]]:
    """Train ``steps`` steps, and return losses and gradient norms."""
    dtype = next(engine.module.parameters()).dtype
    history: dict[str, list[float]] = {"loss": [], "norm": []}
    for x, y in batches(steps, first):
        loss = engine(x.to(engine.device, dtype), y.to(engine.device, dtype))
        engine.backward(loss)
        engine.step()
        history["loss"].append(float(loss.detach()))
        norm = engine.get_global_grad_norm()
        history["norm"].append(0.0 if norm is None else float(norm))
    return history


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """The parameters by name in full precision: the wrapper's master weights, if it has any.

    All ranks call it together.
    """
    optimizer = engine.optimizer
    masters: dict[int, torch.Tensor] = {}
    if hasattr(optimizer, "fp16_groups"):
        fp32_groups = getattr(optimizer, "fp32_groups", None)
        if fp32_groups is None:
            fp32_groups = [
                flat.split([param.numel() for param in group])
                for flat, group in zip(
                    optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True
                )
            ]
        for group, parts in zip(optimizer.fp16_groups, fp32_groups, strict=True):
            masters.update(
                (id(p), part.view(p.shape)) for p, part in zip(group, parts, strict=True)
            )
    found = {}
    for name, param in engine.module.named_parameters():
        master = masters.get(id(param))
        if master is None:
            master = safe_get_full_fp32_param(param)
        found[name] = (param if master is None else master).detach().float().clone()
    return found


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of the weights of two runs; 0.0 if they are equal bit for bit."""
    assert list(a) == list(b)
    return float(torch.stack([(a[name] - b[name]).abs().max() for name in a]).max())
