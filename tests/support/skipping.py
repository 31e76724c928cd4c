"""MoE layers with a conditional path: an expert may run on one rank and not on another.

DeepSpeed's own dispatch gives every expert padded tokens, so each expert has a gradient;
other expert layers do not guarantee that.
"""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE

from moe_groups import MoE
from tests.support.training import groups_by, start, train, weights

History = dict[str, list[float]]


class _Skipping:
    """Sums the local experts in ``used``; the others run with a zero gradient or not at all."""

    used: ClassVar[Collection[int]] = ()
    explicit_zeros: ClassVar[bool] = False

    def forward(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        out = x + x.new_zeros((), requires_grad=True)  # so the loss has a graph if no expert runs
        for number, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts):
            if number in _Skipping.used:
                out = out + expert(x)
            elif _Skipping.explicit_zeros:
                out = out + 0 * expert(x)
        return out, x.new_zeros(()), None


class SkippingMoE(_Skipping, MoE):
    """Our layer with a conditional path."""


class StockSkippingMoE(_Skipping, DeepSpeedMoE):
    """DeepSpeed's layer with a conditional path."""


def skip(ranks: Collection[int], used: Collection[int], explicit_zeros: bool = False) -> None:
    """From now on ``ranks`` run only the local experts ``used``; other ranks run all experts."""
    _Skipping.used = used if torch.distributed.get_rank() in ranks else range(100)
    _Skipping.explicit_zeros = explicit_zeros


def train_skipping(
    wrapper: str,
    split: str,
    ep_size: int,
    skips: Collection[int],
    used: Collection[int],
    explicit_zeros: bool = False,
    experts_only: bool = False,
    **changes: Any,
) -> tuple[History, dict[str, torch.Tensor]]:
    """Train 3 steps after :func:`skip`; ``experts_only`` freezes all dense parameters.

    ``changes`` are entries of the config.
    """
    skip(skips, used, explicit_zeros)
    layer = StockSkippingMoE if split == "stock" else SkippingMoE

    def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
        for param in model.parameters():
            param.requires_grad_(not experts_only or hasattr(param, "allreduce"))
        return groups_by(split)(model)

    options = {"ep_size": ep_size}
    engine = start(wrapper, groups_of, layer=layer, model_options=options, **changes)
    return train(engine, 3), weights(engine)
