"""How a model will be stepped: DeepSpeed's wrapper, the optimizer, and the ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moe_groups._common.arguments import OptimizerKind, check_one_of, checked
from moe_groups.errors import InvalidArgumentError
from moe_groups.memory.step_cost import MASTER, TEMPORARIES, StepSettings

_KINDS = {**TEMPORARIES, "FusedAdam": 0, "CPUAdam": 0}


@checked
@dataclass(frozen=True, slots=True)
class StepConfig:
    """What the memory of ``engine.step()`` depends on besides the model and its groups.

    Attributes:
        zero_stage: 1 or 2; both wrap the optimizer in ``DeepSpeedZeroOptimizer``.
        bf16_optimizer: ``BF16_Optimizer`` instead, which DeepSpeed chooses for ZeRO-1 with
            fp32 accumulation (and for pipelines).
        optimizer: how AdamW computes: torch's "for-loop" (its default on CPU), "foreach"
            (its default on CUDA) or "fused", DeepSpeed's "FusedAdam", or "CPUAdam" with the
            optimizer offloaded to the host.
        grad_accum_dtype: "bf16" or "fp32" (``data_types.grad_accum_dtype``).
        immediate_grad_update: of the ``bf16`` section; False, DeepSpeed's default, keeps
            the bf16 gradients of all parameters until the end of ``BF16_Optimizer``'s step.
        compact_gradients: :func:`compact_gradients` will be called.
        gather_copies: the all-gather after the step copies what it receives, as gloo's
            does on CPU; NCCL's does not.
        weight_bytes: bytes of an element of the weights.
        tp_size: tensor-parallel ranks.
        expert_tensor_parallel: they cut experts too (``enable_expert_tensor_parallelism``);
            if not, uncut experts are distributed over them as over data-parallel ranks.

    Raises:
        InvalidArgumentError: a combination that DeepSpeed does not have.
    """

    zero_stage: int = 2
    bf16_optimizer: bool = False
    optimizer: OptimizerKind = "foreach"
    grad_accum_dtype: Literal["bf16", "fp32"] = "bf16"
    immediate_grad_update: bool = False
    compact_gradients: bool = False
    gather_copies: bool = False
    weight_bytes: int = 2
    tp_size: int = 1
    expert_tensor_parallel: bool = False

    def __post_init__(self) -> None:
        check_one_of("zero_stage", self.zero_stage, (1, 2))
        check_one_of("optimizer", self.optimizer, tuple(_KINDS))
        check_one_of("grad_accum_dtype", self.grad_accum_dtype, ("bf16", "fp32"))
        if type(self.tp_size) is not int or self.tp_size < 1:
            raise InvalidArgumentError(f"tp_size={self.tp_size!r} must be an integer of 1 or more.")
        if self.compact_gradients and (self.bf16_optimizer or self.offloads):
            raise InvalidArgumentError(
                "compact_gradients=True is for ZeRO-1 and ZeRO-2 with the optimizer on the device: "
                "BF16_Optimizer and offloading hold no gradients that it could make smaller."
            )
        if self.offloads and self.bf16_optimizer:
            raise InvalidArgumentError("optimizer='CPUAdam' (offloading) needs ZeRO-1 or ZeRO-2.")

    @property
    def offloads(self) -> bool:
        """Does the optimizer run on the host?"""
        return self.optimizer == "CPUAdam"

    @property
    def tensor_ranks(self) -> int:
        """Tensor-parallel ranks over which uncut experts are distributed."""
        return 1 if self.expert_tensor_parallel else self.tp_size

    @property
    def label(self) -> str:
        """A short description: ``ZeRO-2, foreach, bf16 gradients``."""
        if self.uses_bf16_optimizer:
            return f"BF16_Optimizer, {self.optimizer}"
        compact = ", compact" if self.compact_gradients else ""
        return (
            f"ZeRO-{self.zero_stage}, {self.optimizer}, {self.grad_accum_dtype} gradients{compact}"
        )

    @property
    def uses_bf16_optimizer(self) -> bool:
        """ZeRO-1 with fp32 accumulation is ``BF16_Optimizer`` (``deepspeed/runtime/engine.py``)."""
        return self.bf16_optimizer or (
            self.zero_stage == 1 and self.grad_accum_dtype == "fp32" and not self.offloads
        )

    @property
    def settings(self) -> StepSettings:
        """The same in the terms of :mod:`moe_groups.memory.step_cost`."""
        fp32 = self.grad_accum_dtype == "fp32"
        return StepSettings(
            wrapper="bf16_optimizer" if self.uses_bf16_optimizer else "zero",
            temporaries=_KINDS[self.optimizer],
            weight_bytes=self.weight_bytes,
            grad_bytes=MASTER if fp32 else self.weight_bytes,
            compact=self.compact_gradients or fp32,
            keeps_low_precision=self.uses_bf16_optimizer and not self.immediate_grad_update,
            gather_copies=self.gather_copies,
        )

    @classmethod
    def from_deepspeed(
        cls, config: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None
    ) -> "StepConfig":
        """Read it from a DeepSpeed config and, if there is one, the client optimizer.

        Raises:
            InvalidArgumentError: ZeRO-3, fp16, or an optimizer whose cost is not known.
        """
        zero = config.get("zero_optimization", {})
        types, bf16 = config.get("data_types", {}), config.get("bf16", {})
        if not bf16.get("enabled"):
            raise InvalidArgumentError(
                'the DeepSpeed config has no "bf16": {"enabled": true}: the cost of the step is '
                "known for bf16 weights."
            )
        offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        return cls(
            zero_stage=zero.get("stage", 0),
            optimizer="CPUAdam" if offload else optimizer_kind(optimizer),
            grad_accum_dtype="fp32" if types.get("grad_accum_dtype") == "fp32" else "bf16",
            immediate_grad_update=bf16.get("immediate_grad_update", False),
        )


def optimizer_kind(optimizer: torch.optim.Optimizer | None) -> OptimizerKind:
    """How an Adam optimizer computes; "foreach" where there is none yet.

    Raises:
        InvalidArgumentError: not Adam or AdamW, whose temporaries are known.
    """
    if optimizer is None:
        return "foreach"
    name = type(optimizer).__name__
    if name in ("FusedAdam", "DeepSpeedCPUAdam"):
        return "CPUAdam" if name == "DeepSpeedCPUAdam" else "FusedAdam"
    if not isinstance(optimizer, torch.optim.AdamW):
        raise InvalidArgumentError(
            f"the step memory of {name} is not known: torch.optim.AdamW, FusedAdam and "
            "DeepSpeedCPUAdam are."
        )
    if optimizer.defaults.get("fused"):
        return "fused"
    foreach = optimizer.defaults.get("foreach")
    on_gpu = any(p.is_cuda for group in optimizer.param_groups for p in group["params"])
    return "foreach" if foreach or (foreach is None and on_gpu) else "for-loop"
