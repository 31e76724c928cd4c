"""Remember, without holding them, which hyperparameters each parameter was given.

DeepSpeed replaces the parameters in the group dicts by flat partitions, and loading a
checkpoint replaces the dicts, so :func:`moe_groups.verify` needs a record of its own. It
must not be on the parameters (the input is not changed) nor in the groups (it would end
in the optimizer's state dict).
"""

import weakref
from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

CHECKED = ("lr", "weight_decay")


class Given(NamedTuple):
    """One group as it was handed out: its name, and those of :data:`CHECKED` that it had."""

    name: str
    options: dict[str, Any]


class _Call(NamedTuple):
    """The groups of one call.

    ``params`` are weak references to all parameters, group after group; only to the first
    one if there is nothing to check.
    """

    names: frozenset[str]
    params: list["weakref.ref[torch.Tensor]"]
    lengths: list[int]
    given: list[Given]


_calls: list[_Call] = []


def remember(groups: Sequence[dict[str, Any]], checked: Sequence[dict[str, Any]]) -> None:
    """Record ``groups`` and for each its :data:`CHECKED` options; none if no group has any.

    Calls whose first parameter is gone are dropped, and those that this one repeats.
    """
    names = frozenset([group["name"] for group in groups])
    first = groups[0]["params"][0]
    _calls[:] = [
        call
        for call in _calls
        if (known := call.params[0]()) is not None and (known is not first or call.names != names)
    ]
    if not checked:
        _calls.append(_Call(names, [weakref.ref(first)], [], []))
        return
    params = [group["params"] for group in groups]
    refs = list(map(weakref.ref, chain.from_iterable(params)))
    given = [Given(g["name"], options) for g, options in zip(groups, checked, strict=True)]
    _calls.append(_Call(names, refs, list(map(len, params)), given))


def given_options(names: Collection[str]) -> dict[int, Given]:
    """``id(parameter)`` to the group that it was given, for an optimizer with these groups.

    Only calls whose groups are all in the optimizer count, and of several for the same
    parameters the last: others were made to look at.
    """
    found: dict[int, Given] = {}
    covered: set[int] = set()
    for call in reversed(_calls):
        first = call.params[0]()
        if first is None or id(first) in covered or not call.names.issubset(names):
            continue
        covered.add(id(first))
        homes = chain.from_iterable(
            [given] * length for given, length in zip(call.given, call.lengths, strict=True)
        )
        for ref, given in zip(call.params, homes, strict=False):
            param = ref()
            if param is not None:
                found.setdefault(id(param), given)
    return found
