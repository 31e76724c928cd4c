"""Before and after the optimizer's step: parameters that the norm counts, and clipping."""

from collections.abc import Callable
from typing import Any

import torch

from moe_groups._deepspeed.engines import steps_parameters, wrapper_name
from moe_groups.errors import InvalidArgumentError
from moe_groups.tags import is_expert_parameter

_BEFORE_CLIPPING = "_moe_groups_before_clipping"
_AFTER_STEP = "_moe_groups_after_step"
_PARTITIONED = ("ZeRO-1", "ZeRO-2", "BF16_Optimizer")


def check_steps_partitions(engine: Any, what: str) -> None:
    """Refuse engines whose torch optimizer does not step the partitions of :class:`LaidOut`.

    Raises:
        InvalidArgumentError: an engine with another wrapper.
    """
    if not steps_parameters(engine) and wrapper_name(engine) not in _PARTITIONED:
        raise InvalidArgumentError(
            f"{what} knows engines that step with {', '.join(_PARTITIONED)} or without a wrapper, "
            f"not with {wrapper_name(engine)}: choose one of them in the config "
            '("zero_optimization": {"stage": 1 or 2}).'
        )


def is_counted(engine: Any, param: torch.Tensor) -> bool:
    """Does the global norm count this parameter here, and not a copy on another rank?

    As in ``get_grads_for_norm`` and ``get_grad_norm_direct``: the norm counts the copy on the first
    tensor-parallel rank, and the copy on the first of the pipeline stages that tie a parameter.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

    if getattr(param, "ds_pipe_replicated", False):
        return False
    own = is_own(param, is_model_parallel_parameter(param))
    return own or bwc_tensor_model_parallel_rank(engine.mpu) == 0


def is_own(param: torch.Tensor, marked: Any) -> bool:
    """Does ``param`` differ between tensor-parallel ranks, instead of being a copy?

    Uncut experts differ between these ranks. If tensor parallelism cuts experts, their
    slices are ``marked`` (``model_parallel``), and the rest (a bias, a norm) are copies.
    """
    from deepspeed.utils import groups

    if marked or not is_expert_parameter(param):
        return bool(marked)
    return bool(groups._get_expert_model_parallel_world_size() == 1)


def clipping_divisor(engine: Any) -> float:
    """The number by which the wrapper divided all gradients of the last step to clip them; or 1.

    The formula is in ``unscale_and_clip_grads`` and ``clip_tensors_by_global_norm``.
    """
    optimizer = engine.optimizer
    clip, norm = getattr(optimizer, "clip_grad", 0.0), engine.get_global_grad_norm()
    if steps_parameters(engine) or not clip or norm is None:
        return 1.0
    return max(1.0, (float(norm) + 1e-6) / clip)


def before_own_clipping(engine: Any, function: Callable[[], None]) -> Callable[[], None]:
    """Call ``function`` before an engine without a wrapper clips; returns a function to undo it."""
    functions: list[Callable[[], None]] | None = getattr(engine, _BEFORE_CLIPPING, None)
    if functions is None:
        setattr(engine, _BEFORE_CLIPPING, functions := [])
        original, called = engine.clip_fp32_gradients, functions

        def clip_fp32_gradients() -> None:
            for one in called:
                one()
            original()

        engine.clip_fp32_gradients = clip_fp32_gradients
    functions.append(function)

    def undo() -> None:
        functions.remove(function)
        if not functions:
            del engine.clip_fp32_gradients
            delattr(engine, _BEFORE_CLIPPING)

    return undo


def after_step(engine: Any, function: Callable[[bool], None]) -> Callable[[], None]:
    """Call ``function`` after each optimizer step; returns a function to undo it.

    It gets whether DeepSpeed skipped the step. Wraps what ``step`` and a pipeline's ``train_batch``
    call at the end of gradient accumulation, and what counts the steps.
    """
    functions: list[Callable[[bool], None]] | None = getattr(engine, _AFTER_STEP, None)
    if functions is None:
        setattr(engine, _AFTER_STEP, functions := [])
        original, called = engine._take_model_step, functions

        def _take_model_step(*args: Any, **kwargs: Any) -> None:
            skipped = engine.skipped_steps
            original(*args, **kwargs)
            for one in called:
                one(engine.skipped_steps > skipped)

        engine._take_model_step = _take_model_step
    functions.append(function)

    def undo() -> None:
        functions.remove(function)
        if not functions:
            del engine._take_model_step
            delattr(engine, _AFTER_STEP)

    return undo
