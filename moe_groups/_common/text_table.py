"""Tables of text, for a terminal and for a notebook."""

import html
from collections.abc import Collection, Sequence


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
