"""What a group's parameters have in common, and the table of parameters that plans are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch

from moe_groups.groups.rules import Variant

Rows: TypeAlias = Sequence[int]
"""Rows of the table in ascending order."""

NO_EXPERT = -1
"""Stands for the number of parameters that are not one expert's."""


class Key(NamedTuple):
    """What all parameters of a group have in common besides the expert.

    ``layer`` is None if groups mix layers. ``parallel_group`` is None for dense ones, and so is
    ``layer``, but for what an override names inside of an MoE layer.
    ``mesh`` is the device mesh of parameters that are DTensors, as FSDP2 makes them.
    """

    parallel_group: str | None
    layer: str | None
    variant: Variant
    dtype: torch.dtype
    mesh: Any = None


Families: TypeAlias = dict[Key, dict[int, Rows]]
"""Rows by key and expert number, keys in the order of their first row."""


@dataclass(frozen=True, slots=True)
class Table:
    """What the plan needs to know of the parameters, which are its rows.

    Attributes:
        sizes: elements of each.
        families: the rows that are to be grouped; the others are left out.
    """

    sizes: list[int]
    families: Families

    @property
    def sharded(self) -> bool:
        """Are parameters DTensors, which another library than DeepSpeed shards and steps?"""
        return any(key.mesh is not None for key in self.families)

    def sizes_of(self, rows: Rows) -> tuple[int, ...]:
        """Elements of each parameter in these rows."""
        return tuple(self.sizes[row] for row in rows)


PlannedGroup: TypeAlias = tuple[str, Key, int | None, Rows]
"""Name (unique, for experts a valid process-group key), key, expert number and rows."""


Line: TypeAlias = tuple[Key, int | None, Rows]
"""Key, expert number and rows of what would be one group without a cap."""

Tiles: TypeAlias = Sequence[tuple[int, int]]
"""``(start, stop)`` of each tile of a line, in order."""
