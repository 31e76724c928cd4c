"""Balance experts without a loss: a bias for each expert, in the choice of experts alone.

As in arXiv 2408.15664: the router chooses by its scores plus the bias, and weights the chosen
experts by the scores alone. After each step the bias of an expert with more than the mean load
falls, and that of one with less rises.
"""

import weakref
from typing import Any

import torch
from torch import distributed, nn

from moe_groups._common.arguments import NotNegative, Positive, checked
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups._deepspeed.engines import Engine, InitializedEngine, engine_data_parallel_group
from moe_groups._deepspeed.layers import bias_problem, give_bias, is_autoep_layer
from moe_groups._deepspeed.step.around_step import after_step
from moe_groups.errors import InvalidArgumentError
from moe_groups.losses.routers import Passes, Router, find_routers, recomputes

_CORRECTION = "e_score_correction_bias"
_BALANCED: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Engines whose experts are balanced."""
_NEVER = 1 << 63


@checked
def balance_experts(
    engine: InitializedEngine,
    rate: NotNegative = 1e-3,
    *,
    zero_mean: bool = False,
    first_step: Positive = 1,
    last_step: Positive | None = None,
) -> "ExpertBalancer":
    """Keep the loads of experts balanced without a loss, by a bias in the choice of experts.

    After each optimizer step, ``bias += rate * sign(mean load - load)`` with the assignments of
    all data-parallel ranks and micro-batches of the step. The weights of the chosen experts and the
    gradients do not contain the bias. A step that DeepSpeed skips changes nothing, and neither
    repetitions by activation checkpointing nor evaluation count.

    Works for DeepSpeed's ``MoE`` layers (ours too), for AutoEP's, and for routers of
    ``transformers`` with an ``e_score_correction_bias`` (DeepSeek-V3, GLM-4, dots1 and others),
    which keep their own bias. DeepSpeed's gate gets the bias on its logits, which multiplies the
    softmax's scores by ``exp(bias)``; the paper adds it to scores, as the others here do. On scores
    the noise of ``top1gating`` and ``top2gating`` (``sharded_moe.py``), which draws experts by
    adding Gumbel noise to logits, would no longer draw from a softmax; on logits it draws from the
    biased one.

    Biases are fp32 buffers of the model, so checkpoints have them; from one without them they
    begin at 0. Call it on all ranks before ``engine.load_checkpoint``.

    Args:
        engine: from ``deepspeed.initialize``.
        rate: how much a step changes each bias. Scores are between 0 and 1; logits of DeepSpeed's
            gate may differ by several units, so begin with 0.1 there.
        zero_mean: subtract the mean bias of the layer after each change.
        first_step: the first optimizer step of the engine that changes biases, after a warm-up.
        last_step: the last one; None is never.

    Returns:
        The balancer: it has the biases by layer, and its ``close`` ends the changes.

    Raises:
        InvalidArgumentError: there is no router, or one takes no bias (those of ``transformers``
            without AutoEP that have none, layers on Tutel, gates of another class), or the engine's
            experts are balanced already. Nothing has been changed then.

    Example:
        >>> balance_experts(engine, rate=1e-3, first_step=100)     # doctest: +SKIP
        >>> for batch in batches:                                  # doctest: +SKIP
        ...     engine.backward(engine(**batch).loss)
        ...     engine.step()
    """
    if engine in _BALANCED:
        raise InvalidArgumentError(
            "balance_experts: the experts of this engine are balanced already: close that balancer "
            "before you make another."
        )
    routers = find_routers(engine.module)
    problem = next(filter(None, map(_problem, routers)), None)
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, (len(routers), problem))  # stages may differ
    problem = next((text for _, text in everywhere if text), None)
    if not any(count for count, _ in everywhere):
        problem = "found no router of DeepSpeed's MoE, AutoEP or transformers in the model."
    if problem is not None:
        raise InvalidArgumentError(f"balance_experts {problem}")
    support_our_groups(moe=True)  # so that load_checkpoint knows the biases
    return ExpertBalancer(
        engine, routers, rate, zero_mean, range(first_step, (last_step or _NEVER) + 1)
    )


class ExpertBalancer:
    """Changes the biases of :func:`balance_experts` after each step."""

    def __init__(
        self, engine: Engine, routers: list[Router], rate: float, zero_mean: bool, steps: range
    ) -> None:
        self._engine, self._rate, self._zero_mean, self._steps = engine, rate, zero_mean, steps
        self._owners = {router.label: _give_bias(router) for router in routers}
        width = max((router.experts for router in routers), default=0)
        self._counts = torch.zeros(len(routers), width, dtype=torch.long, device=engine.device)
        self._passes = Passes(engine.module)
        handles = [
            router.module.register_forward_hook(self._counter(router, row))
            for router, row in zip(routers, self._counts, strict=True)
        ]
        after = after_step(engine, self._step)
        self._undo = [after, self._passes.remove, *(handle.remove for handle in handles)]
        _BALANCED.add(engine)

    @property
    def biases(self) -> dict[str, torch.Tensor]:
        """By the label of the layer, the bias of each expert over all ranks."""
        return {label: owner.get_buffer(name) for label, (owner, name) in self._owners.items()}

    def _counter(self, router: Router, row: torch.Tensor) -> Any:
        @torch.no_grad()
        def count(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self._passes.trains(module) and not recomputes():
                counts = router.read(outputs).counts
                row[: len(counts)].add_(counts)

        return count

    @torch.no_grad()
    def _step(self, skipped: bool) -> None:
        """After an optimizer step, on all ranks; integers, so that equal loads have no sign."""
        if not skipped and self._engine.global_steps in self._steps and len(self._counts):
            distributed.all_reduce(self._counts, group=engine_data_parallel_group(self._engine))
            for bias, row in zip(self.biases.values(), self._counts, strict=True):
                counts = row[: len(bias)]
                bias += self._rate * (counts.sum() - counts * len(bias)).sign()
                if self._zero_mean:
                    bias -= bias.mean()
        self._counts.zero_()

    def close(self) -> None:
        """End the changes; the biases stay in the model, and in its choice of experts."""
        for undo in self._undo:
            undo()
        self._undo.clear()
        _BALANCED.discard(self._engine)


def _problem(router: Router) -> str | None:
    """Why a router takes no bias; None if it does."""
    if is_autoep_layer(router.layer) and getattr(router.module, _CORRECTION, None) is None:
        return None
    if router.has_loss:
        problem = bias_problem(router.layer)
        return None if problem is None else f"cannot balance {router.label!r}: {problem}."
    bias = router.module._buffers.get(_CORRECTION)
    if bias is not None and bias.shape == (router.experts,):
        return None
    return (
        f"cannot balance {router.label!r}: {type(router.module).__name__} has no buffer "
        f"{_CORRECTION} of {router.experts} numbers, and does not run under AutoEP, which gives "
        'routers a bias: set "expert_parallel": {"enabled": true, "autoep_size": 1} in the '
        "DeepSpeed config."
    )


def _give_bias(router: Router) -> tuple[nn.Module, str]:
    """The module with the router's bias and its name there, from now on in fp32.

    In bf16 a bias of 1 would not change by 0.001.
    """
    bias = router.module._buffers.get(_CORRECTION)
    if bias is None:
        return give_bias(router.layer)
    router.module._buffers[_CORRECTION] = bias.float()
    return router.module, _CORRECTION
