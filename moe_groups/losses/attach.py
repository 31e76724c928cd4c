"""Losses that train parameters without being part of the last stage's loss.

A pipeline stage computes the load-balancing losses of its own layers, and sends only activations.
A loss that is attached to these runs its backward pass with theirs, and stages exchange what they
exchange without it (as with Megatron-Core's ``MoEAuxLossAutoScaler``).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from moe_groups._common.arguments import NotNegative, check, checked
from moe_groups._deepspeed.engines import (
    InitializedEngine,
    backward_scale,
    known_engines,
    runs_backward,
)
from moe_groups.errors import InvalidArgumentError

Scale: TypeAlias = NotNegative | Callable[[], float]


@checked
def attach_loss(
    hidden: torch.Tensor, loss: torch.Tensor, *, scale: Scale | None = None
) -> torch.Tensor:
    """Attach ``loss`` to ``hidden``: a backward pass through the result runs that of ``loss`` too.

    The gradients are those of adding ``loss`` to the loss that ``engine.backward`` gets in the
    same micro-batch: divided by the steps of gradient accumulation (also if the caller divides
    itself, with ``scale_wrt_gas=False``) and multiplied by the loss scale. They count once for
    each forward pass, also if activation checkpointing repeats it, or if a pipeline engine whose
    stages exchange several tensors goes through the graph twice.

    Reported losses do not include it: log it with :class:`LossTracker`. The result is a view:
    write ``h = h + x`` after it, not ``h += x``.

    Args:
        hidden: activations on the way to the loss, of any shape; the result has its values.
        loss: of one element, times its coefficient.
        scale: factor of the loss before the backward pass. None: that of the DeepSpeed engine
            whose backward runs (:func:`gradient_scale`), which has to be initialized after a
            call of :func:`create_moe_param_groups`. 1.0 for plain torch; a function is called
            in each backward pass.

    Raises:
        InvalidArgumentError: ``loss`` has more than one element; in the backward pass: there is
            no engine, or there are several and none runs.

    Example:
        >>> y, balance, _ = self.moe(x)                                  # doctest: +SKIP
        >>> return x + attach_loss(y, 0.01 * balance)                    # doctest: +SKIP
    """
    if loss.numel() != 1:
        raise InvalidArgumentError(
            f"attach_loss: the loss has shape {tuple(loss.shape)}: give one number, as its mean."
        )
    if not torch.is_grad_enabled() or not loss.requires_grad:
        return hidden
    attached: torch.Tensor = _Attached.apply(hidden, loss, scale)  # type: ignore[no-untyped-call]
    return attached


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, loss: torch.Tensor, scale: Scale | None
    ) -> torch.Tensor:
        ctx.scale, ctx.like, ctx.is_done = scale, loss.detach(), False
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        factor = 0.0 if ctx.is_done else _value(ctx.scale)
        ctx.is_done = True
        return gradient, torch.ones_like(ctx.like) * float(factor), None


def _value(scale: Scale | None) -> float:
    if scale is None:
        return gradient_scale(_engine())
    factor = scale() if callable(scale) else scale
    check("scale", factor, NotNegative)
    return factor


@checked
def gradient_scale(engine: InitializedEngine) -> float:
    """The factor by which ``engine.backward(loss)`` multiplies the loss.

    The loss scale (fp16) divided by ``gradient_accumulation_steps``.
    """
    return backward_scale(engine)


def _engine() -> Any:
    known = known_engines()
    running = [engine for engine in known if runs_backward(engine)]
    found = running or known
    if len(found) == 1:
        return found[0]
    many = f"{len(known)} engines" if known else "no engine"
    raise InvalidArgumentError(
        f"attach_loss: {many} could run this backward pass. Call create_moe_param_groups before "
        "deepspeed.initialize, or pass the scale: scale=lambda: "
        "moe_groups.gradient_scale(engine), or scale=1.0 without an engine."
    )
