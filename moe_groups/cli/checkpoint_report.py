"""What the commands for checkpoints print: tables of groups and experts, and problems."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_groups._common.text import show_bytes
from moe_groups.checkpoints.inspect.report import CheckpointReport, SavedExpert, SavedGroup
from moe_groups.cli.render import (
    MOST_ROWS,
    name_pattern,
    new_table,
    print_with,
    same_but_numbers,
    say_hidden,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_MOST_LAYERS = 64
_LONG_LABEL = 20


def expert_table(report: CheckpointReport, everything: bool) -> "Table":
    """A row for each expert, or for each layer if there are many experts and not ``everything``."""
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
    """A row for each layer, with the range of the norms over its experts."""
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
    """The components, with their dots, with which all of the labels begin and end, if long."""
    if max(map(len, labels), default=0) <= _LONG_LABEL or len(set(labels)) < 2:
        return "", ""
    parts = [label.split(".") for label in labels]
    start = _shared([row[:-1] for row in parts])  # leaves one component of each
    end = _shared([row[: len(start) : -1] for row in parts])[::-1]
    return "".join(f"{part}." for part in start), "".join(f".{part}" for part in end)


def _shared(rows: Sequence[Sequence[str]]) -> list[str]:
    """The items with which all rows begin."""
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


_MOST_PROBLEMS = 20


def print_report(report: CheckpointReport, everything: bool = False) -> None:
    """Print tables for a terminal or a file of 100 columns, with the problems last.

    Args:
        report: the report on a checkpoint.
        everything: print a row for every group and expert, and every problem.
    """
    print_with(lambda console: _print(report, console, everything))


def _print(report: CheckpointReport, console: "Console", everything: bool) -> None:
    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    say(report.headline())
    say(_saved_by(report))
    tables = [_groups(report, everything)] if report.groups else []
    tables += [expert_table(report, everything)] if report.experts else []
    for table in tables:
        console.print()
        console.print(table, highlight=False)
    console.print()
    for note in report.notes:
        say(f"note: {note}")
    say(report.verdict(), "bold red" if report.problems else "bold green")
    for line in report.lines(None if everything else _MOST_PROBLEMS):
        say(line)


def _saved_by(report: CheckpointReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    source = "moe_groups.json" if report.manifest else "DeepSpeed's files (no moe_groups.json)"
    return f"saved by {versions or 'unknown versions'}; groups read from {source}"


def _groups(report: CheckpointReport, everything: bool) -> "Table":
    columns = (">groups", ">params", ">elements", ">ranks", ">bytes", ">lr", ">decay", "name")
    folds = [[group] for group in report.groups]
    title = f"{len(folds):,} groups (bytes: fp32 weights and optimizer state on all ranks)"
    if len(folds) > MOST_ROWS and not everything:
        folds = fold(report.groups)
    table = new_table(title, columns)
    shown = folds if everything else folds[:MOST_ROWS]
    for rows in shown:
        table.add_row(*_group_cells(rows))
    say_hidden(table, sum(map(len, folds[len(shown) :])))
    return table


def fold(groups: Sequence[SavedGroup]) -> list[list[SavedGroup]]:
    """Lists of groups that share a row of the table."""
    return same_but_numbers(
        groups, lambda g: (len(g.ranks), _option(g, "lr"), _option(g, "weight_decay"))
    )


def _group_cells(rows: Sequence[SavedGroup]) -> list[str]:
    first = rows[0]
    return [
        f"{len(rows):,}",
        f"{sum(row.parameters for row in rows):,}",
        f"{sum(row.elements for row in rows):,}",
        str(len(first.ranks)),
        show_bytes(sum(row.state_bytes for row in rows)),
        _option(first, "lr"),
        _option(first, "weight_decay"),
        name_pattern([row.name for row in rows]) + _experts_of(rows),
    ]


def _option(group: SavedGroup, name: str) -> str:
    value = group.options.get(name)
    return f"{value:g}" if isinstance(value, int | float) else "" if value is None else str(value)


def _experts_of(rows: Sequence[SavedGroup]) -> str:
    """Global numbers of the experts; the names of the groups have local ones."""
    experts = sorted({expert for row in rows for expert in row.experts})
    if not experts:
        return ""
    whole = experts == list(range(experts[0], experts[-1] + 1)) and len(experts) > 2
    text = f"{experts[0]}-{experts[-1]}" if whole else ", ".join(map(str, experts[:8]))
    text += ", ..." if not whole and len(experts) > 8 else ""
    return f" (expert{'s' * (len(experts) > 1)} {text})"
