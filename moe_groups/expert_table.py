"""The norms of each expert, or of each layer's experts, as a table."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_groups.checkpoint_report import CheckpointReport, SavedExpert
from moe_groups.rich_tables import MOST_ROWS, new_table, say_hidden

if TYPE_CHECKING:
    from rich.table import Table

_MOST_LAYERS = 64
_LONG_LABEL = 20


def expert_table(report: CheckpointReport, everything: bool) -> "Table":
    """A row for each expert, or for each layer where there are many and not all are asked for."""
    if everything or len(report.experts) <= MOST_ROWS:
        return _each_expert(report)
    return _each_layer(report)


def _norm_names(report: CheckpointReport) -> list[str]:
    return list(dict.fromkeys(name for row in report.experts for name in row.norms))


def _each_expert(report: CheckpointReport) -> "Table":
    norms = _norm_names(report)
    several = report.model_parallel_size > 1
    head = ["layer", *([">model rank"] if several else []), ">expert", ">elements"]
    table = new_table(_title(norms), [*head, *(f">{name}" for name in norms)])
    for row in report.experts:
        cells = [row.layer or "dense"] + ([str(row.model_rank)] if several else [])
        cells += [_expert_name(row), f"{row.elements:,}"]
        table.add_row(*cells, *(_norm(row.norms.get(name)) for name in norms))
    return table


def _title(norms: Sequence[str]) -> str:
    return "Experts" + (": L2 norms of weights and optimizer state" if norms else "")


def _expert_name(row: SavedExpert) -> str:
    if row.layer is None:
        return ""
    if row.expert is not None:
        return str(row.expert)
    return "all" if row.ep_rank is None else f"EP rank {row.ep_rank}"


def _each_layer(report: CheckpointReport) -> "Table":
    """A row for each layer, with the norms' range over its experts."""
    layers: dict[tuple[int, str | None], list[SavedExpert]] = {}
    for row in report.experts:
        layers.setdefault((row.model_rank, row.layer), []).append(row)
    norms = _norm_names(report)
    title = _title(norms) + ", least to most of an expert" * bool(norms)
    start, end = common_ends([row.layer for row in report.experts if row.layer is not None])
    if start or end:
        title += f"\nlayer: {start}*{end}"
    head = ["layer", ">experts", ">elements", *(f">{name}" for name in norms)]
    table = new_table(title, head)
    shown = list(layers.items())[:_MOST_LAYERS]
    for (model, layer), rows in shown:
        name = "dense" if layer is None else layer[len(start) : len(layer) - len(end)]
        name += f" (model rank {model})" if report.model_parallel_size > 1 else ""
        count = "" if layer is None else f"{len(rows):,}"
        table.add_row(
            name,
            count,
            f"{sum(row.elements for row in rows):,}",
            *(_range([row.norms.get(norm) for row in rows]) for norm in norms),
        )
    say_hidden(table, len(layers) - len(shown))
    return table


def common_ends(labels: Sequence[str]) -> tuple[str, str]:
    """What long labels begin and end with, all of them: whole components with their dots."""
    if max(map(len, labels), default=0) <= _LONG_LABEL or len(set(labels)) < 2:
        return "", ""
    parts = [label.split(".") for label in labels]
    start = _shared([row[:-1] for row in parts])  # one component is left of each
    end = _shared([row[: len(start) : -1] for row in parts])[::-1]
    return "".join(f"{part}." for part in start), "".join(f".{part}" for part in end)


def _shared(rows: Sequence[Sequence[str]]) -> list[str]:
    """What all rows begin with."""
    columns = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*rows, strict=False))
    return [column[0] for column in columns]


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if any(map(math.isnan, known)):
        return "nan"
    low, high = _norm(min(known)), _norm(max(known))
    return low if low == high else f"{low} to {high}"


def _norm(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    if 1000 <= value < 1e7:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")
