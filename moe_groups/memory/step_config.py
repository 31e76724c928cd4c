"""How a model will be stepped: DeepSpeed's wrapper, the optimizer, and the ranks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from moe_groups._common.arguments import Count, FilePath, OptimizerKind, checked
from moe_groups._common.text import parse_bytes
from moe_groups._deepspeed.engines import SteppingEngine, engine_of
from moe_groups._deepspeed.step.exact_partitions import keeps_exact_partitions
from moe_groups._deepspeed.step.lean_step import tile_of
from moe_groups._deepspeed.step.step_settings import ZERO3, check_zero_stage, read_step_settings
from moe_groups._deepspeed.step.tiles import elements_of
from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.origin import were_planned
from moe_groups.memory.step_cost import MASTER, TEMPORARIES, StepSettings

_KINDS = {**TEMPORARIES, "FusedAdam": 0, "CPUAdam": 0}


@checked
@dataclass(frozen=True, slots=True)
class StepConfig:
    """What the memory of ``engine.step()`` depends on besides the model and its groups.

    Attributes:
        zero_stage: 1 or 2; both wrap the optimizer in ``DeepSpeedZeroOptimizer``.
        bf16_optimizer: ``BF16_Optimizer`` with fp32 accumulation instead, which DeepSpeed
            chooses for ZeRO-1 with fp32 accumulation (and for pipelines).
        optimizer: how AdamW computes: torch's "for-loop" (its default on CPU), "foreach"
            (its default on CUDA) or "fused", DeepSpeed's "FusedAdam", or "CPUAdam" with the
            optimizer offloaded to the host.
        grad_accum_dtype: "bf16" or "fp32" (``data_types.grad_accum_dtype``).
        bf16_optimizer_states: master weights, gradients and moments are bf16
            (``bf16_master_weights_and_grads`` and ``bf16_optimizer_states``).
        immediate_grad_update: of the ``bf16`` section; False, DeepSpeed's default, keeps
            the bf16 gradients of all parameters until the end of ``BF16_Optimizer``'s step.
        compact_gradients: :func:`compact_gradients` will be called.
        lean_step: the tile of :func:`lean_step`, as "64MiB", if it will be called.
        gather_copies: the all-gather after the step copies what it receives, as gloo's
            does on CPU; NCCL's does not.
        weight_bytes: bytes of an element of the weights: 2, or 4 for fp32 weights, whose
            gradients are fp32 too.
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
    bf16_optimizer_states: bool = False
    immediate_grad_update: bool = False
    compact_gradients: bool = False
    lean_step: int | str | None = None
    gather_copies: bool = False
    weight_bytes: Literal[2, 4] = 2
    tp_size: Count = 1
    expert_tensor_parallel: bool = False

    def __post_init__(self) -> None:
        check_zero_stage(self.zero_stage)
        if self.compact_gradients and (self.uses_bf16_optimizer or self.offloads):
            raise InvalidArgumentError(
                "compact_gradients=True is for ZeRO-1 and ZeRO-2 with the optimizer on the device: "
                "BF16_Optimizer and offloading hold no gradients that it could make smaller."
            )
        if self.lean_step is not None:
            elements_of(parse_bytes(self.lean_step, "lean_step"), "lean_step")
            if self.offloads:
                raise InvalidArgumentError(
                    f"lean_step={self.lean_step!r} needs the optimizer on the device: leave it "
                    "out with optimizer='CPUAdam'."
                )
        if self.offloads and self.bf16_optimizer:
            raise InvalidArgumentError("optimizer='CPUAdam' (offloading) needs ZeRO-1 or ZeRO-2.")
        plain = not (self.bf16_optimizer or self.offloads)
        if self.weight_bytes == MASTER and not plain:
            raise InvalidArgumentError(
                "weight_bytes=4 needs ZeRO-1 or ZeRO-2 with the optimizer on the device."
            )
        if self.bf16_optimizer_states and (not plain or self.accumulates_fp32):
            raise InvalidArgumentError(
                "bf16_optimizer_states=True needs bf16 weights, grad_accum_dtype='bf16', and "
                "ZeRO-1 or ZeRO-2 with the optimizer on the device."
            )

    @property
    def accumulates_fp32(self) -> bool:
        """Do gradients accumulate in fp32?"""
        return self.grad_accum_dtype == "fp32" or self.weight_bytes == MASTER

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
        lean = "" if self.lean_step is None else ", lean"
        if self.uses_bf16_optimizer:
            return f"BF16_Optimizer, {self.optimizer}{lean}"
        notes = ", bf16 states" if self.bf16_optimizer_states else ""
        notes += ", fp32 weights" if self.weight_bytes == MASTER else ""
        notes += ", compact" if self.compact_gradients and self.lean_step is None else ""
        dtype = "fp32" if self.accumulates_fp32 else "bf16"
        return f"ZeRO-{self.zero_stage}, {self.optimizer}, {dtype} gradients{notes}{lean}"

    @property
    def uses_bf16_optimizer(self) -> bool:
        """ZeRO-1 with fp32 accumulation for bf16 weights is (``deepspeed/runtime/engine.py``)."""
        return self.bf16_optimizer or (
            self.zero_stage == 1
            and self.grad_accum_dtype == "fp32"
            and self.weight_bytes != MASTER
            and not self.offloads
        )

    @property
    def settings(self) -> StepSettings:
        """The same in the terms of :mod:`moe_groups.memory.step_cost`."""
        fp32 = self.accumulates_fp32
        return StepSettings(
            wrapper="bf16_optimizer" if self.uses_bf16_optimizer else "zero",
            temporaries=_KINDS[self.optimizer],
            weight_bytes=self.weight_bytes,
            grad_bytes=MASTER if fp32 else self.weight_bytes,
            compact=self.compact_gradients
            or self.lean_step is not None
            or (fp32 and self.weight_bytes != MASTER),
            keeps_low_precision=self.uses_bf16_optimizer and not self.immediate_grad_update,
            gather_copies=self.gather_copies,
            master_bytes=self.weight_bytes if self.bf16_optimizer_states else MASTER,
            tile_bytes=parse_bytes(self.lean_step, "lean_step") if self.lean_step else 0,
        )

    @classmethod
    def from_deepspeed(
        cls,
        config: Mapping[str, Any] | FilePath,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> "StepConfig":
        """Read it from a DeepSpeed config and the optimizer.

        Args:
            config: a dict, or the path of the file with it.
            optimizer: the client optimizer; None: the one that the config names, or torch's
                AdamW with foreach where it names none.

        Raises:
            InvalidArgumentError: a setting, such as ZeRO-3 or fp16, or an optimizer whose cost
                is not known.
            MissingPackageError: DeepSpeed, which reads its config, is not installed.
        """
        read = read_step_settings(config)
        return cls(
            zero_stage=read.zero_stage,
            optimizer=_kind(optimizer, read.optimizer, read.optimizer_params, read.offloads),
            grad_accum_dtype=read.grad_accum_dtype,
            bf16_optimizer_states=read.bf16_optimizer_states,
            immediate_grad_update=read.immediate_grad_update,
        )

    @classmethod
    def from_engine(cls, engine: SteppingEngine) -> "StepConfig":
        """Read it from an engine, with ``compact_gradients`` and ``lean_step`` if it has them.

        Raises:
            InvalidArgumentError: as :meth:`from_deepspeed`.
        """
        tile = tile_of(engine)
        return replace(
            cls.from_deepspeed(engine.config, engine.basic_optimizer),
            compact_gradients=tile is None and keeps_exact_partitions(engine),
            lean_step=tile,
        )


def step_of(params: Sequence[torch.Tensor], step: StepConfig | None) -> StepConfig:
    """``step``; None: that of the engine that has the parameters, else the default.

    Raises:
        InvalidArgumentError: ZeRO-3 has partitioned the parameters, or the cost of the engine's
            step is not known.
    """
    if any(hasattr(param, "ds_id") for param in params):
        raise InvalidArgumentError(f"the parameters are partitioned for ZeRO-3: {ZERO3}")
    if step is not None:
        return step
    engine = engine_of(params)
    return StepConfig() if engine is None else StepConfig.from_engine(engine)


def refuse_planned(engine: Any) -> None:
    """Refuse groups for an engine of ZeRO-3 that were planned for the memory of another step.

    Raises:
        InvalidArgumentError: they were.
    """
    groups = engine.basic_optimizer.param_groups
    if were_planned([(str(group.get("name", "")), group["params"]) for group in groups]):
        raise InvalidArgumentError(
            "the groups were planned for the memory of a step under ZeRO-1 or ZeRO-2 "
            f"(step_memory_budget, or a plan), and the engine is of ZeRO-3: {ZERO3} Make the "
            "groups without a plan, and set sub_group_size in the DeepSpeed config."
        )


def _kind(
    optimizer: torch.optim.Optimizer | None,
    named: str | None,
    params: Mapping[str, Any],
    offloads: bool,
) -> OptimizerKind:
    """How the optimizer that DeepSpeed will use computes: the client's, or the one it makes.

    Raises:
        InvalidArgumentError: one whose cost is not known.
    """
    if optimizer is not None:
        name, options = type(optimizer).__name__, optimizer.param_groups
        params = {"fp32_optimizer_states": getattr(optimizer, "fp32_optimizer_states", None)}
        of_torch = type(optimizer) is torch.optim.AdamW
    elif named is None:
        return "CPUAdam" if offloads else "foreach"
    else:
        name, options = named, [dict(params)]
        of_torch = bool(params.get("torch_adam"))
        if named in ("adam", "adamw") and not of_torch:
            name = "DeepSpeedCPUAdam" if offloads else "FusedAdam"
        elif not of_torch or (named == "adam" and not params.get("adam_w_mode", True)):
            raise _unknown(named)
    if name == "DeepSpeedCPUAdam" and offloads and params.get("fp32_optimizer_states") is not False:
        return "CPUAdam"
    if name == "FusedAdam" and not offloads:
        return "FusedAdam"
    if not of_torch:
        raise _unknown(name + " with offload_optimizer" * offloads)
    kind = _torch_kind(options)
    if not offloads:
        return kind
    if kind != "fused":
        raise _unknown(f"torch.optim.AdamW ({kind}) with offload_optimizer")
    return "CPUAdam"  # which allocates as little


def _torch_kind(groups: Iterable[Mapping[str, Any]]) -> OptimizerKind:
    """How torch's AdamW computes with the options of these groups."""
    kinds: set[OptimizerKind] = set()
    for group in groups:
        for option in ("amsgrad", "maximize", "capturable", "differentiable"):
            if group.get(option):
                raise _unknown(f"AdamW with {option}={group[option]!r}")
        foreach = group.get("foreach")
        on_gpu = torch.cuda.is_available() or any(p.is_cuda for p in group.get("params", ()))
        several = foreach or (foreach is None and on_gpu)
        kinds.add("fused" if group.get("fused") else "foreach" if several else "for-loop")
    if len(kinds) != 1:
        raise _unknown(f"AdamW whose groups compute in different ways ({', '.join(sorted(kinds))})")
    return kinds.pop()


def _unknown(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the step memory of {what} is not known: that of torch.optim.AdamW (for-loop, foreach or "
        "fused), of FusedAdam, and of DeepSpeedCPUAdam with offload_optimizer is. Measure the step "
        "with measure_step_memory."
    )
