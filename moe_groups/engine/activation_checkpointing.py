"""Activation checkpointing that does not repeat the collectives of MoE layers."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint

from moe_groups._common.arguments import check, checked
from moe_groups._deepspeed.collectives import support_kept_collectives
from moe_groups._deepspeed.kept_collectives import KeepPass, ReplayPass, Result
from moe_groups.errors import InvalidArgumentError

Contexts = tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]


@checked
def checkpoint_activations(
    function: Callable[..., Any],
    *args: Any,
    context_fn: Callable[[], Contexts] | None = None,
    **kwargs: Any,
) -> Any:
    """Checkpoint a function with MoE layers, without repeating their all-to-alls.

    Like ``torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)``: the
    activations of ``function`` are dropped after the forward pass and computed again in the
    backward pass, and gradients are the same, bit for bit. But the results of the collectives of
    DeepSpeed's MoE layers are kept, and the collectives do not run again. A training step then
    runs 4 all-to-alls for each layer (2 forward, 2 backward) where torch's checkpoint runs 6. It
    keeps the results of the two all-to-alls, the capacity that ranks agree on with
    ``drop_tokens=False``, and the gathered tokens under tensor parallelism. The gate makes the
    same random choices in the recomputation, as long as ``preserve_rng_state`` is on. AutoEP's
    layers run 5 (one is of counts) where torch's checkpoint runs 8; their DeepEP backend
    exchanges tokens in another way, which is repeated.

    **Memory**: besides what torch's checkpoint keeps, each rank keeps for each MoE layer with
    ``ep_size > 1``, from its forward to its backward pass,
    2 x experts x capacity x hidden x bytes of an element, where experts counts those of all ranks
    and capacity is the largest number of tokens that one rank sends to an expert (about
    capacity_factor x k x tokens / experts). So about 2 x capacity_factor x k tensors of the size
    of the layer's input. Under tensor parallelism these are split over its ranks, and the
    gathered tokens come on top: one such tensor, unsplit. AutoEP's layers keep the tokens that
    the rank's experts receive, and their results for its own: on average 2 x k tensors.

    It also serves as ``activation_checkpoint_func`` of DeepSpeed's ``PipelineModule``. All
    ranks of an expert-parallel group must checkpoint a layer in the same way.

    The first call changes three functions of DeepSpeed, and two of AutoEP if it is in use; outside
    of checkpointed functions they behave as before. Source: ``MOELayer.forward`` in DeepSpeed's
    ``moe/sharded_moe.py``, ``AutoEPMoELayer`` in its ``module_inject/auto_ep_layer.py``, and
    ``context_fn`` of ``torch.utils.checkpoint.checkpoint``.

    Args:
        function: is called, and later called again, with ``args`` and ``kwargs``.
        args: tensors, or any other objects.
        context_fn: as of torch's checkpoint: makes one context for the forward pass and one
            for the recomputation, such as those of ``create_selective_checkpoint_contexts``.
            They enclose ours.
        kwargs: arguments of ``function``, and those of torch's checkpoint
            (``preserve_rng_state``, ``determinism_check``, ``debug``, ``early_stop``).

    Returns:
        What ``function`` returns.

    Raises:
        InvalidArgumentError: ``use_reentrant=True``, which recomputes in another way.
        RecomputationError: in the backward pass: the function ran other collectives than in the
            forward pass, or changed a kept result in place.
        UnsupportedDeepSpeedError: this DeepSpeed lacks a function that is needed; nothing
            has been changed.

    Example:
        >>> for block in self.blocks:
        ...     x, aux_loss = checkpoint_activations(block, x)            # doctest: +SKIP
    """
    if kwargs.pop("use_reentrant", False):
        raise InvalidArgumentError(
            "checkpoint_activations cannot keep results with use_reentrant=True: leave the "
            "argument out."
        )
    support_kept_collectives()
    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, context_fn=lambda: _contexts(context_fn), **kwargs
    )


def _contexts(given: Callable[[], Contexts] | None) -> Contexts:
    results: list[Result] = []
    keep, replay = KeepPass(results), ReplayPass(results)
    if given is None:
        return keep, replay
    both = given()
    check("context_fn()", both, Contexts)
    forward, recompute = both
    return _Both(forward, keep), _Both(recompute, replay)


class _Both:
    """Two context managers as one that can be entered again."""

    def __init__(self, *contexts: contextlib.AbstractContextManager[Any]) -> None:
        self.contexts = contexts
        self.entered = contextlib.ExitStack()

    def __enter__(self) -> None:
        for context in self.contexts:
            self.entered.enter_context(context)

    def __exit__(self, *error: Any) -> bool:
        return bool(self.entered.__exit__(*error))
