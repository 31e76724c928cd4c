"""The order of a model's parameters, as their names and parts of the order tell it.

``named_parameters()`` lists a module's own parameters before those of its children, all
parameters of one child before those of the next, and the children of ``ModuleList`` and
``Sequential`` by number. Which other child comes first is learned from lists of parameters
that are in the model's order.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from moe_groups.checkpoints.inference.sequences import Merged, merge


class ModelOrder:
    """What lists of parameters tell of the order of all that are in them.

    Args:
        sequences: qualified names, each list in the model's order.

    Attributes:
        consistent: the lists are in the order of one model's ``named_parameters()``.

    Example:
        >>> order = ModelOrder([["encoder.0.w", "encoder.10.w", "decoder.w"]])
        >>> order.before("encoder.2.moe.w", "encoder.10.moe.w")
        True
        >>> order.before("decoder.moe.w", "encoder.0.moe.w")
        False
    """

    def __init__(self, sequences: Iterable[Sequence[str]]) -> None:
        chains: dict[str, list[list[str]]] = {}
        self.consistent = True
        for names in sequences:
            self.consistent &= all(_told(*pair) is not False for pair in pairwise(names))
            for path, children in _children(names).items():
                self.consistent &= len(set(children)) == len(children)
                chains.setdefault(path, []).append(children)
        self._children: dict[str, Merged[str]] = {}
        for path, found in chains.items():
            numbers = sorted({c for chain in found for c in chain if c.isdecimal()}, key=int)
            if numbers and all(child.isdecimal() for chain in found for child in chain):
                continue  # a list of modules; numbers tell
            merged = merge([*found, numbers])
            self.consistent &= merged is not None
            self._children[path] = merged or Merged([], set())

    def before(self, one: str, other: str) -> bool | None:
        """Does the model list ``one`` before ``other``; None where that is not known."""
        told = _told(one, other)
        if told is not None:
            return told
        path, part, other_part = _fork(one, other)
        known = self._children[path].known if path in self._children else ()
        if (part, other_part) in known:
            return True
        return False if (other_part, part) in known else None

    def sort(self, names: Sequence[str]) -> list[int] | None:
        """Indices of ``names`` in the model's order; None where it is not known of all."""
        order = sorted(range(len(names)), key=lambda index: [*self._sort_key(names[index])])
        known = (self.before(names[one], names[other]) for one, other in pairwise(order))
        return order if all(known) else None

    def _sort_key(self, name: str) -> Iterator[tuple[bool, int]]:
        """Sorts what is known as it is known, so that what is not is among neighbours."""
        path = ""
        parts = name.split(".")
        for index, part in enumerate(parts):
            order = self._children[path].order if path in self._children else []
            number = int(part) if part.isdecimal() else -1
            yield index + 1 < len(parts), order.index(part) if part in order else number
            path = f"{path}.{part}"


def _children(names: Iterable[str]) -> dict[str, list[str]]:
    """Below each path its next components in the order of the names; again where it comes back."""
    found: dict[str, list[str]] = {}
    for name in names:
        path = ""
        for part in name.split("."):
            children = found.setdefault(path, [])
            if not children or children[-1] != part:
                children.append(part)
            path = f"{path}.{part}"
    return found


def _fork(one: str, other: str) -> tuple[str, str, str]:
    """The path that two names share, and how each goes on."""
    path = ""
    for part, other_part in zip(one.split("."), other.split("."), strict=False):
        if part != other_part:
            return path, part, other_part
        path = f"{path}.{part}"
    return path, "", ""


def _told(one: str, other: str) -> bool | None:
    """Does ``one`` come before ``other`` in every model that has both?"""
    path, part, other_part = _fork(one, other)
    last, other_last = (f"{path}.{part}" == f".{one}", f"{path}.{other_part}" == f".{other}")
    if last != other_last:
        return last
    if part.isdecimal() and other_part.isdecimal():
        return int(part) < int(other_part)
    return None


def apart(names: Iterable[str], others: Iterable[str]) -> bool:
    """Are these parameters those of two modules, neither of which is inside the other?

    All parameters of one then come before all of the other.
    """
    one, other = _common_module(names), _common_module(others)
    shared = min(len(one), len(other))
    return one[:shared] != other[:shared]


def _common_module(names: Iterable[str]) -> list[str]:
    """Components of the innermost module that all parameters are in."""
    split = [name.split(".")[:-1] for name in names]
    low, high = min(split), max(split)  # what these two share, all share
    shared = 0
    while shared < min(len(low), len(high)) and low[shared] == high[shared]:
        shared += 1
    return low[:shared]
