"""Packing against brute force over all ways to cut a sequence."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import example, given, settings, strategies as st

from moe_groups.groups.packing import pack

Tiles = list[tuple[int, int]]


def all_cuts(count: int) -> Iterator[Tiles]:
    for tiles in range(1, count + 1):
        for inner in combinations(range(1, count), tiles - 1):
            edges = [0, *inner, count]
            yield list(pairwise(edges))


def allowed(sizes: Sequence[int], tiles: Tiles, cap: int) -> bool:
    """Over the cap only where a tile is a single item."""
    return all(sum(sizes[a:b]) <= cap or b - a == 1 for a, b in tiles)


def score(sizes: Sequence[int], tiles: Tiles) -> tuple[int, int]:
    return len(tiles), max(sum(sizes[a:b]) for a, b in tiles)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 30))
@example([5, 1, 1, 5], 7)  # greedy gives 7 + 5
@example([99, 0, 0, 99], 10)  # zeros between two items that are too large
@example([0, 0, 0], 1)
@settings(max_examples=400)
def test_fewest_tiles_then_smallest_largest(sizes: list[int], cap: int) -> None:
    tiles = pack(sizes, cap)
    best = min(score(sizes, t) for t in all_cuts(len(sizes)) if allowed(sizes, t, cap))
    assert allowed(sizes, tiles, cap)
    assert score(sizes, tiles) == best


@given(st.lists(st.integers(0, 10**12)), st.integers(1, 10**12) | st.none())
def test_tiles_cover_the_sequence_in_order(sizes: list[int], cap: int | None) -> None:
    tiles = pack(sizes, cap)
    assert [i for start, stop in tiles for i in range(start, stop)] == list(range(len(sizes)))
    assert all(start < stop for start, stop in tiles)
    if cap is None:
        assert len(tiles) == bool(sizes)


class Counted(int):
    """A size that counts the additions and comparisons it takes part in."""

    operations = 0

    def __add__(self, other: int) -> "Counted":
        Counted.operations += 1
        return Counted(int(self) + int(other))

    __radd__ = __add__

    def __lt__(self, other: int) -> bool:
        Counted.operations += 1
        return int(self) < int(other)

    def __gt__(self, other: int) -> bool:
        Counted.operations += 1
        return int(self) > int(other)


@pytest.mark.parametrize("cap", [1, 13, 100, 10_000])
def test_work_grows_linearly(cap: int) -> None:
    """But for the logarithm of the bisection; no clock, so that it cannot be flaky."""

    def operations(count: int) -> int:
        sizes = [Counted(1 + 7 * i % 13) for i in range(count)]
        Counted.operations = 0
        pack(sizes, cap)
        return Counted.operations

    assert 20_000 <= operations(20_000) <= 5 * operations(5_000)
