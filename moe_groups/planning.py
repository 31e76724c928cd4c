"""Where to cut groups so that the optimizer step peaks low: the search, on plain integers.

A *line* is what one group would hold without a cap (its parameters in order); a *cut* of
a line is the list of its tiles. For each bound on the partition and each price of a tile,
dynamic programming finds the cut of every line that holds the least gradients; all these
are then priced exactly with :func:`moe_groups.step_cost.step_cost`, and the ones that no
other beats in both peak and number of groups are the trade-off curve.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product

import numpy as np

from moe_groups.least_held import Cut, least_held
from moe_groups.packing import pack
from moe_groups.plan import padded_partition
from moe_groups.step_cost import GroupOnRanks, Ints, StepSettings, step_cost

_EXHAUSTIVE = 2048
"""Up to so many ways to cut all lines are tried out."""
_BUNDLES = 8
"""Lines that are all alike are cut in at most so many ways."""
_MIXED = 24
"""Neighbours on the trade-off curve between which mixtures are tried."""
_STOCK_CAP = 178956971
_LAST = 3
"""Groups beside the largest that are tried in the last place."""


@dataclass(frozen=True, slots=True)
class Line:
    """Parameters that may share a group, in order.

    Attributes:
        sizes: elements of each.
        ranks: ranks that share them.
        partition_of: the partition that each rank of the data-parallel world owns.
        count: lines that are all like this one.
    """

    sizes: tuple[int, ...]
    ranks: int
    partition_of: Ints
    count: int = 1

    def tile(self, start: int, stop: int) -> GroupOnRanks:
        return GroupOnRanks(self.sizes[start:stop], self.partition_of, self.ranks, self.count)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to cut all lines.

    Attributes:
        cuts: the cut of each line.
        groups: number of groups.
        peak: step peak T + R of the worst rank, bytes.
    """

    cuts: tuple[Cut, ...]
    groups: int
    peak: int


def orders(tiles: Sequence[GroupOnRanks], settings: StepSettings) -> Iterator[list[int]]:
    """Orders of stepping, of which one peaks lowest: the largest partition last.

    ZeRO lets go of gradients as it steps, all at the end or group by group; either way an
    exchange of two neighbours shows that the smaller goes first. Where all gradients are
    let go at the end, the last group steps without them, and for the last place another
    one can be better, as one that needs no copy to be flattened. BF16_Optimizer holds on to
    its gradients, and the order stays as it is.
    """
    indices = list(range(len(tiles)))
    if settings.wrapper == "bf16_optimizer":
        yield indices
        return
    ascending = sorted(indices, key=lambda index: tiles[index].layout.partition)
    yield ascending
    if not settings.compact:
        for place in range(2, 2 + min(_LAST, len(tiles) - 1)):
            last = ascending[-place]
            yield [*(index for index in ascending if index != last), last]


def price(
    lines: Sequence[Line], cuts: Sequence[Cut], settings: StepSettings, all_orders: bool = True
) -> Candidate:
    """The candidate for these cuts, with its exact peak; in one order, or in the best."""
    tiles = [line.tile(*ends) for line, cut in zip(lines, cuts, strict=True) for ends in cut]
    if all_orders:
        peak, _ = best_order(tiles, settings)
    else:
        order = next(orders(tiles, settings))
        peak = int(step_cost([tiles[index] for index in order], settings).peak.max())
    return Candidate(tuple(cuts), sum(tile.count for tile in tiles), peak)


def best_order(tiles: Sequence[GroupOnRanks], settings: StepSettings) -> tuple[int, list[int]]:
    """The lowest peak of the worst rank over :func:`orders`, and the order."""
    return min(
        (
            (int(step_cost([tiles[i] for i in order], settings).peak.max()), order)
            for order in orders(tiles, settings)
        ),
        key=lambda priced: priced[0],
    )


def trade_off(lines: Sequence[Line], settings: StepSettings) -> list[Candidate]:
    """The best candidates found, from few groups to low peaks; each beats those before it.

    Where there are few ways to cut the lines, all are tried. Else lines that are alike are
    searched together, in up to eight bundles.
    """
    if _ways(lines) <= _EXHAUSTIVE:
        return _best(price(lines, cuts, settings) for cuts in _all_cuts(lines))
    bundles, members = _bundle(lines)
    cuts = dict.fromkeys(_search(bundles, settings))
    best = _best(price(bundles, one, settings, False) for one in cuts)
    best = _best([*best, *_mixtures(bundles, best, settings)])
    best = _best(price(bundles, candidate.cuts, settings) for candidate in best)
    return [
        Candidate(tuple(found.cuts[bundle] for bundle in members), found.groups, found.peak)
        for found in best
    ]


def _best(found: Iterable[Candidate]) -> list[Candidate]:
    best: list[Candidate] = []
    for candidate in sorted(found, key=lambda c: (c.groups, c.peak, c.cuts)):
        if not best or candidate.peak < best[-1].peak:
            best.append(candidate)
    return best


def _bundle(lines: Sequence[Line]) -> tuple[list[Line], list[int]]:
    """Lines that are alike as few lines with a count, and the bundle of each line."""
    alike: dict[tuple[tuple[int, ...], int, bytes], list[int]] = {}
    for index, line in enumerate(lines):
        key = line.sizes, line.ranks, line.partition_of.tobytes()
        alike.setdefault(key, []).append(index)
    bundles: list[Line] = []
    member_of = [0] * len(lines)
    for indices in alike.values():
        for part in np.array_split(np.array(indices), min(len(indices), _BUNDLES)):
            for index in part:
                member_of[index] = len(bundles)
            bundles.append(replace(lines[part[0]], count=sum(lines[i].count for i in part)))
    return bundles, member_of


def _mixtures(
    lines: Sequence[Line], best: list[Candidate], settings: StepSettings
) -> Iterator[Candidate]:
    """Between neighbours on the curve: some lines cut as in one, the rest as in the other."""
    for one, other in pairwise(best[:_MIXED]):
        differ = [
            i for i, pair in enumerate(zip(one.cuts, other.cuts, strict=True)) if pair[0] != pair[1]
        ]
        for number in range(1, len(differ)):
            chosen = set(differ[:number])
            cuts = [(other if i in chosen else one).cuts[i] for i in range(len(lines))]
            yield price(lines, cuts, settings, False)


def _ways(lines: Sequence[Line]) -> int:
    exponent = sum(len(line.sizes) - 1 for line in lines)
    return 1 << min(exponent, 60)


def _all_cuts(lines: Sequence[Line]) -> Iterator[tuple[Cut, ...]]:
    def cuts(items: int) -> Iterator[Cut]:
        for number in range(items):
            for inner in combinations(range(1, items), number):
                yield tuple(pairwise((0, *inner, items)))

    yield from product(*(list(cuts(len(line.sizes))) for line in lines))


def _search(lines: Sequence[Line], settings: StepSettings) -> Iterator[tuple[Cut, ...]]:
    """Cuts of all lines under one bound on the partition, for many bounds."""
    whole = tuple(((0, len(line.sizes)),) for line in lines)
    yield whole
    yield tuple(
        _greedy(line) if line.ranks < len(line.partition_of) else cut
        for line, cut in zip(lines, whole, strict=True)
    )
    for many in (1, 2, 4):
        yield tuple(_aligned(line, many) for line in lines)
    for bound in _bounds(lines):
        yield tuple(_under_bound(line, bound) for line in lines)
        if settings.wrapper == "zero" and not settings.compact:
            prices = tuple(_tile_prices(lines))
            yield from zip(*(_least_held(line, bound, prices) for line in lines), strict=True)
        if settings.wrapper == "zero" and settings.compact:
            yield _growing(lines, settings, bound)


def _greedy(line: Line) -> Cut:
    """As DeepSpeed's split cuts experts, at its default cap."""
    cuts, filled = [0], 0
    for index, size in enumerate(line.sizes):
        if index and filled + size > _STOCK_CAP:
            cuts.append(index)
            filled = 0
        filled += size
    return tuple(pairwise([*cuts, len(line.sizes)]))


def _aligned(line: Line, many: int) -> Cut:
    """Tiles of as many parameters as there are ranks, times ``many``."""
    return tuple(pairwise([*range(0, len(line.sizes), line.ranks * many), len(line.sizes)]))


def _bounds(lines: Sequence[Line]) -> list[int]:
    """Sizes of partitions to try: what no cap gives, what single parameters need, and between."""
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
    """The fewest tiles whose partitions stay under the bound, and those even."""
    return tuple(pack(line.sizes, max(1, bound // 2 * 2 * line.ranks)))


def _least_held(line: Line, bound: int, tile_prices: tuple[float, ...]) -> list[Cut]:
    """The cuts that hold the least gradients, where each tile costs one of the prices more."""
    limit = bound // 2 * 2 * line.ranks
    cuts = least_held(line.sizes, line.ranks, limit, tile_prices)
    return [cut or _under_bound(line, bound) for cut in cuts]


def _growing(lines: Sequence[Line], settings: StepSettings, first: int) -> tuple[Cut, ...]:
    """Tiles that grow as gradients are let go, from partitions of ``first`` elements on."""
    per_element = max(settings.temporaries + 4, 6)
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
