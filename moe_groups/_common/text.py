"""Sizes and tables as people read and write them."""

import html
import re
from collections.abc import Collection, Sequence

from moe_groups.errors import InvalidArgumentError

_FACTORS = {"": 1, "B": 1} | {
    f"{prefix}{end}": base**power
    for base, end in ((1024, "iB"), (1000, "B"))
    for power, prefix in enumerate("KMGT", 1)
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)\s*", re.IGNORECASE)


def parse_bytes(value: int | float | str, name: str) -> int:
    """``"2GiB"``, ``"1.5 GB"`` or a number, in bytes.

    Args:
        name: the argument's name, for the error message.

    Raises:
        InvalidArgumentError: not a size, or below 1.
    """
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match:
        unit = next(u for u in _FACTORS if u.lower() == match[2].lower())
        value = float(match[1]) * _FACTORS[unit]
    if isinstance(value, str | bool) or not 1 <= value < float("inf"):
        raise InvalidArgumentError(
            f"{name}={value!r} is not a size: give bytes, or a string such as '2GiB' or '500 MB'."
        )
    return int(value)


def show_bytes(value: float) -> str:
    """Three significant digits and a binary unit: ``2.03 GiB``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1000 and len(units) > 1:
        value /= 1024
        units.pop(0)
    digits = 0 if units[0] == "B" or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f} {units[0]}"


def text_table(
    rows: Sequence[Sequence[str]], headers: Sequence[str], right: Collection[int]
) -> str:
    """Rows under a line of headers and one of dashes; columns in ``right`` are right-aligned."""
    # Two more than the header, because narrow columns would run into each other.
    widths = [
        max([len(header) + 2, *map(len, cells)])
        for header, *cells in zip(headers, *rows, strict=True)
    ]

    def line(cells: Sequence[str]) -> str:
        placed = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(placed).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])


def html_table(
    rows: Sequence[Sequence[str]], headers: Sequence[str], right: Collection[int]
) -> str:
    """The same as an HTML table; cells and headers are escaped."""

    def line(kind: str, cells: Sequence[str]) -> str:
        styles = (' style="text-align: right;"' if c in right else "" for c in range(len(cells)))
        parts = zip(styles, map(html.escape, cells), strict=True)
        return f"<tr>{''.join(f'<{kind}{style}>{cell}</{kind}>' for style, cell in parts)}</tr>"

    head, body = line("th", headers), [line("td", row) for row in rows]
    return "\n".join(
        ["<table>", "<thead>", head, "</thead>", "<tbody>", *body, "</tbody>", "</table>"]
    )
