"""The table that :func:`moe_groups.describe` returns: rows as data, and how they are shown."""

import html
import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

from moe_groups.text_table import html_table, text_table

MANY_GROUPS = 200
"""Above this number the table says what groups cost (``benchmarks/group_cost.py``)."""

_HEADERS = (
    "group", "layer", "expert", "groups", "tensors", "elements", "partition", "lr", "weight decay",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One param group.

    Attributes:
        name: the group's name.
        layer: ``expert_group_name`` of its MoE layer; None for dense groups and where
            layers are not kept apart.
        expert: number of its expert in the layer over all ranks, once the process groups
            exist, before that on this rank; None where experts are not kept apart.
        moe: does it hold experts?
        tensors: number of parameters.
        elements: number of elements, without padding.
        partition_bytes: bytes of the part that one rank owns, padded, in the parameters'
            dtype.
        lr: its learning rate; None if the optimizer's default applies.
        weight_decay: likewise.
    """

    name: str
    layer: str | None
    expert: int | None
    moe: bool
    tensors: int
    elements: int
    partition_bytes: int
    lr: float | None
    weight_decay: float | None


@dataclass(frozen=True)
class GroupTable:
    """What :func:`describe` returns: ``str()`` and notebooks show a table.

    Attributes:
        rows: one for each group, in order.
        max_rows: more rows than this are folded when shown.
    """

    rows: list[GroupRow]
    max_rows: int = 60

    @property
    def elements(self) -> int:
        """Elements of all groups."""
        return sum(row.elements for row in self.rows)

    @property
    def partition_bytes(self) -> int:
        """Bytes of all partitions that one rank owns."""
        return sum(row.partition_bytes for row in self.rows)

    @property
    def largest(self) -> GroupRow | None:
        """The group with the largest partition, which sets the peak of the optimizer step."""
        return max(self.rows, key=lambda row: row.partition_bytes, default=None)

    def __str__(self) -> str:
        return "\n".join([text_table(self._cells(), _HEADERS, _RIGHT), *self._notes()])

    def _repr_html_(self) -> str:
        table = html_table(self._cells(), _HEADERS, _RIGHT)
        return table + "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())

    def _cells(self) -> list[list[str]]:
        cells = [_cells(rows, self.largest) for rows in self._folded()]
        total = _cells(self.rows, None)
        total[:3] = ["total", "", ""]
        total[6:] = [_bytes(self.partition_bytes), "", ""]
        return [*cells, total]

    def _folded(self) -> list[list[GroupRow]]:
        """Neighbouring rows together, at the finest level that keeps within ``max_rows``."""
        folded = [[row] for row in self.rows]
        for level in _FOLDS:
            if len(folded) <= self.max_rows:
                break
            folded = [list(rows) for _, rows in groupby(self.rows, key=level)]
        if len(folded) <= self.max_rows:
            return folded
        # Still too many layers: as many neighbours to a row as it takes.
        size = math.ceil(len(folded) / max(1, self.max_rows - 1))
        return [
            list(chain.from_iterable(part[start : start + size]))
            for _, kind in groupby(folded, key=lambda rows: rows[0].moe)
            for part in [list(kind)]
            for start in range(0, len(part), size)
        ]

    def _notes(self) -> list[str]:
        notes = []
        if self.largest is not None:
            notes.append(
                f"* largest partition: {self.largest.name}, "
                f"{_bytes(self.largest.partition_bytes)} on each rank"
            )
        if len(self._folded()) < len(self.rows):
            notes.append(
                f"{len(self.rows):,} groups folded into {len(self._folded())} rows; a folded row "
                "shows its largest partition. All rows: .rows, or describe(..., max_rows=...)"
            )
        if len(self.rows) > MANY_GROUPS:
            notes.append(
                f"warning: {len(self.rows):,} groups. Each costs some time in every step (figures: "
                "benchmarks/README.md). A coarser split_by or a larger cap makes fewer."
            )
        return notes


_FOLDS: tuple[Callable[[GroupRow], Hashable], ...] = (
    lambda row: (row.moe, row.layer, row.expert),
    lambda row: (row.moe, row.layer),
)
_RIGHT = range(2, len(_HEADERS))


def _cells(rows: list[GroupRow], largest: GroupRow | None) -> list[str]:
    biggest = max(rows, key=lambda row: row.partition_bytes, default=None)
    mark = "* " if largest is not None and any(row is largest for row in rows) else ""
    return [
        _common_name([row.name for row in rows]),
        _span([row.layer for row in rows], "layers"),
        _span([row.expert for row in rows], "experts"),
        f"{len(rows):,}",
        f"{sum(row.tensors for row in rows):,}",
        f"{sum(row.elements for row in rows):,}",
        mark + _bytes(biggest.partition_bytes if biggest else 0),
        _range([row.lr for row in rows]),
        _range([row.weight_decay for row in rows]),
    ]


def _common_name(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = [same[0] for same in _takewhile_equal(zip(*parts, strict=False))]
    return ".".join([*shared, "*"]) if shared else "*"


def _takewhile_equal(columns: Iterable[tuple[str, ...]]) -> Iterable[tuple[str, ...]]:
    for column in columns:
        if len(set(column)) > 1:
            return
        yield column


def _span(values: list[Any], what: str) -> str:
    distinct = sorted({value for value in values if value is not None})
    if not distinct:
        return ""
    if len(distinct) == 1:
        return str(distinct[0])
    if isinstance(distinct[0], int) and distinct == list(range(distinct[0], distinct[-1] + 1)):
        return f"{distinct[0]}-{distinct[-1]}"
    return f"{len(distinct)} {what}"


def _range(values: list[float | None]) -> str:
    known = sorted({value for value in values if value is not None})
    if not known:
        return "default"
    text = f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}"
    return text if None not in values else f"{text}, default"


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.1f} {'KMGT'[power - 1]}iB"
