"""What :class:`GroupMetrics` reports: the numbers of one step by block, layer and expert."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from moe_groups._common.arguments import checked
from moe_groups.metrics.rows import Row
from moe_groups.metrics.sums import ELEMENTS, GRAD, LR, PARAM, UPDATE

Metric: TypeAlias = Literal["lr", "grad_norm", "param_norm", "update_ratio"]
METRICS: tuple[Metric, ...] = get_args(Metric)
"""Names of the numbers of a :class:`GroupStats` that are reported."""


@dataclass(frozen=True)
class GroupStats:
    """Numbers of one optimizer step, of all parameters of a block, a layer or an expert.

    Attributes:
        lr: learning rate of the step; if parameters differ, the mean over the elements.
        grad_norm: L2 norm of the gradient that is averaged over ranks and micro-batches, before
            clipping.
        param_norm: L2 norm of the parameters after the step, in the optimizer's precision.
        update_norm: L2 norm of the change by the step; NaN with ``update_ratio=False``.
        elements: trained elements, each counted once.
    """

    lr: float
    grad_norm: float
    param_norm: float
    update_norm: float
    elements: int

    @property
    def update_ratio(self) -> float:
        """Norm of the step's change, divided by the norm of the parameters."""
        return self.update_norm / self.param_norm if self.param_norm else self.update_norm


@dataclass(frozen=True)
class LayerStats:
    """The experts of one MoE layer.

    Attributes:
        total: of all its experts together.
        experts: of each expert, by its global number; None if no parameter of it is trained, or
            if the layer does not distinguish its experts.
    """

    total: GroupStats
    experts: tuple[GroupStats | None, ...]


@dataclass(frozen=True)
class MetricsReport:
    """The report of :meth:`GroupMetrics.step`, the same on all ranks.

    Attributes:
        step: optimizer steps so far.
        total: of all trained parameters; its ``grad_norm`` is DeepSpeed's global norm.
        dense: dense parameters by block, such as ``model.layers.3``.
        layers: experts by the label of their MoE layer.
    """

    step: int
    total: GroupStats
    dense: Mapping[str, GroupStats]
    layers: Mapping[str, LayerStats]

    @property
    def experts(self) -> GroupStats | None:
        """Of the experts of all layers together; None if none is trained."""
        layers = [layer.total for layer in self.layers.values()]
        elements = sum(one.elements for one in layers)
        if not elements:
            return None
        return GroupStats(
            lr=sum(one.lr * one.elements for one in layers) / elements,
            grad_norm=math.hypot(*(one.grad_norm for one in layers)),
            param_norm=math.hypot(*(one.param_norm for one in layers)),
            update_norm=math.hypot(*(one.update_norm for one in layers)),
            elements=elements,
        )

    @checked
    def as_dict(self, per_expert: bool = False) -> dict[str, float]:
        """Names and numbers for a logger; ``per_expert`` adds those of each expert.

        Names are like ``grad_norm/dense/blocks.3``, ``grad_norm/moe/blocks.3.moe`` and
        ``grad_norm/moe/blocks.3.moe/expert_5``. An ``update_ratio`` that is NaN is left out.
        """
        found = {"total": self.total}
        found |= {f"dense/{block}": stats for block, stats in self.dense.items()}
        for label, layer in self.layers.items():
            found[f"moe/{label}"] = layer.total
            if per_expert:
                experts = enumerate(layer.experts)
                found |= {f"moe/{label}/expert_{n}": stats for n, stats in experts if stats}
        values = {
            f"{metric}/{name}": getattr(stats, metric)
            for name, stats in found.items()
            for metric in METRICS
        }
        return {
            name: value
            for name, value in values.items()
            if not (name.startswith("update_ratio/") and math.isnan(value))
        }


def make_report(
    step: int, rows: Sequence[Row], sums: Sequence[Sequence[float]], updates: bool
) -> MetricsReport:
    """The report of the sums over all ranks, one line for each row."""
    found = dict(zip(rows, sums, strict=True))

    def stats(chosen: Iterable[Row]) -> GroupStats | None:
        lines = [found[row] for row in chosen]
        return _stats([sum(column) for column in zip(*lines, strict=True)], updates)

    layers: dict[str, list[Row]] = {}
    for row in rows:
        if row.moe:
            layers.setdefault(row.layer, []).append(row)
    total = stats(rows)
    assert total is not None
    return MetricsReport(
        step,
        total,
        {row.layer: one for row in rows if not row.moe and (one := stats([row]))},
        {
            layer: LayerStats(whole, tuple(stats([row]) for row in own if row.expert is not None))
            for layer, own in layers.items()
            if (whole := stats(own))
        },
    )


def _stats(sums: Sequence[float], updates: bool) -> GroupStats | None:
    if not (elements := sums[ELEMENTS]):
        return None
    return GroupStats(
        lr=sums[LR] / elements,
        grad_norm=sums[GRAD] ** 0.5,
        param_norm=sums[PARAM] ** 0.5,
        update_norm=sums[UPDATE] ** 0.5 if updates else math.nan,
        elements=round(elements),
    )
