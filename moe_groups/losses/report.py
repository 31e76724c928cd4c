"""What :class:`LossTracker` reports: of each layer, and of all layers together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moe_groups._common.arguments import checked


@dataclass(frozen=True)
class LayerBalance:
    """What a layer's router did since the last report, over all ranks and micro-batches.

    Attributes:
        loss: mean of the layer's load-balancing loss over forward passes, without a coefficient;
            NaN if the router computes none (AutoEP, transformers).
        shares: each expert's share of all assignments; their sum is 1.
        dropped: share of all assignments that exceeded the capacity of their expert; NaN if the
            experts have no capacity.
        counts: assignments to each expert, exact up to 16 million; those of one token count on
            each of its tensor-parallel ranks.
        entropy: of the softmax of the router's logits in nats, mean over the tokens: between 0 and
            ``log(experts)``. NaN if the logits are not known.
    """

    loss: float
    shares: tuple[float, ...]
    dropped: float
    counts: tuple[int, ...]
    entropy: float

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert, divided by the mean load: 1 if all loads are equal."""
        return max(self.shares) * len(self.shares)

    @property
    def dead_experts(self) -> int:
        """How many experts got no token."""
        return self.shares.count(0.0)


@dataclass(frozen=True)
class BalanceReport:
    """The report of :meth:`LossTracker.step`, the same on all ranks.

    Attributes:
        step: optimizer steps so far.
        total: mean loss that was trained on, auxiliary losses included.
        lm: the same without auxiliary losses.
        aux: the coefficient times the sum of the layers' mean losses; exact if each layer runs
            once in a micro-batch.
        layers: by label, or by module path without a label; in the order of the model.
    """

    step: int
    total: float
    lm: float
    aux: float
    layers: Mapping[str, LayerBalance]

    @checked
    def as_dict(self, per_expert: bool = False, per_layer: bool = False) -> dict[str, float]:
        """Names and numbers for a logger, without those that there are not.

        Args:
            per_expert: add each expert's share, and the numbers of each layer.
            per_layer: add the numbers of each layer.
        """
        values = {"loss/total": self.total, "loss/lm": self.lm, "loss/aux": self.aux}
        values |= {f"moe/{name}": value for name, value in over_layers(self.layers).items()}
        for name, layer in self.layers.items() if per_layer or per_expert else ():
            values |= {f"{key}/{name}": value for key, value in numbers_of(layer).items()}
            if per_expert:
                shares = enumerate(layer.shares)
                values |= {f"share/{name}/expert_{number}": share for number, share in shares}
        return {name: value for name, value in values.items() if not math.isnan(value)}


def numbers_of(layer: LayerBalance) -> dict[str, float]:
    """The numbers of one layer, by name; NaN for those that there are not."""
    return {
        "imbalance": layer.imbalance,
        "dropped": layer.dropped,
        "dead_experts": layer.dead_experts,
        "aux_loss": layer.loss,
        "entropy": layer.entropy,
    }


def over_layers(layers: Mapping[str, LayerBalance]) -> dict[str, float]:
    """The numbers of all layers: the worst imbalance, all dead experts, and else the mean."""
    every = [numbers_of(layer) for layer in layers.values()]

    def known(name: str) -> list[float]:
        return [one[name] for one in every if not math.isnan(one[name])]

    means = {
        name: sum(known(name)) / len(known(name)) if known(name) else math.nan
        for name in ("dropped", "aux_loss", "entropy")
    }
    worst, dead = max(known("imbalance")), sum(known("dead_experts"))
    return {"imbalance": worst, "dead_experts": dead} | means
