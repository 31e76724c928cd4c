"""One real DeepSpeed training run, as the distributed tests compare them."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from torch import nn

from moe_groups import MoE, create_moe_param_groups
from tests.models import HIDDEN, TinyMoE


def config(wrapper: str, **changes: Any) -> dict[str, Any]:
    """A DeepSpeed config for "zero1", "zero2", "zero2_fp32_grads", "bf16", "fp32" or "fp16"."""
    cfg: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.05,
        "zero_allow_untested_optimizer": True,
    }
    if wrapper == "fp32":
        pass
    elif wrapper == "fp16":
        cfg["fp16"] = {"enabled": True, "initial_scale_power": 8}
    else:
        stage = 2 if wrapper.startswith("zero2") else 1
        cfg["zero_optimization"] = {"stage": stage, "contiguous_gradients": True}
        cfg["bf16"] = {"enabled": True}
        fp32 = wrapper in ("bf16", "zero2_fp32_grads")
        cfg["data_types"] = {"grad_accum_dtype": "fp32" if fp32 else "bf16"}
    return cfg | changes


def make_groups(model: nn.Module, split: str, cap: int | None) -> list[dict[str, Any]]:
    """``split`` is a ``split_by``, or "stock" for DeepSpeed's own."""
    if split == "stock":
        group = {"params": list(model.parameters()), "name": "dense"}
        stock: list[dict[str, Any]] = stock_split(group, max_group_size=cap)
        return stock
    return create_moe_param_groups(model, split_by=split, max_group_size=cap)  # type: ignore[arg-type]


def start(
    wrapper: str,
    groups_of: Callable[[nn.Module], list[dict[str, Any]]],
    model: nn.Module | None = None,
    layer: type[nn.Module] = MoE,
    model_options: dict[str, Any] | None = None,
    fused: bool = False,
    **changes: Any,
) -> Any:
    """An engine over ``model`` (a TinyMoE by default) with AdamW."""
    if model is None:
        model = TinyMoE(layer, **(model_options or {}))
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, weight_decay=0.01, fused=fused)
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config(wrapper, **changes)
        )
    return engine


def batches(steps: int, first: int = 0, rows: int = 4) -> Iterator[tuple[torch.Tensor, ...]]:
    """Data that differs per step and per rank, the same in every run."""
    rank = torch.distributed.get_rank()
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(rows, 6, HIDDEN, generator=generator)
        yield x, torch.tanh(x.flip(-1))


def train(engine: Any, steps: int, first: int = 0) -> dict[str, list[float]]:
    """Losses and gradient norms of ``steps`` steps."""
    dtype = next(engine.module.parameters()).dtype
    history: dict[str, list[float]] = {"loss": [], "norm": []}
    for x, y in batches(steps, first):
        loss = engine(x.to(dtype), y.to(dtype))
        engine.backward(loss)
        engine.step()
        history["loss"].append(float(loss.detach()))
        norm = engine.get_global_grad_norm()
        history["norm"].append(0.0 if norm is None else float(norm))
    return history


def parameters(engine: Any) -> dict[str, torch.Tensor]:
    """The model's parameters by name, as numpy-free copies that can be sent."""
    return {name: p.detach().float().clone() for name, p in engine.module.named_parameters()}


def master_weights(engine: Any) -> dict[str, torch.Tensor]:
    """fp32 master weights of this rank, by the group they are in; empty without a wrapper."""
    for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        parts = getattr(engine.optimizer, attribute, None)
        if parts is not None:
            return {str(i): p.detach().clone() for i, p in enumerate(parts)}
    return {}
