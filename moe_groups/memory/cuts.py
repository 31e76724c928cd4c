"""Cuts that may peak low: what the planner prices.

A *line* is what one group would hold without a cap (its parameters in order); a *cut* of
a line is the list of its tiles. For each bound on the partition and each price of a tile,
dynamic programming finds the cut of every line that holds the least gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_groups.groups.grouping import DEEPSPEED_MAX_GROUP_SIZE, padded_partition
from moe_groups.groups.packing import fill, pack
from moe_groups.memory.group_layout import GroupOnRanks, Ints, layout
from moe_groups.memory.step_cost import StepSettings

Cut: TypeAlias = tuple[tuple[int, int], ...]
"""Tiles of a line as ``(start, stop)``, in order."""

_POSITIONS = 48
"""Positions of a long line of other sizes where a cut is considered."""


@lru_cache(maxsize=1 << 12)
def cheapest_cuts(
    sizes: tuple[int, ...], ranks: int, limit: int, tile_prices: tuple[float, ...]
) -> tuple[Cut | None, ...]:
    """For each price of a tile, in elements, the cut whose tiles hold the fewest gradients.

    Args:
        limit: most elements of a tile; a single parameter may be larger.

    Returns:
        Of equal cuts the one with the shorter last tile; None if no cut at the positions
        considered stays within the limit.
    """
    if len(set(sizes)) == 1:
        return _equal_sizes(sizes, ranks, limit, np.array(tile_prices))
    return tuple(_other_sizes(sizes, ranks, limit, price) for price in tile_prices)


def _equal_sizes(
    sizes: tuple[int, ...], ranks: int, limit: int, prices: NDArray[np.float64]
) -> tuple[Cut, ...]:
    """For equal sizes: a tile's gradients depend on its length alone; all prices at once."""
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


def _other_sizes(sizes: tuple[int, ...], ranks: int, limit: int, tile_price: float) -> Cut | None:
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
    """Lengths of tiles of equal parameters to consider, and the gradients of each."""
    count = len(sizes)
    aligned = range(ranks, count + 1, ranks)
    some = {1, 2, 3, 4, count % ranks, *aligned, *range(1, min(ranks, count) + 1), count}
    lengths = sorted(k for k in some if 1 <= k <= count)
    held = [_held(sizes[:length], ranks) for length in lengths]
    return np.array(lengths, dtype=np.int64), np.array(held, dtype=np.int64)


@lru_cache(maxsize=64)
def _pieces(sizes: tuple[int, ...], ranks: int) -> tuple[list[int], Ints, Ints]:
    """Positions, and between any two (later, earlier) the elements and their gradients."""
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


_ALL = 48
"""Up to so many parameters of a line every number of them is tried as a tile."""


@dataclass(frozen=True, slots=True)
class Line:
    """Parameters that may share a group, in order.

    Attributes:
        sizes: elements of each.
        ranks: ranks that share them.
        partition_of: the partition that each rank of the data-parallel world owns.
        count: number of lines equal to this one.
        dense: it has no experts.
    """

    sizes: tuple[int, ...]
    ranks: int
    partition_of: Ints
    count: int = 1
    dense: bool = False

    def tile(self, start: int, stop: int) -> GroupOnRanks:
        return GroupOnRanks(self.sizes[start:stop], self.partition_of, self.ranks, self.count)


def proposed_cuts(lines: Sequence[Line], settings: StepSettings) -> Iterator[tuple[Cut, ...]]:
    """Cuts of all lines to price: simple ones, and those under a bound on the partition."""
    yield from _simple(lines)
    for bound in _bounds(lines):
        yield tuple(_under_bound(line, bound) for line in lines)
        if settings.wrapper == "zero" and not settings.compact:
            prices = tuple(_tile_prices(lines))
            yield from zip(*(_cheapest_cuts(line, bound, prices) for line in lines), strict=True)
        if settings.wrapper == "zero" and settings.compact:
            yield _growing(lines, settings, bound)


def _simple(lines: Sequence[Line]) -> Iterator[tuple[Cut, ...]]:
    """No cap; DeepSpeed's split; for experts alone and for all: tiles of so many, so many tiles."""
    whole = tuple(((0, len(line.sizes)),) for line in lines)
    yield whole
    dense = [line.dense for line in lines]
    stock = (tuple(fill(line.sizes, DEEPSPEED_MAX_GROUP_SIZE)) for line in lines)
    yield tuple(w if d else t for d, w, t in zip(dense, whole, stock, strict=True))
    for cut in (_so_many, _even, _greedy):
        for number in _numbers(lines, cut is _so_many):
            tiles = tuple(cut(line, number) for line in lines)
            yield tiles
            yield tuple(w if d else t for d, w, t in zip(dense, whole, tiles, strict=True))


def _numbers(lines: Sequence[Line], multiples_of_ranks: bool) -> list[int]:
    """Numbers of parameters or of tiles to try: all, or some of each magnitude."""
    most = max(len(line.sizes) for line in lines)
    some = set(range(1, most + 1)) if most <= _ALL else set(map(int, np.geomspace(1, most, _ALL)))
    if multiples_of_ranks:
        some |= {line.ranks * many for line in lines for many in (1, 2, 4)}
    return sorted(some)


def _so_many(line: Line, number: int) -> Cut:
    """Tiles of ``number`` parameters."""
    return tuple(pairwise([*range(0, len(line.sizes), number), len(line.sizes)]))


def _even(line: Line, number: int) -> Cut:
    """At most ``number`` tiles, the largest as small as the order allows, if sizes are equal."""
    return tuple(pack(line.sizes, max(max(line.sizes), -(-sum(line.sizes) // number))))


def _greedy(line: Line, number: int) -> Cut:
    """As DeepSpeed's split cuts experts: filled one after the other, to a part of the whole."""
    return tuple(fill(line.sizes, max(max(line.sizes), -(-sum(line.sizes) // number))))


def _bounds(lines: Sequence[Line]) -> list[int]:
    """Sizes of partitions to try: between those without a cap and those of single parameters."""
    whole = max(padded_partition(sum(line.sizes), line.ranks) for line in lines)
    least = max(padded_partition(max(line.sizes), line.ranks) for line in lines)
    aligned = {max(line.sizes) * many for line in lines for many in (1, 2, 3, 4, 6, 8)}
    steps = np.geomspace(least, max(whole, least + 1), num=16)
    return sorted(b for b in {whole, least, *aligned, *map(int, steps)} if least <= b <= whole)


def _tile_prices(lines: Sequence[Line]) -> list[float]:
    """Elements of held gradients that a tile must save: none to all of them."""
    most = max(max(line.sizes) for line in lines)
    return [0.5, *(most * factor for factor in (1 / 64, 1 / 8, 0.5, 1.0, 2.0, 4.0))]


def _under_bound(line: Line, bound: int) -> Cut:
    """The fewest tiles whose partitions stay under the bound, of even size."""
    return tuple(pack(line.sizes, max(1, bound // 2 * 2 * line.ranks)))


def _cheapest_cuts(line: Line, bound: int, tile_prices: tuple[float, ...]) -> list[Cut]:
    """The cuts that hold the least gradients, where each tile costs one of the prices more."""
    limit = bound // 2 * 2 * line.ranks
    cuts = cheapest_cuts(line.sizes, line.ranks, limit, tile_prices)
    return [cut or _under_bound(line, bound) for cut in cuts]


def _growing(lines: Sequence[Line], settings: StepSettings, first: int) -> tuple[Cut, ...]:
    """Tiles that grow as gradients are released, from partitions of ``first`` elements on."""
    per_element = max(settings.temporary_bytes + 4, 6)
    left = sum(
        settings.grad_bytes * line.count * padded_partition(sum(line.sizes), line.ranks)
        for line in lines
    )
    budget = left + per_element * first
    cuts: dict[int, Cut] = {}
    for index in sorted(range(len(lines)), key=lambda i: sum(lines[i].sizes)):
        line = lines[index]
        cuts[index] = _under_bound(line, max(2, (budget - left) // per_element))
        left -= settings.grad_bytes * line.count * padded_partition(sum(line.sizes), line.ranks)
    return tuple(cuts[index] for index in range(len(lines)))
