"""Draw the trade-off curve of ``moe-groups plan``."""

import html
import io
import os
from typing import TYPE_CHECKING

from moe_groups._common.arguments import need
from moe_groups.cli.plan_report import headline
from moe_groups.errors import InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moe_groups.cli.plan import PlanReport

_MARKERS = {"stock": ("s", "tab:red"), "no_cap": ("^", "tab:orange"), "plan": ("*", "tab:green")}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>body {{ font-family: sans-serif; max-width: 60em; margin: 2em auto }}
svg {{ max-width: 100%; height: auto }}</style>
<h1>{title}</h1>
{picture}
<pre>{summary}</pre>
</html>
"""


def check_plot(path: str, *kinds: str) -> None:
    """Raise InvalidArgumentError if no plot of these kinds can be written to ``path``."""
    if os.path.splitext(path)[1].lower() not in kinds:
        raise InvalidArgumentError(f"--plot {path!r} must end in {' or '.join(kinds)}.")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise InvalidArgumentError(f"--plot {path!r}: there is no directory {folder!r}.")
    need("matplotlib", "plot", "plots")


def write_plot(report: "PlanReport", path: str) -> None:
    """Write the plot as a picture, or as an HTML page in one file."""
    figure = _draw(report)
    if path.lower().endswith(".png"):
        figure.savefig(path, format="png", dpi=120)
        return
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    summary = "\n".join([str(report.memory), *(f"hint: {hint}" for hint in report.hints)])
    page = _PAGE.format(
        title=html.escape(headline(report)),
        picture=svg[svg.index("<svg") :],
        summary=html.escape(summary),
    )
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def _draw(report: "PlanReport") -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    curve = [(point.groups, point.step_peak / 2**30) for point in report.curve]
    if curve:
        label = f"best found, split by {report.request.split_by}"
        axes.plot(*zip(*curve, strict=True), marker=".", color="tab:blue", label=label)
    lean = {point.groups: point.lean_peak / 2**30 for point in report.curve}
    lean |= {m.groups: m.lean_peak / 2**30 for m in report.marks if m.lean_peak is not None}
    if lean and report.request.step.lean_step is None:
        points = zip(*sorted(lean.items()), strict=True)
        axes.plot(*points, "--", marker=".", color="tab:purple", label="with lean_step")
    for mark in report.marks:
        marker, color = _MARKERS[mark.key]
        peak = mark.memory.step_peak / 2**30
        label = f"{mark.label}: {mark.groups} groups, {peak:.2f} GiB"
        size = 16 if mark.key == "plan" else 9
        (point,) = axes.plot([mark.groups], [peak], marker, label=label, color=color, zorder=3)
        point.set_markersize(size)
    groups = [mark.groups for mark in report.marks] + [number for number, _ in curve]
    if max(groups) > 20 * min(groups):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("groups")
    axes.set_ylabel("step peak T + R on the worst rank, GiB")
    axes.set_title(headline(report), fontsize=9, wrap=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure
