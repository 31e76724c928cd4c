"""Which of the caller's groups a saved group came from: names and hyperparameters tell it.

The opposite direction of ``names.py``. There are three readings of a rank's groups; each is
tried, and one that is wrong does not give the same groups when they are made again
(``grouping_input.py``).
"""

import itertools
import json
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from moe_groups.checkpoints.inference.sequences import Merged, merge
from moe_groups.checkpoints.layout import FlatGroup
from moe_groups.groups.rules import Variant

DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_SUFFIX = (
    r"(?P<no_decay>\.no_decay)?(?P<overrides>(?:\.override\.\d+)*)"
    rf"(?:\.(?P<dtype>{'|'.join(DTYPES)}))?(?:\.tile\.(?P<tile>\d+))?"
)
_DENSE = re.compile(r"(?P<own>.+?)" + _SUFFIX)
_EXPERTS = re.compile(r"(?P<own>)" + _SUFFIX)
_EXPERTS_OF_SEVERAL = re.compile(r"\.(?P<own>.+?)" + _SUFFIX)
_OURS = re.compile(rf"\.(tile\.\d+|{'|'.join(DTYPES)})$")
_UNNAMED = re.compile(r"group\.(\d+)")
_Own = TypeVar("_Own", bound=Hashable)


class Mark(NamedTuple):
    """What is known of a saved group beside what it holds.

    Attributes:
        variant: the caller's group, and the rules that applied.
        dtype: name of the dtype, where the group's name has it.
        tile: number of the tile; None for a group that was not cut, or not by us.
    """

    variant: Variant
    dtype: str | None = None
    tile: int | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to understand a rank's groups.

    Attributes:
        marks: of each group.
        names: of the caller's groups; None for one without a name, or that is not known.
        order: of the caller's groups, by index.
        ours: the groups were made by this library, with names of its own.
    """

    marks: list[Mark]
    names: list[str | None]
    order: Merged[int]
    ours: bool = True


def readings(groups: Sequence[FlatGroup]) -> Iterator[Reading]:
    """All ways to understand a rank's groups, the likeliest first."""
    for read in (_read_one, _read_several, _read_stock):
        reading = read(groups)
        if reading is not None and _options_agree(groups, reading.marks):
            yield reading


def _options_agree(groups: Sequence[FlatGroup], marks: Sequence[Mark]) -> bool:
    """Have all groups of a variant the same hyperparameters?"""
    first: dict[Variant, Mapping[str, object]] = {}
    return all(
        first.setdefault(mark.variant, group.options) == group.options
        for group, mark in zip(groups, marks, strict=True)
    )


class _Name(NamedTuple):
    own: str
    no_decay: bool
    overrides: tuple[int, ...]
    dtype: str | None
    tile: int | None

    def mark(self, source: int) -> Mark:
        return Mark(Variant(source, self.no_decay, self.overrides), self.dtype, self.tile)


def _parse(group: FlatGroup, experts: re.Pattern[str]) -> _Name | None:
    """The parts of a name that this library gave; None for another's."""
    if group.parallel_group is None:
        match = _DENSE.fullmatch(group.name)
    elif group.name == group.parallel_group:
        match = experts.fullmatch("")
    else:
        number = group.labels.get("expert_number")
        prefix = f"{group.parallel_group}_{group.labels.get('expert_group_name') or 'experts'}"
        prefix += "" if number is None else f".expert.{number}"
        if not group.name.startswith(prefix):
            return None
        match = experts.fullmatch(group.name[len(prefix) :])
    if match is None:
        return None
    overrides = tuple(map(int, re.findall(r"\d+", match["overrides"])))
    tile = None if match["tile"] is None else int(match["tile"])
    return _Name(match["own"], bool(match["no_decay"]), overrides, match["dtype"], tile)


def _read_one(groups: Sequence[FlatGroup]) -> Reading | None:
    """A model, or one group of the caller, with decay rules and overrides."""
    names = [_parse(group, _EXPERTS) for group in groups]
    given = {name.own for name in names if name and name.own}
    if None in names or len(given) > 1:
        return None
    return Reading(
        [name.mark(0) for name in names if name], [next(iter(given), None)], Merged([0], set())
    )


def _read_several(groups: Sequence[FlatGroup]) -> Reading | None:
    """Several groups of the caller."""
    names = [name for group in groups if (name := _parse(group, _EXPERTS_OF_SEVERAL))]
    if len(names) < len(groups):
        return None
    is_dense = [group.parallel_group is None for group in groups]
    given_names = {name.own for name, dense in zip(names, is_dense, strict=True) if dense}
    owns = [_own(name.own, dense, given_names) for name, dense in zip(names, is_dense, strict=True)]
    numbers: list[str | int] = [*sorted({own for own in owns if isinstance(own, int)})]
    merged = merge([*_chains(groups, owns), numbers])
    given = None if merged is None else _given(merged.order)
    if merged is None or given is None:
        return None
    index_of = {own: given.index(own) for own in merged.order}
    marks = [name.mark(index_of[own]) for name, own in zip(names, owns, strict=True)]
    return Reading(
        marks,
        [own if isinstance(own, str) else None for own in given],
        _indices(merged, index_of),
    )


def _own(name: str, dense: bool, given_names: Collection[str]) -> str | int:
    """The name of a caller's group, or the number of one without a name."""
    match = _UNNAMED.fullmatch(name.removeprefix("dense.") if dense else name)
    unnamed = name.startswith("dense.") if dense else name not in given_names
    return int(match[1]) if match and unnamed else name


def _given(order: Sequence[str | int]) -> list[str | int | None] | None:
    """The caller's groups in order; None for those that left nothing."""
    given: list[str | int | None] = []
    for own in order:
        number = own if isinstance(own, int) else len(given)
        if number < len(given) or (isinstance(own, str) and ".tile." in own):
            return None
        given += [None] * (number - len(given))
        given.append(own)
    return given + [None] * (len(given) < 2)


def _indices(merged: Merged[_Own], index_of: Mapping[_Own, int]) -> Merged[int]:
    pairs = {(index_of[one], index_of[other]) for one, other in merged.known}
    return Merged([index_of[own] for own in merged.order], pairs)


def _read_stock(groups: Sequence[FlatGroup]) -> Reading | None:
    """DeepSpeed's split: dense groups as the caller gave them, then experts under one name."""
    dense = [group for group in groups if group.parallel_group is None]
    if [*groups[: len(dense)]] != dense or any(_OURS.search(group.name) for group in dense):
        return None
    if any(group.name != group.parallel_group or group.labels for group in groups[len(dense) :]):
        return None  # ours: they have labels, if only to say that there is none
    named: dict[str, list[str | None]] = {}
    for group in dense:
        named.setdefault(_key(group), []).append(group.name)
    owns: list[tuple[str | None, str]] = [(group.name, _key(group)) for group in dense]
    if len(set(owns)) < len(dense):
        return None
    for group in groups[len(dense) :]:
        same = named.get(_key(group), [None])
        if len(same) > 1:
            return None  # of which of them?
        owns.append((same[0], _key(group)))
    merged = merge([owns[: len(dense)], owns[len(dense) :]])
    if merged is None:
        return None
    index_of = {own: index for index, own in enumerate(merged.order)}
    marks = [Mark(Variant(index_of[own])) for own in owns]
    names = [name for name, _ in merged.order]
    return Reading(marks, names, _indices(merged, index_of), ours=False)


def _key(group: FlatGroup) -> str:
    return json.dumps(group.options, sort_keys=True)


def _chains(groups: Sequence[FlatGroup], owns: Sequence[_Own]) -> list[list[_Own]]:
    """Sequences in which the caller's groups are in order, if this library made the groups.

    They are in the dense groups, and in the groups of each layer and expert. Layers in turn
    are in the order of the first of the caller's groups that has some of their parameters,
    and so are parallel groups.
    """
    cells: dict[tuple[str | None, object], dict[object, list[_Own]]] = {}
    for group, own in zip(groups, owns, strict=True):
        cell = group.parallel_group, group.labels.get("expert_group_name")
        number = group.labels.get("expert_number")
        cells.setdefault(cell, {}).setdefault(number, []).append(own)
    found = [chain for experts in cells.values() for chain in experts.values()]
    members = [dict.fromkeys(itertools.chain(*experts.values())) for experts in cells.values()]
    seen: set[str | None] = {None}
    for index, ((parallel_group, _), experts) in enumerate(cells.items()):
        starts = {chain[0] for chain in experts.values()}
        if len(starts) == 1 and parallel_group is not None:
            after = (
                own
                for (other, _), owns_ in list(zip(cells, members, strict=True))[index:]
                if other == parallel_group or parallel_group not in seen
                for own in owns_
            )
            found += [[*starts, own] for own in after if own not in starts]
        seen.add(parallel_group)
    return found
