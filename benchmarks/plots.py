"""Plots of the benchmarks, into ``results/``."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.report import RESULTS

# Distinct to colour-blind readers; every plot uses this order.
COLOURS = ("#9e9e9e", "#d55e00", "#e69f00", "#56b4e9", "#0072b2", "#009e73")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), sharey=columns > 1)
    for axis in [axes] if columns == 1 else axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return pyplot, figure, axes


def _save(pyplot: Any, figure: Any, name: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def grouped_bars(name: str, bars: Mapping[str, Mapping[str, float]], title: str) -> None:
    """A cluster for each key of ``bars``, a bar for each of its values."""
    pyplot, figure, axis = _figure(11, 4.4)
    series = list(next(iter(bars.values())))
    width = 0.8 / len(series)
    for number, one in enumerate(series):
        places = [index + (number - (len(series) - 1) / 2) * width for index in range(len(bars))]
        heights = [values[one] for values in bars.values()]
        axis.bar(places, heights, 0.92 * width, label=one, color=COLOURS[number])
    axis.set_xticks(
        range(len(bars)), [key.replace(", ", ",\n").replace("6_Opt", "6_\nOpt") for key in bars]
    )
    axis.set_title(title, loc="left", fontsize=11)
    axis.legend(ncols=len(series), frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    _save(pyplot, figure, name)


def lines(
    name: str,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    title: str,
    labels: tuple[str, str],
    points: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    base: int = 2,
) -> None:
    """A panel for each key of ``panels``, with its curves; ``points`` are drawn on top.

    Args:
        base: base of the logarithmic x axis.
    """
    pyplot, figure, axes = _figure(4.2 * len(panels) + 0.6, 4.0, len(panels))
    for axis, (panel, curves) in zip(
        [axes] if len(panels) == 1 else axes, panels.items(), strict=True
    ):
        for number, (curve, places) in enumerate(curves.items()):
            style = {"color": COLOURS[number], "lw": 3.2 - 0.5 * number}  # some curves coincide
            axis.plot(*zip(*places, strict=True), "o-", ms=3, label=curve, **style)
        for number, (label, found) in enumerate((points or {}).items()):
            if label == panel:
                name_ = "measured" if number == 0 else None
                axis.plot(*zip(*found, strict=True), "kx", ms=7, label=name_)
        axis.set_xscale("log", base=base)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel(labels[0])
    first = axes if len(panels) == 1 else axes[0]
    first.set_ylabel(labels[1])
    handles, names = first.get_legend_handles_labels()
    figure.legend(
        handles, names, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.0)
    )
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    _save(pyplot, figure, name)


def curves(
    name: str, panels: Mapping[str, Mapping[str, Sequence[float]]], title: str, x_label: str
) -> None:
    """A panel for each key; the first curve is wide, so that others on top of it are visible."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6))
    for axis, (panel, lines_) in zip(axes, panels.items(), strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        for number, (curve, values) in enumerate(lines_.items()):
            style: dict[str, Any] = {"color": "#c8c8c8", "lw": 7}
            if number:
                dash = (0, (3, 2)) if number > len(COLOURS) - 1 else "-"
                colour = COLOURS[1 + (number - 1) % (len(COLOURS) - 1)]
                style = {"color": colour, "lw": 1.2, "ls": dash}
            axis.plot(range(1, len(values) + 1), values, label=curve, **style)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel(x_label)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, names, ncols=5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0.0)
    )
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    _save(pyplot, figure, name)


def bands(
    name: str,
    runs: Mapping[str, Sequence[Sequence[float]]],
    title: str,
    labels: tuple[str, str],
    window: int,
) -> None:
    """A line for each key, the mean of its runs, in a band from the lowest to the highest run.

    Args:
        runs: by the line's label, the numbers of each step of each run.
        window: each point is the mean of so many steps up to it.
    """
    pyplot, figure, axis = _figure(8.6, 4.4)
    for number, (label, every) in enumerate(runs.items()):
        smooth = [
            [fmean(run[max(0, step - window) : step]) for step in range(1, len(run) + 1)]
            for run in every
        ]
        points = list(zip(*smooth, strict=True))
        steps = range(1, len(points) + 1)
        style: dict[str, Any] = {"color": COLOURS[number], "lw": 1.8}
        axis.plot(steps, [fmean(point) for point in points], label=label, **style)
        low, high = [*map(min, points)], [*map(max, points)]
        axis.fill_between(steps, low, high, color=COLOURS[number], alpha=0.18, lw=0)
    axis.set_xlim(1, len(points))
    axis.set_ylim(1, None)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(title, loc="left", fontsize=11)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    _save(pyplot, figure, name)
