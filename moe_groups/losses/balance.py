"""Losses that make a router spread tokens over its experts, for DeepSpeed's gate or any other.

All are computed in fp32 and are 0-dimensional. The caller multiplies by a coefficient: add
``coefficient * loss`` to the language-model loss, or attach it in the layer
(:func:`attach_loss`).
"""

from typing import Literal, TypeAlias

import torch
from torch import distributed

from moe_groups._common.arguments import checked
from moe_groups.errors import InvalidArgumentError

Balance: TypeAlias = Literal["batch", "sequence"]


@checked
def load_balancing_loss(
    probs: torch.Tensor,
    assigned: torch.Tensor,
    *,
    balance: Balance = "batch",
    mask: torch.Tensor | None = None,
    group: "distributed.ProcessGroup | None" = None,
) -> torch.Tensor:
    """The Switch / GShard load-balancing loss; 1 if all experts get the same share.

    With E experts, k assignments of each of T tokens, ``f_e`` the share of all assignments to
    expert e and ``P_e`` the mean probability of expert e::

        loss = E * sum_e f_e * P_e,    f_e = 1/(k T) * sum_t [e assigned to t],
                                       P_e = 1/T * sum_t probs[t, e]

    Only ``P_e`` has a gradient. For k = 1 it is equation 4 of Switch Transformers (arXiv
    2101.03961) and the ``l_aux`` of DeepSpeed's ``top1gating``; for k > 2 that of its
    ``topkgating``. DeepSpeed's ``top2gating`` counts only the first choice, as GShard does (arXiv
    2006.16668, algorithm 1): pass that choice as ``assigned``. Hugging Face's
    ``load_balancing_loss_func`` is k times this loss.

    Args:
        probs: probabilities over the experts, of shape (..., E): (tokens, E), or with the batch
            first (batch, sequence, E), for all experts and not only the chosen ones.
        assigned: the chosen experts: indices of shape (..., k) with k < E, where a negative one
            stands for a dropped assignment, or a bool mask of shape (..., E).
        balance: "batch" balances over all tokens; "sequence" balances each sequence, and takes
            the mean (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20): ``probs`` must have
            three dimensions.
        mask: True for tokens that count, of shape (...); None for all.
        group: ranks over which ``f_e`` is averaged, to balance the whole batch instead of each
            rank's part (arXiv 2501.11873). All of them call it; only for "batch".

    Raises:
        InvalidArgumentError: shapes do not fit.
    """
    chosen = _as_mask(probs, assigned)
    counted = _as_weights(probs, mask)
    if balance == "sequence" and probs.dim() != 3:
        raise InvalidArgumentError(
            f'balance="sequence" needs probs of shape (batch, sequence, experts), not '
            f"{tuple(probs.shape)}."
        )
    if balance == "sequence" and group is not None:
        raise InvalidArgumentError('group is for balance="batch": a sequence is on one rank.')
    if balance == "batch":
        chosen, counted = chosen.flatten(0, -2), counted.flatten()
        probs = probs.flatten(0, -2)
    weights = counted.unsqueeze(-1)
    tokens = weights.sum(-2)
    assignments = (chosen * weights).sum(-2)
    total = assignments.sum(-1, keepdim=True)
    if group is not None:
        both = torch.cat([assignments, total])
        distributed.all_reduce(both, group=group)
        assignments, total = both[:-1], both[-1:]
    share = assignments / total.clamp(min=1)
    mean = (probs.float() * weights).sum(-2) / tokens.clamp(min=1)
    losses = probs.shape[-1] * (share * mean).sum(-1)
    counts = (tokens.squeeze(-1) > 0).float()  # a sequence of padding only does not count
    return (losses * counts).sum() / counts.sum().clamp(min=1)


@checked
def router_z_loss(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The router z-loss, which keeps logits small: ``mean_t (logsumexp_e logits[t, e])**2``.

    ST-MoE (arXiv 2202.08906), equation 5; its coefficient there is 0.001.

    Args:
        logits: of shape (..., E), before the softmax.
        mask: True for tokens that count, of shape (...); None for all.

    Raises:
        InvalidArgumentError: shapes do not fit.
    """
    weights = _as_weights(logits, mask)
    squares = torch.logsumexp(logits.float(), -1).square()
    return (squares * weights).sum() / weights.sum().clamp(min=1)


def _as_mask(probs: torch.Tensor, assigned: torch.Tensor) -> torch.Tensor:
    """1.0 for each expert that a token was assigned to, of shape (..., E)."""
    if probs.dim() < 2 or assigned.shape[:-1] != probs.shape[:-1]:
        raise InvalidArgumentError(
            f"probs of shape {tuple(probs.shape)} and assigned of shape {tuple(assigned.shape)} do "
            "not fit: expected (..., experts) and (..., k), or a bool mask of probs' shape."
        )
    if assigned.dtype == torch.bool:
        if assigned.shape != probs.shape:
            raise InvalidArgumentError(
                f"assigned is a mask of shape {tuple(assigned.shape)}, probs has "
                f"{tuple(probs.shape)}."
            )
        return assigned.float()
    if assigned.is_floating_point():
        raise InvalidArgumentError(
            f"assigned has dtype {assigned.dtype}: give indices of experts, or a bool mask."
        )
    if assigned.shape == probs.shape:
        raise InvalidArgumentError(
            f"assigned has dtype {assigned.dtype} and probs' shape {tuple(probs.shape)}: give a "
            "one-hot mask as assigned.bool(); where every expert is chosen, nothing is balanced."
        )
    on_host = assigned.device.type == "cpu"  # reading a GPU's numbers would block
    largest = int(assigned.max()) if on_host and assigned.numel() else 0
    if not 0 <= largest < probs.shape[-1]:
        raise InvalidArgumentError(
            f"assigned names expert {largest}, but probs has {probs.shape[-1]}."
            if largest > 0
            else "assigned has no expert: all of it is negative, which stands for dropped."
        )
    chosen = probs.new_zeros(*probs.shape[:-1], probs.shape[-1] + 1, dtype=torch.float32)
    places = torch.where(assigned < 0, probs.shape[-1], assigned.long())
    chosen.scatter_add_(-1, places, torch.ones_like(places, dtype=torch.float32))
    return chosen[..., :-1]


def _as_weights(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return torch.ones(values.shape[:-1], device=values.device)
    if mask.shape != values.shape[:-1]:
        raise InvalidArgumentError(
            f"mask of shape {tuple(mask.shape)} does not fit values of shape {tuple(values.shape)}."
        )
    return mask.float()
