"""The parameters of a rank's saved groups, one by one, with what groups and names say of them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch

from moe_groups.checkpoints.expert_names import ExpertPlaces
from moe_groups.checkpoints.inference.group_marks import DTYPES, Mark
from moe_groups.checkpoints.layout import FlatGroup, FlatParam
from moe_groups.groups.rules import Variant

UNTOLD = torch.bool
"""Stands for a dtype that is not known; no parameter has it."""

Cell: TypeAlias = tuple[str, str | None]
"""Parallel group and layer."""


class Row(NamedTuple):
    """One parameter.

    Attributes:
        param: as saved.
        group: index of the saved group.
        place: in it.
        parallel_group: None for dense parameters.
        layer: None for dense parameters, and where neither labels nor names tell.
        number: of its expert on this rank; None for what is not one expert's.
        numbered: is ``number`` known?
        variant: the caller's group and the rules that applied.
        dtype: when it was grouped.
        tile: number of the saved tile.
        line: the same for all tiles of one line, and for nothing else.
    """

    param: FlatParam
    group: int
    place: int
    parallel_group: str | None
    layer: str | None
    number: int | None
    numbered: bool
    variant: Variant
    dtype: torch.dtype
    tile: int
    line: tuple[object, ...]

    @property
    def cell(self) -> Cell:
        assert self.parallel_group is not None
        return self.parallel_group, self.layer


def saved_rows(groups: Sequence[FlatGroup], marks: Sequence[Mark]) -> Iterator[Row]:
    """The rows of all groups, in the saved order."""
    places = ExpertPlaces(*(_params(groups, experts) for experts in (False, True)))
    cast = any(
        mark.dtype not in (None, param.dtype)
        for group, mark in zip(groups, marks, strict=True)
        for param in group.params
        if param.dtype is not None
    )  # the engine made one dtype of them; what they had is told by names of groups alone
    for index, (group, mark) in enumerate(zip(groups, marks, strict=True)):
        label, number = (group.labels.get(k) for k in ("expert_group_name", "expert_number"))
        for place, param in enumerate(group.params):
            found = places.of(param.name) if group.parallel_group else None
            own = number if number is not None or found is None else found.number
            dtype = mark.dtype or (None if cast else param.dtype)
            yield Row(
                param=param,
                group=index,
                place=place,
                parallel_group=group.parallel_group,
                layer=label if label is not None or found is None else found.layer,
                number=own,
                numbered=own is not None or found is not None,
                variant=mark.variant,
                dtype=UNTOLD if dtype is None else DTYPES[dtype],
                tile=mark.tile or 0,
                line=(group.parallel_group, label, number, mark.variant, mark.dtype),
            )


def _params(groups: Sequence[FlatGroup], experts: bool) -> list[FlatParam]:
    own = (group for group in groups if (group.parallel_group is not None) == experts)
    return [param for group in own for param in group.params]
