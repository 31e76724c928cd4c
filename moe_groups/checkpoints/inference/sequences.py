"""One order out of several sequences that each know a part of it."""

from collections.abc import Hashable, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item", bound=Hashable)


class Merged(NamedTuple, Generic[Item]):
    """The result of :func:`merge`.

    Attributes:
        order: all items; those whose order is not known as they first appeared.
        known: pairs of items whose order follows from the sequences.
    """

    order: list[Item]
    known: set[tuple[Item, Item]]

    def tells(self, items: Iterable[Item]) -> bool:
        """Is the order of each of these known to be this one?"""
        return all(pair in self.known for pair in pairwise(dict.fromkeys(items)))


def merge(sequences: Iterable[Sequence[Item]]) -> Merged[Item] | None:
    """Put sequences together; None where they contradict each other.

    Example:
        >>> merge([["a", "b"], ["c"], ["b", "d"]]).order
        ['a', 'c', 'b', 'd']
    """
    before: dict[Item, set[Item]] = {}
    for sequence in sequences:
        unique = list(dict.fromkeys(sequence))
        for item in unique:
            before.setdefault(item, set())
        for one, other in pairwise(unique):
            before[other].add(one)
    try:
        order = list(TopologicalSorter(before).static_order())
    except CycleError:
        return None
    for item in order:
        for earlier in [*before[item]]:
            before[item] |= before[earlier]
    return Merged(order, {(one, other) for other, found in before.items() for one in found})
