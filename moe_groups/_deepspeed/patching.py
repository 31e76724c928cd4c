"""Wrap functions of DeepSpeed, after checking that they exist and take the expected arguments."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from moe_groups.errors import UnsupportedDeepSpeedError

TESTED_VERSION = "0.19.8"
_PATCHED = "_moe_groups_original"
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
Change = tuple[str, str, Wrap]


def change_functions(changes: Iterable[Change], needed_by: str) -> None:
    """Wrap functions of DeepSpeed, each once; if one is missing or has changed, wrap none."""
    for name, wrap, holder, _ in check_functions(changes, needed_by):
        wrap_once(holder, name, wrap)


def wrap_once(holder: Any, name: str, wrap: Wrap) -> bool:
    """Wrap a function of a module or class; False, and no change, if it is wrapped already."""
    original = getattr(holder, name)
    if hasattr(original, _PATCHED):
        return False
    changed: Any = functools.wraps(original)(wrap(original))
    setattr(changed, _PATCHED, original)
    static = isinstance(inspect.getattr_static(holder, name), staticmethod)
    setattr(holder, name, staticmethod(changed) if static else changed)
    return True


def check_functions(
    changes: Iterable[Change], needed_by: str
) -> list[tuple[str, Wrap, Any, Callable[..., Any]]]:
    """``(name, wrap, owner, function)`` of all functions that are not wrapped yet.

    Raises:
        UnsupportedDeepSpeedError: a function is missing or takes other arguments.
    """
    places = [(owner, name, wrap, *find(owner, name)) for owner, name, wrap in changes]
    new = [place for place in places if not hasattr(place[-1], _PATCHED)]
    for owner, name, wrap, _, original in new:
        _check_known(f"{owner}.{name}", original, wrap, needed_by)
    return [place[1:] for place in new]


def _check_known(place: str, original: Any, wrap: Wrap, needed_by: str) -> None:
    """Refuse a DeepSpeed whose function is missing or takes other arguments than our wrapper."""
    import deepspeed

    if not callable(original):
        problem = f"has no {place}, which {needed_by}"
    else:
        wanted, theirs = _arguments(wrap(original)), _arguments(original)
        if theirs is None or wanted is None or theirs[: len(wanted)] == wanted:
            return
        problem = (
            f"has {place}({', '.join(theirs)}), which {needed_by} with the arguments "
            f"({', '.join(wanted)})"
        )
    raise UnsupportedDeepSpeedError(
        f"deepspeed {deepspeed.__version__} {problem}: install deepspeed {TESTED_VERSION}, which "
        "this release was tested with."
    )


def _arguments(function: Callable[..., Any]) -> list[str] | None:
    """Names of its positional arguments; None if it takes any arguments."""
    found = list(inspect.signature(function).parameters.values())
    if found and found[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return None
    return [p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def find(owner: str, name: str) -> tuple[Any, Any]:
    """The owner of the function, and the function; None for either if it is missing."""
    module, _, cls = owner.partition(":")
    try:
        holder: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return None, None
    holder = getattr(holder, cls, None) if cls else holder
    return holder, getattr(holder, name, None)


def deepspeed_version() -> str:
    """The installed release."""
    import deepspeed

    return str(deepspeed.__version__)
