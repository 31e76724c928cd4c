"""Packages that import a public name when it is first used."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeAlias

from moe_groups.errors import MissingPackageError

Offer: TypeAlias = tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]


def offer(package: str, names: Mapping[str, Sequence[str]]) -> Offer:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package.

    ``__getattr__`` raises MissingPackageError where torch, numpy or what the name needs besides
    them is not installed.

    Args:
        package: the package's name.
        names: each module of the package with the public names in it.
    """
    module_of = {name: module for module, own in names.items() for name in own}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(f"{package}.{module_of[name]}")
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "numpy"):
                raise
            raise MissingPackageError(
                f"{package}.{name} needs {error.name}, which is not installed: "
                f"pip install {error.name}.",
                name=error.name,
            ) from error
        value = getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def names_there() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return sorted(module_of), get, names_there
