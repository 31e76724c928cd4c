"""What ``moe-groups inspect-checkpoint`` prints for people."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_groups.checkpoint_report import CheckpointReport, SavedGroup
from moe_groups.expert_table import expert_table
from moe_groups.rich_tables import MOST_ROWS, new_table, print_with, say_hidden
from moe_groups.units import show_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MOST_PROBLEMS = 20


def print_report(report: CheckpointReport, everything: bool = False) -> None:
    """Print tables for a terminal or a file of 100 columns; problems come last.

    Args:
        report: of a checkpoint.
        everything: a row for every group and expert, and every problem.
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
    """Groups that differ in numbers in their names alone together, in the order of the first."""
    alike: dict[Any, list[SavedGroup]] = {}
    for group in groups:
        words = tuple(re.split(r"\d+", group.name))
        key = words, len(group.ranks), _option(group, "lr"), _option(group, "weight_decay")
        alike.setdefault(key, []).append(group)
    return list(alike.values())


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


def name_pattern(names: Sequence[str]) -> str:
    """``layers.{0..31}.mlp`` for names that differ in a number."""
    words = re.split(r"\d+", names[0])
    numbers = zip(*(map(int, re.findall(r"\d+", name)) for name in names), strict=True)
    ranges = [(min(found), max(found)) for found in map(tuple, numbers)]
    shown = [str(low) if low == high else f"{{{low}..{high}}}" for low, high in ranges]
    return "".join(word + number for word, number in zip(words, [*shown, ""], strict=True))


def _experts_of(rows: Sequence[SavedGroup]) -> str:
    """Numbers over all ranks: names have those of one rank."""
    experts = sorted({expert for row in rows for expert in row.experts})
    if not experts:
        return ""
    whole = experts == list(range(experts[0], experts[-1] + 1)) and len(experts) > 2
    text = f"{experts[0]}-{experts[-1]}" if whole else ", ".join(map(str, experts[:8]))
    text += ", ..." if not whole and len(experts) > 8 else ""
    return f" (expert{'s' * (len(experts) > 1)} {text})"
