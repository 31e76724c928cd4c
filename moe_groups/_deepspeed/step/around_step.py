"""What the torch optimizer steps on a rank, what of it the norm counts, and clipping."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from moe_groups._deepspeed.checkpoints import checkpoint_rank, laid_out_groups
from moe_groups._deepspeed.engines import stepped_elsewhere, steps_parameters, wrapper_name
from moe_groups.errors import InvalidArgumentError
from moe_groups.tags import is_expert_parameter, numel_of

_PARTITIONED = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "BF16_Optimizer")


class Placed(NamedTuple):
    """Where a parameter lies in a tensor that the torch optimizer steps on this rank.

    Attributes:
        name: as in checkpoints.
        param: the parameter.
        begin: place of its first element; below 0 if its first elements are on another rank.
        start: first place in which this rank counts an element of it.
        stop: the place after the last one; ``start`` if another rank counts the parameter.
    """

    name: str
    param: torch.Tensor
    begin: int
    start: int
    stop: int


def check_steps_partitions(engine: Any, what: str) -> None:
    """Refuse engines whose torch optimizer does not step what :func:`placed_parameters` gives.

    Raises:
        InvalidArgumentError: an engine with another wrapper, or whose torch optimizer does not
            step all partitions in memory.
    """
    if not steps_parameters(engine) and wrapper_name(engine) not in _PARTITIONED:
        raise InvalidArgumentError(
            f"{what} works with {', '.join(_PARTITIONED)} or without a wrapper, "
            f"not with {wrapper_name(engine)}: choose one of them in the config "
            '("zero_optimization": {"stage": 1, 2 or 3}).'
        )
    if found := stepped_elsewhere(engine):
        raise InvalidArgumentError(
            f"{what} does not work under ZeRO-3 with {found}, where the torch optimizer does not "
            'step all parameters: take the setting out of "zero_optimization" in the config.'
        )


def placed_parameters(engine: Any) -> Iterator[tuple[torch.Tensor, list[Placed]]]:
    """The tensors that the torch optimizer steps on this rank, and the parameters in each.

    Each element of the model is counted on exactly one rank: copies of a parameter on other
    ranks do not count, as in DeepSpeed's global norm. ZeRO-1, ZeRO-2 and BF16_Optimizer cut a
    group into partitions, ZeRO-3 each parameter.
    """
    if wrapper_name(engine) == "ZeRO-3":
        yield from _placed_by_zero3(engine)
        return
    own = checkpoint_rank(engine)[1]
    for group in laid_out_groups(engine):
        counted = [is_counted(engine, param) for _, param, _ in group.members]
        if steps_parameters(engine):
            for (name, param, _), counts in zip(group.members, counted, strict=True):
                stop = numel_of(param) if counts and group.ranks[0] == own else 0
                yield param, [Placed(name, param, 0, 0, stop)]
            continue
        flat = group.options["params"][0]
        first = group.ranks.index(own) * flat.numel()
        yield (
            flat,
            [
                Placed(name, param, offset - first, 0, flat.numel() if counts else 0)
                for (name, param, offset), counts in zip(group.members, counted, strict=True)
            ],
        )


def _placed_by_zero3(engine: Any) -> Iterator[tuple[torch.Tensor, list[Placed]]]:
    """ZeRO-3 steps a tensor for each sub group, with this rank's slice of each parameter."""
    optimizer = engine.optimizer
    flat_tensors = optimizer.fp32_partitioned_groups_flat
    for flat, params in zip(flat_tensors, optimizer.fp16_groups, strict=True):
        placed, start = [], 0
        for param in params:
            size = param.partition_numel()
            begin = start - torch.distributed.get_rank(param.ds_process_group) * size
            name, counted = engine.param_names.get(param, "?"), is_counted(engine, param)
            placed.append(Placed(name, param, begin, start, start + size if counted else start))
            start += size
        yield flat, placed


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

    def wrap(original: Callable[[], None], functions: list[Any]) -> Callable[[], None]:
        def clip_fp32_gradients() -> None:
            for one in functions:
                one()
            original()

        return clip_fp32_gradients

    return _called_by(engine, "clip_fp32_gradients", wrap, function)


def after_step(engine: Any, function: Callable[[bool], None]) -> Callable[[], None]:
    """Call ``function`` after each optimizer step; returns a function to undo it.

    It gets whether DeepSpeed skipped the step. Wraps what ``step`` and a pipeline's ``train_batch``
    call at the end of gradient accumulation, and what counts the steps.
    """

    def wrap(original: Callable[..., None], functions: list[Any]) -> Callable[..., None]:
        def _take_model_step(*args: Any, **kwargs: Any) -> None:
            skipped = engine.skipped_steps
            original(*args, **kwargs)
            for one in functions:
                one(engine.skipped_steps > skipped)

        return _take_model_step

    return _called_by(engine, "_take_model_step", wrap, function)


def _called_by(
    engine: Any, method: str, wrap: Callable[..., Any], function: Callable[..., None]
) -> Callable[[], None]:
    """Add ``function`` to those that this engine's method calls; returns a function to undo it."""
    kept = f"_moe_groups_{method}"
    functions: list[Any] | None = getattr(engine, kept, None)
    if functions is None:
        setattr(engine, kept, functions := [])
        setattr(engine, method, wrap(getattr(engine, method), functions))
    functions.append(function)

    def undo() -> None:
        functions.remove(function)
        if not functions:
            delattr(engine, method)
            delattr(engine, kept)

    return undo
