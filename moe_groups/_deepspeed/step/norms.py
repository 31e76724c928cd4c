"""The norm of the gradients and their reduction, with one sum for each parallel group."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from moe_groups._deepspeed.process_groups import parallel_groups
from moe_groups._deepspeed.step.around_step import is_own
from moe_groups.tags import parallel_group_of

_STAGES = "_moe_groups_stages"


def by_parallel_group(tensors: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """One list per parallel group instead of one per name, in the order of appearance."""
    merged: dict[str, list[Any]] = {}
    for name, values in tensors.items():
        merged.setdefault(parallel_group_of(name), []).extend(values)
    return merged


def wrap_zero_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """Run on every stage as many all-reduces as the stage with the most groups needs."""

    def scaled_global_norm(self: Any, norm_type: Any = 2) -> Any:
        most, differ = groups_of_stages(self)
        norms = [original(self, norm_type)]
        for _ in range(most - len(self.bit16_groups)):
            if self.cpu_offload:  # adds 0 to the sum of the other stages
                norms.append(self.complete_grad_norm_calculation_for_cpu_offload([]))
            else:
                norms.append(self.get_grad_norm_direct([], []))
        if not differ:
            return norms[0]
        return same_on_all_stages(self, _combined(norms, norm_type) if norms[1:] else norms[0])

    return scaled_global_norm


def _combined(norms: list[Any], norm_type: Any) -> Any:
    from deepspeed.runtime import utils

    if hasattr(utils, "combine_grad_norm_groups"):
        return utils.combine_grad_norm_groups(norms, norm_type)
    return torch.linalg.vector_norm(torch.stack(norms), ord=norm_type)  # before 0.19


def groups_of_stages(optimizer: Any) -> tuple[int, bool]:
    """The largest number of groups on a stage of this pipeline, and whether stages differ.

    Stages are the model-parallel ranks.
    """
    here = [
        parallel_group_of(str(options.get("name"))) if options.get("moe") else None
        for options in optimizer.optimizer.param_groups
    ]
    group = optimizer.model_parallel_group
    if group is None or torch.distributed.get_world_size(group) == 1:
        return len(here), False
    known: tuple[int, bool] | None = getattr(optimizer, _STAGES, None)
    if known is None:
        stages: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(stages, here, group=group)
        known = max(map(len, stages)), any(other != here for other in stages)
        setattr(optimizer, _STAGES, known)
    return known


def same_on_all_stages(optimizer: Any, norm: torch.Tensor) -> torch.Tensor:
    """The largest norm of all stages: they sum in different orders, but must clip by one norm."""
    from deepspeed.accelerator import get_accelerator

    largest = norm.to(get_accelerator().current_device_name())  # nccl needs it there
    group = optimizer.model_parallel_group
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    return largest.to(norm.device)


def wrap_is_model_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    """Count the uncut experts of all tensor-parallel ranks, which ZeRO's norm takes for copies."""

    def is_model_parallel_parameter(p: torch.Tensor) -> bool:
        return is_own(p, original(p))

    return is_model_parallel_parameter


def wrap_grads_for_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """``BF16_Optimizer`` sums once for each parallel group, the same ones on all ranks."""

    def get_grads_for_norm(self: Any, for_clipping: bool = False) -> Any:
        if for_clipping:
            return original(self, for_clipping)
        dense, experts = original(self)
        nothing = self.fp32_groups_flat_partition[0].new_zeros(1)
        experts = by_parallel_group(experts)
        if _has_stages(self):
            experts = {key: experts.get(key, [nothing]) for key in parallel_groups()}
        return dense or [nothing], experts  # DeepSpeed fails on an empty list

    return get_grads_for_norm


def wrap_bf16_step(original: Callable[..., None]) -> Callable[..., None]:
    """``BF16_Optimizer`` counts all experts in the norm, and joins the sums of other stages."""

    def step(self: Any, closure: Any = None) -> None:
        groups = self.optimizer.param_groups
        for has_gradients, group in zip(self.fp32_groups_has_gradients, groups, strict=True):
            if group.get("moe"):
                # Its buffer has the sum over all ranks that share it, even if this rank added 0.
                has_gradients[:] = [True] * len(has_gradients)
        if not self.has_moe_layers and _has_stages(self) and parallel_groups():
            self.has_moe_layers, self.expert_gradients = True, {}
        original(self, closure)

    return step


def _has_stages(optimizer: Any) -> bool:
    from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size

    return optimizer.mpu is not None and bwc_pipeline_parallel_world_size(optimizer.mpu) > 1


def wrap_grads_for_reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    """``BF16_Optimizer`` reduces once for each parallel group."""

    def get_grads_for_reduction(self: Any) -> Any:
        dense, experts = original(self)
        return dense, by_parallel_group(experts)

    return get_grads_for_reduction


def wrap_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """``FP16_Optimizer`` sums once for each parallel group."""

    def get_norm_with_moe_layers(
        non_expert_norm: Any, mpu: Any, expert_tensors: Any, norm_type: Any = 2
    ) -> Any:
        return original(non_expert_norm, mpu, by_parallel_group(expert_tensors), norm_type)

    return get_norm_with_moe_layers
