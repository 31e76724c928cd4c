"""Collectives of the MoE layers: on gloo, and in a checkpointed region."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from moe_groups._deepspeed.kept_collectives import inside_region, once
from moe_groups._deepspeed.patching import Change, change_functions


def wrap_gather_tokens(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Gather into tensors of the input's shape: gloo does not accept nccl's flat buffer."""

    def _gather_tokens(input_: torch.Tensor, dim: int = 0) -> torch.Tensor:
        from deepspeed.utils import groups
        from deepspeed.utils.bwc import bwc_tensor_model_parallel_group

        if input_.device.type != "cpu":
            return original(input_, dim)
        group = bwc_tensor_model_parallel_group(groups.mpu)
        count = torch.distributed.get_world_size(group)
        parts = [torch.empty_like(input_).contiguous() for _ in range(count)]
        torch.distributed.all_gather(parts, input_.contiguous(), group=group)
        return torch.cat(parts, dim)

    return _gather_tokens


def support_kept_collectives() -> None:
    """Send the MoE layers' collectives through ``kept_collectives.py``.

    Outside of a checkpointed region, for example in the backward pass, they run as before. Does
    nothing when called again, or if DeepSpeed is not imported: then no layer is DeepSpeed's.
    AutoEP's are changed once it is imported; DeepSpeed before 0.19.2 has none.

    Raises:
        UnsupportedDeepSpeedError: this DeepSpeed lacks a function that is needed.
            Nothing has been changed then.
    """
    if "deepspeed" in sys.modules:
        changes = KEPT_OF_AUTOEP + KEPT if _AUTOEP in sys.modules else KEPT
        change_functions(changes, "checkpoint_activations needs")


def _wrap_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap an autograd function that communicates and returns the result."""
    kind = original.__qualname__

    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        if not inside_region():
            return original(ctx, *args)
        return once(kind, ctx, lambda: original(ctx, *args))

    return forward


def _wrap_all_reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep results only of the all-reduce in which the gates agree on a capacity."""

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        capacity = tensor.numel() == 1 and not tensor.is_floating_point()
        if not capacity or not inside_region() or _is_async(*args, **kwargs):
            return original(tensor, *args, **kwargs)

        def reduce() -> torch.Tensor:
            original(tensor, *args, **kwargs)
            result: torch.Tensor = tensor.clone()
            return result

        tensor.copy_(once("all_reduce of a whole number", None, reduce))
        return None

    return all_reduce


def _wrap_split_plan(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep AutoEP's plan of who sends how many tokens to whom: counts on the device, and lists."""

    def compute_split_plan(*args: Any, **kwargs: Any) -> Any:
        if not inside_region():
            return original(*args, **kwargs)
        made = SimpleNamespace()

        def run() -> torch.Tensor:
            made.plan = original(*args, **kwargs)
            counts: torch.Tensor = made.plan.local_counts_by_source
            return counts

        counts = once("compute_split_plan", made, run)
        return made.plan._replace(local_counts_by_source=counts)

    return compute_split_plan


def _is_async(
    op: Any = None, group: Any = None, async_op: bool = False, *_: Any, **__: Any
) -> bool:
    return async_op


KEPT: tuple[Change, ...] = (
    ("deepspeed.moe.sharded_moe:_AllToAll", "forward", _wrap_forward),
    ("deepspeed.moe.mappings:_GatherTokens", "forward", _wrap_forward),
    ("deepspeed.comm", "all_reduce", _wrap_all_reduce),
)
_AUTOEP = "deepspeed.module_inject.auto_ep_layer"
KEPT_OF_AUTOEP: tuple[Change, ...] = (
    (f"{_AUTOEP}:_AllToAllV", "forward", _wrap_forward),
    (_AUTOEP, "compute_split_plan", _wrap_split_plan),
)
