"""DeepSpeed's gate with a bias that is added to its logits for the choice of experts only.

DeepSpeed's own functions choose from the logits plus the bias, so its noise, capacity, dropping and
random token selection follow them. Only the loss and the weights of the chosen experts are
computed again, without the bias, in the order of operations of ``sharded_moe.py``: with a bias of 0
the layer is bit-equal to DeepSpeed's.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from deepspeed.moe import sharded_moe
from torch import Tensor
from torch.nn import functional

from moe_groups._deepspeed.layers import GATE_BIAS
from moe_groups._deepspeed.patching import change_functions

_GATE: ContextVar[Any] = ContextVar("balanced gate that runs", default=None)


class BalancedGate(sharded_moe.TopKGate):
    """A ``TopKGate`` whose ``wg`` has a buffer with the bias."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's outputs."""
        before = _GATE.set(self)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _GATE.reset(before)


def give_gate_bias(layer: Any) -> None:
    """Give the gate of a ``MoE`` a bias of 0 for its choice; a bias that it has is kept, in fp32.

    The bias is a buffer of ``wg``, because DeepSpeed leaves names with "expert" inside of a layer
    out of checkpoints (``_get_non_moe_state_dict``, ``runtime/engine.py``), also if the layer's own
    path has that word, except those that contain ``moe.gate.wg.weight``.
    """
    gate = layer.deepspeed_moe.gate
    weight = gate.wg.weight
    given = gate.wg._buffers.get(GATE_BIAS)
    bias = (
        torch.zeros(gate.wg.out_features, device=weight.device) if given is None else given.float()
    )
    gate.wg.register_buffer(GATE_BIAS, bias)
    gate.__class__ = BalancedGate


def _chooses_with_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``top1gating``, ``top2gating`` or ``topkgating``."""

    def gating(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        gate = _GATE.get()
        if gate is None:
            return original(logits, *args, **kwargs)
        with torch.no_grad():
            biased = logits + getattr(gate.wg, GATE_BIAS)
            first = biased.softmax(1).argmax(1) if gate.k == 2 else None  # noise comes later
            _, *taken, counts = original(biased, *args, **kwargs)
        gates = functional.softmax(logits, dim=1)
        loss = _loss(gates, gate.k, first, counts.to(logits.device))
        if len(taken) == 2:  # before DeepSpeed 0.19, of shape (tokens, experts, capacity)
            dispatched = taken[1]
            weights = _weights(gates * dispatched.any(-1), gate.k)
            return loss, weights.unsqueeze(-1) * dispatched, dispatched, counts
        capacity, experts, indices, locations, _ = taken
        kept = indices >= 0  # of shape (k, tokens)
        places = torch.where(kept, indices, experts).long().t()
        mask = gates.new_zeros(len(gates), experts + 1).scatter_(1, places, 1.0)[:, :-1]
        weights = _weights(gates * mask, gate.k).gather(1, places.clamp(max=experts - 1))
        return (
            loss,
            capacity,
            experts,
            indices,
            locations,
            weights.t().contiguous() * kept,
            counts,
        )

    return gating


def _weights(masked: Tensor, k: int) -> Tensor:
    """Top-1 takes the probabilities as they are; more are divided by their sum."""
    if k == 1:
        return masked
    total = masked.sum(dim=-1, keepdim=True)
    return masked / total.clamp(min=torch.finfo(masked.dtype).eps)


def _loss(gates: Tensor, k: int, first: Tensor | None, counts: Tensor) -> Tensor:
    """The load-balancing loss; that of top-2 counts the first choices.

    It depends on how many tokens chose an expert, not on which: a mask with as many tokens has the
    same mean as DeepSpeed's, to the last bit.
    """
    tokens, experts = gates.shape
    if first is not None:
        assigned = functional.one_hot(first, experts)
    else:
        assigned = torch.arange(tokens, device=gates.device).unsqueeze(1) < counts
    shares = gates.mean(dim=0) * assigned.float().mean(dim=0)
    if k == 1:
        return shares.sum() * experts
    loss = shares.mean() * experts * experts
    return loss if k == 2 else loss / k


# Here, so that a gate of this class that is unpickled in a new process has them too.
change_functions(
    [
        ("deepspeed.moe.sharded_moe", name, _chooses_with_bias)
        for name in ("top1gating", "top2gating", "topkgating")
        if hasattr(sharded_moe, name)  # DeepSpeed before 0.15 has no top-k
    ],
    "balance_experts needs",
)
