"""Cut a sequence of sizes into tiles under a cap: plain integers, no torch."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise


def pack(sizes: Sequence[int], cap: int | None) -> list[tuple[int, int]]:
    """Cut ``sizes`` into consecutive tiles whose sums stay at or under ``cap``.

    Among all ways to do so the result has the fewest tiles and, with that number, the
    smallest largest tile; the order of the sizes is kept. An item larger than the cap
    is a tile of its own, so a tile exceeds the cap only if it is a single item.

    The fewest tiles come from filling greedily; the smallest largest tile with that
    number is the linear partition problem, solved by bisection on the tile size
    (the smallest size under which greedy filling needs no more tiles).

    Args:
        sizes: sizes of the items in elements, none negative.
        cap: largest sum of a tile in elements, at least 1; None for no cap.

    Returns:
        ``(start, stop)`` index pairs that cover ``range(len(sizes))`` in order.

    Example:
        >>> pack([4, 4, 4, 4, 4], cap=12)   # not 12 + 8 but as even as order allows
        [(0, 3), (3, 5)]
        >>> pack([5, 1, 1, 5], cap=7)       # greedy would give 7 + 5
        [(0, 2), (2, 4)]
        >>> pack([1, 99, 1], cap=10)
        [(0, 1), (1, 2), (2, 3)]
    """
    assert cap is None or cap >= 1
    if not sizes:
        return []
    if cap is None:
        return [(0, len(sizes))]
    tiles: list[tuple[int, int]] = []
    for start, stop in _runs_within_cap(sizes, cap):
        tiles += _pack_run(sizes, start, stop, cap)
    return tiles


def fill(sizes: Sequence[int], cap: float) -> list[tuple[int, int]]:
    """Cut as DeepSpeed's split cuts experts: each tile takes items until the next one is too much.

    Example:
        >>> fill([5, 1, 1, 5], cap=7)
        [(0, 3), (3, 4)]
    """
    starts, filled = [0], 0
    for index, size in enumerate(sizes):
        if index and filled + size > cap:
            starts.append(index)
            filled = 0
        filled += size
    return list(pairwise([*starts, len(sizes)])) if sizes else []


def _runs_within_cap(sizes: Sequence[int], cap: int) -> Iterator[tuple[int, int]]:
    """Maximal runs of items that fit the cap, and each larger item as a run of one."""
    start = 0
    for index, size in enumerate(sizes):
        if size > cap:
            if start < index:
                yield start, index
            yield index, index + 1
            start = index + 1
    if start < len(sizes):
        yield start, len(sizes)


def _pack_run(sizes: Sequence[int], start: int, stop: int, cap: int) -> list[tuple[int, int]]:
    if stop - start == 1:
        return [(start, stop)]
    sums = list(accumulate(sizes[start:stop], initial=0))
    cuts = _fill(sums, cap)
    count = len(cuts) - 1
    if count > 1:
        cuts = _fill(sums, _smallest_bound(sums, max(sizes[start:stop]), cuts))
    assert len(cuts) - 1 == count
    return [(start + left, start + right) for left, right in pairwise(cuts)]


def _smallest_bound(sums: list[int], largest_item: int, cuts: list[int]) -> int:
    """The smallest tile size under which greedy filling needs no more tiles than ``cuts`` has."""
    count = len(cuts) - 1
    low = max(largest_item, -(-sums[-1] // count))
    high = max(sums[right] - sums[left] for left, right in pairwise(cuts))
    while low < high:
        middle = (low + high) // 2
        if len(_fill(sums, middle, most=count)) - 1 <= count:
            high = middle
        else:
            low = middle + 1
    return low


def _fill(sums: list[int], bound: int, most: int | None = None) -> list[int]:
    """Cut positions of greedy filling; stops early once it needs more than ``most`` tiles.

    ``sums`` are the prefix sums of the sizes, so that one bisection finds each cut.
    Zero-sized items at a cut join the left tile.
    """
    cuts = [0]
    last = len(sums) - 1
    while cuts[-1] < last and (most is None or len(cuts) <= most + 1):
        cuts.append(bisect_right(sums, sums[cuts[-1]] + bound, lo=cuts[-1]) - 1)
    return cuts
