"""Where to cut groups so that the optimizer step peaks low: the search, on plain integers.

The cuts that :mod:`moe_groups.memory.cuts` proposes, or all of them where those are few, are
priced exactly with :func:`moe_groups.memory.step_cost.step_cost`, in the best order of
stepping; the ones that no other beats in both peak and number of groups are the trade-off curve.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product

import numpy as np

from moe_groups._common.arguments import Bytes
from moe_groups._common.text import parse_bytes, show_bytes
from moe_groups.errors import PlanError
from moe_groups.memory.cuts import Cut, Line, proposed_cuts
from moe_groups.memory.group_layout import GroupOnRanks
from moe_groups.memory.step_cost import StepSettings, step_cost

_EXHAUSTIVE = 2048
"""Up to this number of ways to cut all lines, all are tried."""
_BUNDLES = 8
"""Equal lines are cut in at most this number of ways."""
_MIXED = 24
"""Neighbours on the trade-off curve between which mixtures are tried."""
_LAST = 3
"""Groups beside the largest that are tried in the last place."""


GROUP_PRICE = 64 << 20
"""Bytes that one more group must save for "auto".

A group costs about 1.7 ms of a step under ZeRO on gloo ranks (``benchmarks/group_cost.py``): a
tenth of a percent of a step of two seconds, priced like a tenth of a percent of 64 GiB of memory.
With ``lean_step`` a group saves nothing, and there is one plan.
"""


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

    ZeRO releases gradients while it steps, group by group or all before the last group; in
    both cases exchanging two neighbours shows that the smaller should step first. If all are
    released before the last group, that group steps without them, and another last group can
    be better, such as one that needs no copy to be flattened. BF16_Optimizer keeps its
    gradients, and the order is not changed.
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

    If there are few ways to cut the lines, all are tried. Otherwise equal lines are searched
    together, in up to eight bundles. With ``lean_step`` the peak hardly depends on the groups, and
    nothing is cut.
    """
    if settings.tile_bytes:
        return [price(lines, [((0, len(line.sizes)),) for line in lines], settings)]
    if _ways(lines) <= _EXHAUSTIVE:
        return _best(price(lines, cuts, settings) for cuts in _all_cuts(lines))
    bundles, members = _bundle(lines)
    cuts = dict.fromkeys(proposed_cuts(bundles, settings))
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
    """Equal lines as one line with a count, and the bundle of each line."""
    equal: dict[tuple[tuple[int, ...], int, bytes, bool], list[int]] = {}
    for index, line in enumerate(lines):
        key = line.sizes, line.ranks, line.partition_of.tobytes(), line.dense
        equal.setdefault(key, []).append(index)
    bundles: list[Line] = []
    member_of = [0] * len(lines)
    for indices in equal.values():
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


def choose(
    curve: Sequence[Candidate], budget: Bytes, max_groups: int | None, split_by: str, stock: int
) -> Candidate:
    """The point of the curve that the budget or the number of groups asks for.

    Args:
        stock: the peak of DeepSpeed's own split, bytes: "auto" stays within it where it can.

    Raises:
        PlanError: there is none.
    """
    if max_groups is not None:
        within = [candidate for candidate in curve if candidate.groups <= max_groups]
        if not within:
            coarser = "" if split_by == "parallel_group" else ", or use a coarser split_by"
            raise PlanError(
                f"split_by={split_by!r} needs at least {curve[0].groups} groups, more than "
                f"max_groups={max_groups}: raise it{coarser}."
            )
        return within[-1]
    if budget == "auto":
        no_worse = [candidate for candidate in curve if candidate.peak <= stock]
        return min(no_worse or curve, key=lambda c: (c.peak + GROUP_PRICE * c.groups, c.groups))
    most = parse_bytes(budget, "step_memory_budget")
    for candidate in curve:
        if candidate.peak <= most:
            return candidate
    least = curve[-1]
    raise PlanError(
        f"no groups step in {show_bytes(most)} on every rank: with split_by={split_by!r} the "
        f"lowest peak found is {show_bytes(least.peak)}, of {least.groups} groups. Give "
        f"step_memory_budget={least.peak}; the hints of plan_param_groups with that budget say "
        "what lowers the peak."
    )
