"""Pairwise tables lose no pair and hold nothing that is not allowed."""

import itertools

from hypothesis import given, strategies as st

from tests.support.pairwise import pairs, pairwise

SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=5)


@given(SIZES, st.integers(0, 10))
def test_every_allowed_pair_meets_in_an_allowed_row(sizes: list[int], forbidden: int) -> None:
    settings = {str(index): range(size) for index, size in enumerate(sizes)}

    def allowed(**row: int) -> bool:
        return sum(row.values()) % 11 != forbidden

    rows = [
        dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())
    ]
    possible = {pair for row in rows if allowed(**row) for pair in pairs(row)}
    table = pairwise(settings, allowed)
    assert all(allowed(**row) for row in table)
    assert {pair for row in table for pair in pairs(row)} == possible
    assert len(table) <= len(rows)


def test_a_table_is_far_smaller_than_the_product() -> None:
    table = pairwise({name: range(4) for name in "abcde"})
    assert len(table) <= 2 * 4**2 < 4**5
