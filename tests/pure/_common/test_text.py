"""Tables of text, against tabulate."""

from xml.etree import ElementTree

import tabulate
from hypothesis import given, strategies as st

from moe_groups._common.text import html_table, text_table

CELLS = st.text("ab<&-.1,", max_size=6)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[str]], list[str], set[int]]:
    columns = draw(st.integers(1, 4))
    line = st.lists(CELLS, min_size=columns, max_size=columns)
    rows, headers = draw(st.lists(line, min_size=1, max_size=4)), draw(line)
    return rows, headers, draw(st.sets(st.integers(0, columns - 1)))


@given(tables())
def test_text(table: tuple[list[list[str]], list[str], set[int]]) -> None:
    rows, headers, right = table
    sides = ["right" if column in right else "left" for column in range(len(headers))]
    assert text_table(rows, headers, right) == tabulate.tabulate(
        rows, headers, tablefmt="simple", colalign=sides, disable_numparse=True
    )


@given(tables())
def test_html(table: tuple[list[list[str]], list[str], set[int]]) -> None:
    rows, headers, right = table
    for number, line in enumerate(ElementTree.fromstring(html_table(*table)).iter("tr")):
        assert [cell.text or "" for cell in line] == [headers, *rows][number]
        assert [column for column, cell in enumerate(line) if cell.attrib] == sorted(right)


def test_no_rows() -> None:
    assert text_table([], ["name", "size"], [1]).splitlines() == [
        "name      size",
        "------  ------",
    ]
