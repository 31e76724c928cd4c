"""What the groups of a checkpoint were made from: its parameters in the model's order.

A saved group keeps the order of its parameters, and saved groups stand in an order that
follows from the model's. Together with the names (``model_order.py``) this gives back all
that grouping depends on, or it is an error: whoever makes the same groups again from what
was found here has to get those of the checkpoint.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch

from moe_groups._common.arguments import SplitBy
from moe_groups.checkpoints.inference.cell_order import CellOrder, order_cells
from moe_groups.checkpoints.inference.group_marks import Reading, readings
from moe_groups.checkpoints.inference.model_order import ModelOrder
from moe_groups.checkpoints.inference.saved_rows import Cell, Row, saved_rows
from moe_groups.checkpoints.inference.sequences import Merged, merge
from moe_groups.checkpoints.layout import FlatGroup
from moe_groups.errors import CheckpointError
from moe_groups.groups.grouping import lines, name_groups
from moe_groups.groups.keys import NO_EXPERT, Families, Key, Line, Table, Tiles
from moe_groups.groups.rules import Variant

WAY_OUT = (
    "Give a file that says what the new groups are (a refused load_checkpoint writes one, and so "
    "does save_checkpoint: moe_groups.json) in place of a name."
)


@dataclass(frozen=True, slots=True)
class GroupingInput:
    """What one rank's groups were made from.

    Attributes:
        rows: the parameters; those of one group to be stand in the caller's order.
        names: of the caller's groups; None for one without a name.
        level: at which the saved groups were split.
        model: the order of parameters in the model.
        cells: the order of layers.
        dtypes: their order, where the saved groups tell it.
        callers: the order of the caller's groups, where the saved groups tell it.
    """

    rows: list[Row]
    names: list[str | None]
    level: SplitBy
    model: ModelOrder
    cells: CellOrder
    dtypes: Merged[torch.dtype]
    callers: Merged[int]

    def table(self, level: SplitBy) -> Table:
        """What the groups are planned from."""
        by_layer, by_expert = level != "parallel_group", level == "expert"
        found: dict[Key, dict[int, list[int]]] = {}
        for index, row in enumerate(self.rows):
            key = Key(row.parallel_group, row.layer if by_layer else None, row.variant, row.dtype)
            number = row.number if by_expert and row.number is not None else NO_EXPERT
            found.setdefault(key, {}).setdefault(number, []).append(index)
        # a plan has dtypes in the order of their first families; these have no rows
        order: dict[Key, dict[int, list[int]]] = {
            Key(None, None, Variant(-1), dtype): {} for dtype in self.dtypes.order
        }
        families = order | {key: found[key] for key in sorted(found, key=self._position)}
        return Table([row.param.numel for row in self.rows], cast(Families, families))

    @property
    def sources(self) -> list[dict[str, str | None]]:
        """The caller's groups, with nothing but their names."""
        return [{"name": name} for name in self.names]

    def local_experts(self) -> dict[Cell, int]:
        """Experts on this rank of each layer whose experts are numbered without gaps."""
        numbers: dict[Cell, set[int]] = {}
        for row in self.rows:
            if row.number is not None and row.layer is not None:
                numbers.setdefault(row.cell, set()).add(row.number)
        return {cell: len(found) for cell, found in numbers.items() if max(found) < len(found)}

    def _position(self, key: Key) -> int:
        """Families in the order in which the model has them: what the plan's order follows."""
        if key.parallel_group is None:
            return -1
        own = (key.parallel_group, key.layer)
        return next(
            index
            for index, cell in enumerate(self.cells.all)
            if cell == own or (key.layer is None and cell[0] == own[0])
        )


def read_back(groups: Sequence[FlatGroup]) -> GroupingInput:
    """Find out what one rank's groups were made from.

    Args:
        groups: in the order of the rank's optimizer.

    Raises:
        CheckpointError: they do not tell.
    """
    model = ModelOrder([[param.name for param in group.params] for group in groups])
    if not model.consistent:
        raise _untold(groups, "their parameters are in no model's order (round_robin_gradients?)")
    problem = "they are not as moe_groups or DeepSpeed make them, or have ambiguous names"
    for reading in readings(groups):
        rows = list(saved_rows(groups, reading.marks))
        if not reading.ours and not ModelOrder(_lines(rows)).consistent:
            continue  # DeepSpeed's split leaves the parameters in the model's order
        ordered = all(group.labels for group in groups if group.parallel_group)
        cells = order_cells(rows, model, _level(groups) != "parallel_group", ordered)
        if cells is None:
            problem = "nothing tells the order of their layers in the model"
            continue
        found = _put_together(groups, reading, rows, model, cells)
        if not reading.ours or _gives(found, groups):
            return found
    raise _untold(groups, problem)


def _untold(groups: Sequence[FlatGroup], problem: str) -> CheckpointError:
    shown = ", ".join(repr(group.name) for group in groups[:4])
    return CheckpointError(
        f"the groups of the checkpoint ({shown}{', ...' if len(groups) > 4 else ''}) do not tell "
        f"what they were made from: {problem}. {WAY_OUT}"
    )


def _lines(rows: Iterable[Row]) -> list[list[str]]:
    found: dict[object, list[str]] = {}
    for row in rows:
        found.setdefault(row.line, []).append(row.param.name)
    return list(found.values())


def _put_together(
    groups: Sequence[FlatGroup],
    reading: Reading,
    rows: list[Row],
    model: ModelOrder,
    cells: CellOrder,
) -> GroupingInput:
    level = _level(groups)
    rows.sort(key=lambda row: _position(row, level, cells))
    dtypes = merge(_dtype_sequences(rows)) if reading.ours else None
    if dtypes is None:
        dtypes = Merged(list(dict.fromkeys(row.dtype for row in rows)), set())
    return GroupingInput(rows, reading.names, level, model, cells, dtypes, reading.order)


def _level(groups: Iterable[FlatGroup]) -> SplitBy:
    told = {label for group in groups for label, value in group.labels.items() if value is not None}
    if "expert_number" in told:
        return "expert"
    return "module" if "expert_group_name" in told else "parallel_group"


def _position(row: Row, level: SplitBy, cells: CellOrder) -> tuple[object, ...]:
    """Sorts saved groups as the caller's groups have them, layer by layer."""
    cell = -1 if row.parallel_group is None else cells.rank(row, level != "parallel_group")
    number = row.number if level == "expert" and row.number is not None else NO_EXPERT
    return cell, number, row.variant, row.tile, row.group, row.place


def _dtype_sequences(rows: Iterable[Row]) -> list[list[torch.dtype]]:
    """Dtypes that stand beside each other in the saved groups, in their order."""
    found: dict[object, list[torch.dtype]] = {}
    for row in sorted(rows, key=lambda row: row.group):
        found.setdefault(row.line[:-1], []).append(row.dtype)
    return list(found.values())


def _gives(found: GroupingInput, groups: Sequence[FlatGroup]) -> bool:
    """Are the saved groups what is made from ``found``?

    A plan for a step memory budget has them in an order of its own; then all that
    depends on the order has to be known from names.
    """
    table = found.table(found.level)
    cut = [(line, _saved_tiles(line, found.rows)) for line in lines(table.families)]
    made = [
        (name, [found.rows[index].param.name for index in members])
        for name, _, _, members in name_groups(cut, table, found.sources)
    ]
    saved = [(group.name, [param.name for param in group.params]) for group in groups]
    if made == saved:
        return True
    known = found.cells.by_names and len(found.names) == 1 and not found.dtypes.known
    return known and sorted(made) == sorted(saved)


def _saved_tiles(line: Line, rows: Sequence[Row]) -> Tiles | None:
    groups = [rows[index].group for index in line[2]]
    cuts = [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]
    return list(pairwise([0, *cuts, len(groups)])) if cuts else None
