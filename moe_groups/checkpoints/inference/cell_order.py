"""The order in which the caller's groups have the layers of a model."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_groups.checkpoints.inference.model_order import ModelOrder
from moe_groups.checkpoints.inference.saved_rows import Cell, Row


@dataclass(slots=True)
class CellOrder:
    """The layers in order.

    Attributes:
        all: as groups have them: those of the caller's first group, then what the second has
            beside, and so on.
        of_source: places of the layers of each of the caller's groups, as it has them.
        unknown: the caller's groups whose order of layers is not known.
        by_names: nothing of this comes from the order of the saved groups.
    """

    all: list[Cell]
    of_source: dict[int, dict[Cell, int]]
    unknown: set[int]
    by_names: bool

    def rank(self, row: Row, by_layer: bool) -> int:
        """Place of an expert parameter's layer, or of its parallel group, in its caller's group."""
        ranks = self.of_source[row.variant.source]
        if by_layer:
            return ranks[row.cell]
        return next(rank for cell, rank in ranks.items() if cell[0] == row.parallel_group)


def order_cells(
    rows: Sequence[Row], model: ModelOrder, fine: bool, ordered: bool
) -> CellOrder | None:
    """The order of the layers; None where nothing tells it.

    The order of parameters in the model tells it as a rule. Else the order of the saved
    groups does: where they are split by layer for the layers that are new with one of the
    caller's groups; where they are not, for one that has all layers in one sequence.

    Args:
        rows: the parameters in the saved order.
        model: the order of parameters.
        fine: the saved groups are split by layer.
        ordered: parallel groups are in order; DeepSpeed's own are in another in every run.
    """
    experts: dict[int, list[Row]] = {}
    for row in rows:
        if row.parallel_group is not None:
            experts.setdefault(row.variant.source, []).append(row)
    order = CellOrder([], {}, set(), True)
    for source in sorted(experts):
        cells = _by_model(experts[source], model)
        if cells is None:
            if not fine and not _is_one_sequence(experts[source], ordered):
                return None
            order.by_names = False
            cells = list(dict.fromkeys(row.cell for row in experts[source]))
            if fine and not set(cells).isdisjoint(order.all):
                order.unknown.add(source)
        order.of_source[source] = {cell: rank for rank, cell in enumerate(cells)}
        order.all.extend(cell for cell in cells if cell not in order.all)
    return order


def _by_model(rows: Sequence[Row], model: ModelOrder) -> list[Cell] | None:
    first = {row.cell: row.param.name for row in reversed(rows)}
    cells = list(first)
    order = model.sort([first[cell] for cell in cells])
    return None if order is None else [cells[index] for index in order]


def _is_one_sequence(rows: Sequence[Row], ordered: bool) -> bool:
    """Has the first variant all layers, in one parallel group or in several that are in order?"""
    of_first = {row.cell for row in rows if row.variant == rows[0].variant}
    one_group = len({row.parallel_group for row in rows}) == 1
    return (ordered or one_group) and of_first == {row.cell for row in rows}
