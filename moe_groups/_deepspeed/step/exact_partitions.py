"""Exact gradient partitions of ZeRO-1/2, whatever dtype the gradients accumulate in."""

from typing import Any

from moe_groups._deepspeed.releases import EXACT_MEANS, need
from moe_groups.errors import InvalidArgumentError

EXACT = EXACT_MEANS[0]
_OTHER_WRAPPERS = {
    "NoneType": "it has no optimizer",
    "DummyOptim": "it has no optimizer",
    "BF16_Optimizer": "BF16_Optimizer keeps all gradients in one fp32 buffer for the whole run",
    "DeepSpeedZeroOptimizer_Stage3": (
        "ZeRO-3 already keeps nothing but its partitions, and steps pieces of sub_group_size"
    ),
}


def keep_exact_partitions(engine: Any, caller: str) -> None:
    """Make a ZeRO-1/2 engine keep exact gradient partitions, as with fp32 accumulation.

    DeepSpeed has the code (``runtime/zero/stage_1_and_2.py``) but uses it only for fp32
    accumulation in a model of another dtype, though nothing in it depends on the dtype:
    buffers have the dtype of the accumulation. One method decides; on this optimizer, not on
    its class, one that always returns True replaces it.

    Raises:
        InvalidArgumentError: this engine does not support it, or holds gradients now.
        UnsupportedDeepSpeedError: this DeepSpeed lacks the code.
    """
    check_can_be_exact(engine, caller)
    optimizer = engine.optimizer
    if keeps_exact_partitions(engine) or _is_exact(optimizer):
        return
    if _holds_gradients(optimizer):
        raise InvalidArgumentError(
            f"{caller} was called while the engine holds gradients: call it before the "
            "first backward, or after the engine.step() that ends a gradient accumulation."
        )
    setattr(optimizer, EXACT, _always)


def check_can_be_exact(engine: Any, caller: str) -> None:
    """Refuse an engine that cannot keep exact partitions.

    Raises:
        InvalidArgumentError: it is none of ZeRO-1/2, or keeps gradients elsewhere.
        UnsupportedDeepSpeedError: this DeepSpeed lacks the code.
    """
    optimizer = engine.optimizer
    if type(optimizer).__name__ == "DeepSpeedZeroOptimizer":
        need("exact partitions", f"leave {caller} out")
    if problem := _why_not_exact(engine, optimizer):
        raise InvalidArgumentError(f"{caller} cannot be used on this engine: {problem}.")


def keeps_exact_partitions(engine: Any) -> bool:
    """Has :func:`keep_exact_partitions` changed this engine?"""
    return vars(engine.optimizer).get(EXACT) is _always


def _always(group_idx: int) -> bool:
    return True


def _is_exact(optimizer: Any) -> bool:
    """Does DeepSpeed itself keep exact partitions, in all groups?"""
    return all(getattr(optimizer, EXACT)(index) for index in range(len(optimizer.bit16_groups)))


def _why_not_exact(engine: Any, optimizer: Any) -> str | None:
    """Why this engine cannot keep exact partitions, the same on every rank; None if it can."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    name = type(optimizer).__name__
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        reason = _OTHER_WRAPPERS.get(name, f"it steps with {name}, without ZeRO")
        return (
            f'{reason}. It is for "zero_optimization": {{"stage": 1 or 2}} with gradients that '
            'accumulate in the dtype of the model ("data_types": {"grad_accum_dtype": "bf16"})'
        )
    if optimizer.cpu_offload or optimizer.zenflow:
        return (
            "an offloaded optimizer (offload_optimizer, zenflow) keeps its gradients in CPU "
            "memory. Leave out the call, or the offload"
        )
    if engine.is_deepcompile_enabled():
        return "DeepCompile makes gradient buffers of its own. Leave out the call, or deepcompile"
    if _has_muon(optimizer):
        return (
            "Muon needs the whole gradient of each parameter that it steps. Leave out the call, or "
            "step all parameters with another optimizer"
        )
    return None


def _has_muon(optimizer: Any) -> bool:
    """As DeepSpeed's ``_is_muon_group``, but for all parameters instead of the rank's first."""
    members = (param for group in optimizer.bit16_groups for param in group)
    muon = "muon" in type(optimizer.optimizer).__name__.lower()
    return muon and any(getattr(param, "use_muon", False) for param in members)


def _holds_gradients(optimizer: Any) -> bool:
    """Does DeepSpeed hold gradients of a backward pass that no step has used yet?"""
    kept = (*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values())
    params = (param for group in optimizer.bit16_groups for param in group)
    return any(one is not None for one in kept) or any(
        param.grad is not None or param.grad_accum is not None for param in params
    )
