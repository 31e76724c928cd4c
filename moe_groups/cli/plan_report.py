"""Print the result of ``moe-groups plan`` as tables or JSON."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_groups._common.text import show_bytes
from moe_groups.cli.render import MOST_ROWS, name_pattern, new_table, print_with, same_but_numbers

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moe_groups.cli.plan import PlanReport

_BAR = 24
_MOST_POINTS = 14


def headline(report: "PlanReport") -> str:
    """Model, topology and step."""
    asked, rank = report.request, report.rank
    total = "" if rank.total is None else f" ({_count(rank.total)})"
    experts = ", ".join(map(str, rank.ep_sizes)) or "1"
    stage = "" if rank.pp_rank is None or asked.pp_size == 1 else f", stage {rank.pp_rank}"
    return (
        f"{asked.source}{total} on {asked.world_size} ranks: DP {asked.data_parallel_size}, "
        f"EP {experts}, TP {asked.tp_size}, PP {asked.pp_size}{stage}; {asked.step.label}"
    )


# ---- JSON -----------------------------------------------------------------------------


def as_json(report: "PlanReport") -> str:
    """One JSON object; sizes in bytes, ``partition`` and ``elements`` in elements."""
    asked, rank, memory = report.request, report.rank, report.memory
    found = asdict(memory)
    del found["groups"], found["step"], found["data_parallel_size"]
    shown = {
        "source": asked.source,
        "topology": {
            "world_size": asked.world_size,
            "data_parallel_size": asked.data_parallel_size,
            "expert_parallel_sizes": rank.ep_sizes,
            "tensor_parallel_size": asked.tp_size,
            "pipeline_stages": asked.pp_size,
            "pipeline_stage": rank.pp_rank,
        },
        "parameters": {"model": rank.total, "rank": rank.held, "rank_experts": rank.in_experts},
        "step": asdict(asked.step),
        "split_by": asked.split_by,
        "memory": found,
        "groups": [asdict(row) for row in memory.groups],
        "curve": [asdict(point) for point in report.curve],
        "marks": {
            mark.key: {
                "label": mark.label,
                "groups": mark.groups,
                "step_peak": mark.memory.step_peak,
                "lean_peak": mark.lean_peak,
                "transient": mark.memory.transient,
                "held": mark.memory.held,
                "first_step_peak": mark.memory.first_step_peak,
            }
            for mark in report.marks
        },
        "hints": report.hints,
    }
    return json.dumps(shown, indent=2)


# ---- tables ---------------------------------------------------------------------------


def print_tables(report: "PlanReport") -> None:
    """Print the report, for a terminal or a file of 100 columns."""
    print_with(lambda console: _print(report, console))


def _print(report: "PlanReport", console: "Console") -> None:
    console.print(headline(report), markup=False, highlight=False, soft_wrap=True)
    for table in (_memory(report), _groups(report), _curve(report)):
        console.print()
        console.print(table, highlight=False)
    if report.hints:
        console.print()
    for hint in report.hints:
        console.print(f"hint: {hint}", markup=False, highlight=False, soft_wrap=True)


def _memory(report: "PlanReport") -> "Table":
    memory, rank = report.memory, report.rank
    table = new_table("Memory on the worst rank", ("", ">bytes", ""))
    resident = sum(memory.resident.values())
    experts = f"{_count(rank.held)} parameters, {_count(rank.in_experts)} of them in experts"
    rows: list[tuple[str, int, str]] = [("resident", resident, experts)]
    rows += [(f"  {kind}", size, "") for kind, size in memory.resident.items()]
    ranks, least = len(memory.rank_peaks), show_bytes(memory.least)
    spread = f"rank {memory.worst_rank} of {ranks}; the least needs {least}"
    cause = ", ".join(filter(None, (memory.phase, memory.group)))
    rows += [
        ("step peak T + R", memory.step_peak, spread),
        ("  T, transient", memory.transient, f"set by: {cause}"),
        ("  R, gradients", memory.held, "held when the step begins"),
        ("first step's peak", memory.first_step_peak, "creates the optimizer state"),
        ("resident + step peak", resident + memory.step_peak, ""),
    ]
    rows += [(f"host: {kind}", size, "") for kind, size in memory.host.items()]
    for name, size, note in rows:
        table.add_row(name, show_bytes(size), note, style=None if name[0] == " " else "bold")
    return table


def _groups(report: "PlanReport") -> "Table":
    memory = report.memory
    folds = same_but_numbers(memory.groups, lambda row: row.ranks)
    columns = (">groups", ">elements", ">ranks", ">partition", ">held, R", ">peak", "name")
    title = f"{len(memory.groups)} groups, split by {report.request.split_by}"
    same = len(folds) == len(memory.groups)
    table = new_table(title if same else f"{title} (each as its row's largest)", columns)
    width = memory.step.weight_bytes
    for rows in folds[:MOST_ROWS]:
        elements, partition, held, peak = (
            max(getattr(row, figure) for row in rows)
            for figure in ("elements", "partition", "held", "peak")
        )
        sizes = map(show_bytes, (partition * width, held, peak))
        name = name_pattern([row.name for row in rows])
        table.add_row(str(len(rows)), _count(elements), str(rows[0].ranks), *sizes, name)
    if rest := sum(map(len, folds[MOST_ROWS:])):
        table.add_row(str(rest), *[""] * 5, "... more, see --json")
    return table


def _curve(report: "PlanReport") -> "Table":
    """The curve's points and the marked splits; the length of a bar is the peak."""
    labels: dict[tuple[int, int], list[str]] = {}
    lean: dict[tuple[int, int], int | None] = {}
    for point in thinned(report):
        labels[at := (point.groups, point.step_peak)], lean[at] = [], point.lean_peak
    for mark in report.marks:
        labels.setdefault(at := (mark.groups, mark.memory.step_peak), []).append(mark.label)
        lean.setdefault(at, mark.lean_peak)
    most = max(peak for _, peak in labels) or 1
    plain = report.request.step.lean_step is None
    columns = (">groups", ">peak", *[">lean_step"] * plain, "", "")
    table = new_table("Trade-off: step peak against number of groups", columns)
    for (groups, peak), marks in sorted(labels.items()):
        chosen = report.marks[-1].label in marks
        bar = ("#" if chosen else "-") * max(1, round(_BAR * peak / most))
        known = lean[groups, peak]
        sizes = [show_bytes(peak), "" if known is None else show_bytes(known)][: 1 + plain]
        style = "bold" if chosen else None
        table.add_row(str(groups), *sizes, bar, "; ".join(marks), style=style)
    return table


def thinned(report: "PlanReport") -> list[Any]:
    """Points of the curve, evenly thinned if there are many."""
    points = report.curve
    if len(points) <= _MOST_POINTS:
        return points
    last = len(points) - 1
    return [points[round(i * last / (_MOST_POINTS - 1))] for i in range(_MOST_POINTS)]


def _count(number: int) -> str:
    """Three significant digits: ``46.7 B`` for billions."""
    for size, unit in ((10**12, " T"), (10**9, " B"), (10**6, " M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"
