"""Docstrings for the API page: roles become links, "Example:" the section "Examples:"."""

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`(?:moe_groups\.)?(\w+)`")
_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrite all docstrings below ``pkg``."""
        items = list(_walk(pkg))
        public = {str(name) for name in pkg.exports or ()}
        paths = {item.name: item.path for item in items if item.name in public}

        def link(role: re.Match[str]) -> str:
            path = paths.get(role[1])
            return f"[`{role[1]}`][{path}]" if path else f"`{role[1]}`"

        for item in items:
            if item.docstring is not None:
                text = _ROLE.sub(link, item.docstring.value)
                item.docstring.value = _EXAMPLE.sub(r"\1Examples:", text)


def _walk(item: Any) -> Iterator[griffe.Object]:
    """``item`` and all that is defined in it; members after their owner."""
    yield item
    for member in item.members.values():
        if not member.is_alias:
            yield from _walk(member)
