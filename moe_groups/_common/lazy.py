"""Packages that import what they offer when somebody first asks for it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeAlias

Offer: TypeAlias = tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]


def offer(package: str, names: Mapping[str, Sequence[str]]) -> Offer:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its name.
        names: what it offers, by the module that has it.
    """
    module_of = {name: module for module, own in names.items() for name in own}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names_there() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return sorted(module_of), get, names_there
