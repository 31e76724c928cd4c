"""Pairwise tables: few cases in which every pair of settings meets, instead of the product."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import pytest

Row = dict[str, Any]


def pairwise(
    settings: Mapping[str, Sequence[Any]], allowed: Callable[..., bool] = lambda **row: True
) -> list[Row]:
    """Rows with one value for each setting, so that any two values of two settings meet in one.

    Each row is the first one of the product in which the most missing pairs meet. So a table is
    the same in every run, and 40 rows often replace thousands.

    Args:
        settings: the values of each setting; they are compared by ``repr``.
        allowed: called with a row as keywords; rows for which it is false are left out, and so
            are pairs that only such rows have.
    """
    product = (
        dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())
    )
    rows = [(row, frozenset(pairs(row))) for row in product if allowed(**row)]
    missing = {pair for _, met in rows for pair in met}
    table = []
    while missing:
        row, met = max(rows, key=lambda each: len(each[1] & missing))
        table.append(row)
        missing -= met
    return table


def pairs(row: Row) -> Iterator[Hashable]:
    """The pairs of settings that meet in a row."""
    yield from itertools.combinations([(name, repr(value)) for name, value in row.items()], 2)


def label(row: Row) -> str:
    """A row as the id of a test."""
    return "-".join(str(value) for value in row.values())


def long_on_four_ranks(rows: list[Row]) -> list[Any]:
    """Rows for ``parametrize``; those with a ``world`` of 4, which cost twice as much, are long."""
    marks = {4: pytest.mark.long}
    return [pytest.param(row, marks=marks.get(row["world"], ())) for row in rows]


def few_now(rows: list[Row], now: int = 4) -> list[Any]:
    """Rows for ``parametrize``; all but the first, in which most pairs meet, are long."""
    return [
        pytest.param(row, id=label(row), marks=() if index < now else pytest.mark.long)
        for index, row in enumerate(rows)
    ]
