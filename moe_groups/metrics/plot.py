"""Draw a map of experts over layers: their gradients, norms, updates or learning rates."""

import math
import os
from typing import TYPE_CHECKING

from moe_groups._common.arguments import FilePath, checked, need
from moe_groups.errors import InvalidArgumentError
from moe_groups.metrics.report import Metric, MetricsReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = {
    "lr": "learning rate",
    "grad_norm": "gradient before clipping, L2 norm",
    "param_norm": "parameters, L2 norm",
    "update_ratio": "update / parameters, L2 norms",
}
_CELL = 0.2  # inches; a label of 7 points needs no more
_MOST = 32
"""Labels on an axis; of more cells only each second, fourth, ... is named."""


@checked
def write_expert_map(
    report: MetricsReport, path: FilePath, metric: Metric = "update_ratio"
) -> None:
    """Write a picture of one number of all experts: a row for each layer, a column for each expert.

    Colours are logarithmic. Experts that are not trained, or have a value of 0, stay white.

    Args:
        report: of :meth:`GroupMetrics.step`; one rank draws it.
        path: of the picture; its ending, such as ".png" or ".svg", selects the format.
        metric: "lr", "grad_norm", "param_norm" or "update_ratio".

    Raises:
        InvalidArgumentError: no such metric, no value of it in the report, no matplotlib
            (``pip install 'moe-groups[plot]'``), or the file cannot be written.

    Example:
        >>> write_expert_map(report, "experts.png", "grad_norm")             # doctest: +SKIP
    """
    need("matplotlib", "plot", "pictures")
    figure = draw_expert_map(report, metric)
    try:
        figure.savefig(os.fspath(path), dpi=130)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"path={str(path)!r} cannot be written: {error}") from error


def draw_expert_map(report: MetricsReport, metric: Metric) -> "Figure":
    """The picture as a figure of matplotlib."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows = _values(report, metric)
    known = [value for row in rows for value in row if not math.isnan(value)]
    if not known:
        raise InvalidArgumentError(
            f"the report has no {metric} of any expert: the layers do not separate their experts, "
            "or GroupMetrics was made with update_ratio=False."
        )
    label = max(map(len, report.layers)) * 0.06
    width, height = max(len(rows[0]) * _CELL, 2.4), max(len(rows) * _CELL, 2.4)
    figure = Figure(figsize=(width + label + 1.8, height + 1.0), layout="constrained")
    axes = figure.subplots()
    norm = LogNorm() if max(known) > 0 else None
    image = axes.imshow(rows, aspect="auto", interpolation="none", cmap="viridis", norm=norm)
    columns, lines = _labelled(len(rows[0])), _labelled(len(rows))
    names = list(report.layers)
    axes.set_xticks(columns, [str(column) for column in columns], fontsize=7)
    axes.set_yticks(lines, [names[line] for line in lines], fontsize=7)
    axes.set_xlabel("expert, numbered over all ranks", fontsize=8)
    axes.set_ylabel("MoE layer", fontsize=8)
    axes.set_title(f"step {report.step} (white: not trained, or 0)", fontsize=8)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(_LABELS[metric], fontsize=8)
    bar.ax.tick_params(which="both", labelsize=7)
    return figure


def _labelled(cells: int) -> range:
    step = 1
    while cells / step > _MOST:
        step *= 2
    return range(0, cells, step)


def _values(report: MetricsReport, metric: str) -> list[list[float]]:
    """A row for each layer, with NaN for what is not trained or not there."""
    width = max((len(layer.experts) for layer in report.layers.values()), default=0)
    rows = []
    for layer in report.layers.values():
        found = [getattr(stats, metric) if stats else math.nan for stats in layer.experts]
        rows.append([*found, *[math.nan] * (width - len(found))])
    return rows
