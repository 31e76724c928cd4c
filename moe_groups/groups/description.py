"""Describe param groups: read their sizes, places and hyperparameters into a table."""

import html
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import chain, groupby, takewhile
from typing import Any, TypeAlias

import torch

from moe_groups._common.arguments import Count, Positive, checked
from moe_groups._common.text import html_table, show_bytes, text_table
from moe_groups._deepspeed.engines import engine_data_parallel_group, is_engine, stepped_groups
from moe_groups._deepspeed.process_groups import expert_data_parallel_ranks, expert_parallel_rank
from moe_groups.groups.grouping import padded_partition
from moe_groups.groups.inputs import made_groups
from moe_groups.tags import (
    PARALLEL_GROUP,
    get_expert_tag,
    numel_of,
    parallel_group_of,
)
from moe_groups.topology import ep_size_of, world_size

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
        layer: ``expert_group_name`` of its MoE layer; None for dense groups and groups that
            mix layers.
        expert: global number of its expert once the process groups exist, before that the
            local one; None if the group holds several experts.
        moe: does it hold experts?
        tensors: number of parameters.
        elements: number of elements, without padding.
        partition_bytes: bytes of the part that one rank owns, padded, in the parameters'
            dtype.
        lr: its learning rate; None if the optimizer's default applies.
        weight_decay: its weight decay; None if the optimizer's default applies.
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
        max_rows: the table folds more rows than this.
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
        total[6:] = [show_bytes(self.partition_bytes), "", ""]
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
                f"{show_bytes(self.largest.partition_bytes)} on each rank"
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
        mark + show_bytes(biggest.partition_bytes if biggest else 0),
        _range([row.lr for row in rows]),
        _range([row.weight_decay for row in rows]),
    ]


def _common_name(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = zip(*(name.split(".") for name in names), strict=False)
    shared = [same[0] for same in takewhile(lambda part: len(set(part)) == 1, parts)]
    return ".".join([*shared, "*"]) if shared else "*"


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


_Pairs: TypeAlias = list[tuple[Mapping[str, Any], list[torch.Tensor]]]


@checked
def describe(
    groups: Any, *, max_rows: Positive = 60, data_parallel_size: Count | None = None
) -> GroupTable:
    """A table of param groups: name, layer, expert, sizes, learning rate, weight decay.

    Args:
        groups: the result of :func:`create_moe_param_groups`, an optimizer over it, or after
            ``deepspeed.initialize`` the engine.
        max_rows: fold neighbouring groups when there are more than this.
        data_parallel_size: ranks that share dense parameters; None takes the engine's, or
            the world size of ``torch.distributed``, or 1.

    Returns:
        A table whose ``rows`` are data, shown by ``print`` and by notebooks.

    Raises:
        InvalidArgumentError: not groups, or groups that belong to an engine by now.

    Example:
        >>> print(describe(groups))                                       # doctest: +SKIP
    """
    if is_engine(groups):
        pairs: _Pairs = list(stepped_groups(groups))
        world = data_parallel_size or torch.distributed.get_world_size(
            engine_data_parallel_group(groups)
        )
    else:
        pairs = made_groups(groups)
        world = data_parallel_size or world_size() or 1
    rows = [_row(i, group, params, world) for i, (group, params) in enumerate(pairs) if params]
    return GroupTable(rows, max_rows)


def _row(index: int, group: Mapping[str, Any], params: list[torch.Tensor], world: int) -> GroupRow:
    elements = sum(map(numel_of, params))
    moe = bool(group.get("moe"))
    ranks = world
    number = group.get("expert_number")
    tag = get_expert_tag(params[0]) if params else None
    name = tag.parallel_group if tag else parallel_group_of(str(group.get("name")))
    if moe and PARALLEL_GROUP.fullmatch(name):
        ranks = len(expert_data_parallel_ranks(name)) or max(1, world // ep_size_of(name))
        ep_rank = expert_parallel_rank(name)
        if number is not None and ep_rank is not None and tag is not None:
            number = tag.global_number(ep_rank)
    return GroupRow(
        name=str(group.get("name") or f"group {index}"),
        layer=group.get("expert_group_name"),
        expert=number,
        moe=moe,
        tensors=len(params),
        elements=elements,
        partition_bytes=padded_partition(elements, ranks)
        * max((param.dtype.itemsize for param in params), default=1),
        lr=_number(group.get("lr")),
        weight_decay=_number(group.get("weight_decay")),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
