"""Docstrings for the API page: names on it become links, "Example:" the section "Examples:"."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?(?:moe_groups\.)?([\w.]+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)
_ENTRY = re.compile(r"^::: ((?:\w+\.)*(\w+))$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings below ``pkg``."""
        page = Path(__file__).parents[1] / "api.md"
        paths = {name: path for path, name in _ENTRY.findall(page.read_text())}
        for item in list(_walk(pkg)):
            if item.is_module:
                _know_errors(item, pkg["errors"])
            if item.docstring is not None:
                text = _ROLE.sub(
                    lambda role, item=item: _link(role[1], item, paths), item.docstring.value
                )
                item.docstring.value = _EXAMPLE.sub(r"\1Examples:", text)


def _link(name: str, item: Any, paths: dict[str, str]) -> str:
    """The name with its anchor on the page, if it has one; a method may stand without its class."""
    owner, _, method = name.partition(".")
    if owner not in paths:
        own = item if item.is_class else item.parent
        owner, method = (
            (own.name, name) if own is not None and name in own.members else (name, method)
        )
    if owner not in paths:
        return f"`{name}`"
    return f"[`{name}`][{paths[owner]}{'.' * bool(method)}{method}]"


def _know_errors(module: Any, errors: Any) -> None:
    """What a module's docstrings say is raised can be looked up from there."""
    for name, error in errors.members.items():
        if error.is_class and name not in module.members:
            module.set_member(name, griffe.Alias(name, error.path, parent=module))


def _walk(item: Any) -> Iterator[Any]:
    """``item`` and all that is defined in it; members after their owner."""
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from _walk(member)
