"""The cut of a line that holds the least gradients, by dynamic programming."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_groups.step_cost import Ints, layout

Cut: TypeAlias = tuple[tuple[int, int], ...]
"""Tiles of a line as ``(start, stop)``, in order."""

_POSITIONS = 48
"""Positions of a long line of unlike sizes where a cut is considered."""


@lru_cache(maxsize=1 << 12)
def least_held(
    sizes: tuple[int, ...], ranks: int, limit: int, tile_prices: tuple[float, ...]
) -> tuple[Cut | None, ...]:
    """For each price the cut whose tiles hold least, where a tile costs so many elements more.

    Args:
        limit: most elements of a tile; a single parameter may be larger.

    Returns:
        Of equal cuts the one with the shorter last tile; None where no cut at the positions
        that are considered keeps to the limit.
    """
    if len(set(sizes)) == 1:
        return _alike(sizes, ranks, limit, np.array(tile_prices))
    return tuple(_unlike(sizes, ranks, limit, price) for price in tile_prices)


def _alike(
    sizes: tuple[int, ...], ranks: int, limit: int, prices: NDArray[np.float64]
) -> tuple[Cut, ...]:
    """For equal sizes what a tile holds depends on its length alone; all prices at once."""
    lengths, held = _lengths(sizes, ranks)
    allowed = (lengths * sizes[0] <= limit) | (lengths == 1)
    lengths, costs = lengths[allowed], held[allowed]
    each, prices = np.arange(len(prices)), prices[:, None]
    best = np.zeros((len(prices), len(sizes) + 1))
    last = np.zeros(best.shape, dtype=np.int64)
    for stop in range(1, len(sizes) + 1):
        if stop >= lengths[-1]:
            starts = stop - lengths
        else:
            starts = stop - lengths[: lengths.searchsorted(stop, side="right")]
        totals = best.take(starts, axis=1)
        totals += costs[: len(starts)]
        totals += prices
        chosen = totals.argmin(axis=1)
        best[:, stop], last[:, stop] = totals[each, chosen], starts[chosen]
    return tuple(_tiles(row, range(len(sizes) + 1)) for row in last)


def _unlike(sizes: tuple[int, ...], ranks: int, limit: int, tile_price: float) -> Cut | None:
    positions, elements, held = _pieces(sizes, ranks)
    count = len(positions) - 1
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    last = np.zeros(count + 1, dtype=np.int64)
    for index in range(1, count + 1):
        fits = elements[index, :index] <= limit
        fits[index - 1] |= index == 1 or positions[index] - positions[index - 1] == 1
        totals = np.where(fits, best[:index] + held[index, :index] + tile_price, np.inf)
        chosen = index - 1 - int(totals[::-1].argmin())
        best[index], last[index] = totals[chosen], chosen
    return None if np.isinf(best[count]) else _tiles(last, positions)


def _tiles(last: Ints, positions: Sequence[int]) -> Cut:
    ends = [len(last) - 1]
    while ends[-1] > 0:
        ends.append(int(last[ends[-1]]))
    return tuple(pairwise(positions[index] for index in reversed(ends)))


def _held(sizes: tuple[int, ...], ranks: int) -> int:
    """Elements of gradients that the worst rank holds for a group."""
    found = layout(sizes, ranks)
    return int((found.touched + found.padding).max())


@lru_cache(maxsize=64)
def _lengths(sizes: tuple[int, ...], ranks: int) -> tuple[Ints, Ints]:
    """Lengths of tiles of equal parameters that are worth a look, and what each holds."""
    count = len(sizes)
    aligned = range(ranks, count + 1, ranks)
    some = {1, 2, 3, 4, count % ranks, *aligned, *range(1, min(ranks, count) + 1), count}
    lengths = sorted(k for k in some if 1 <= k <= count)
    held = [_held(sizes[:length], ranks) for length in lengths]
    return np.array(lengths, dtype=np.int64), np.array(held, dtype=np.int64)


@lru_cache(maxsize=64)
def _pieces(sizes: tuple[int, ...], ranks: int) -> tuple[list[int], Ints, Ints]:
    """Positions, and between any two (later, earlier) the elements and what they hold."""
    positions = _positions(sizes)
    sums = np.concatenate([[0], np.cumsum(sizes)])[positions]
    held = np.zeros((len(positions), len(positions)), dtype=np.int64)
    for index, stop in enumerate(positions):
        for earlier, start in enumerate(positions[:index]):
            held[index, earlier] = _held(sizes[start:stop], ranks)
    return positions, sums[:, None] - sums[None, :], held


def _positions(sizes: tuple[int, ...]) -> list[int]:
    """Where to consider cuts: everywhere, or around the largest and evenly between."""
    count = len(sizes)
    if count <= _POSITIONS:
        return list(range(count + 1))
    largest = sorted(range(count), key=lambda index: -sizes[index])[: _POSITIONS // 4]
    chosen = {0, count, *largest, *(index + 1 for index in largest)}
    sums = np.cumsum(sizes)
    even = np.searchsorted(sums, np.linspace(0, sums[-1], _POSITIONS // 2))
    return sorted(chosen | {int(index) for index in even})
