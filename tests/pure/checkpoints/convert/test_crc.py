"""CRCs of wholes from those of their parts, against zlib."""

import zlib
from itertools import pairwise

from hypothesis import example, given, strategies as st

from moe_groups.checkpoints.convert.copying import combine


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=8))
@example(b"", [])
@example(b"x", [0, 0, 1, 1])  # parts without bytes
def test_random_cuts(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    parts = [(zlib.crc32(data[a:b]), b - a) for a, b in pairwise(edges)]
    assert combine(parts) == zlib.crc32(data)


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 1 << 22))
def test_long_parts(head: bytes, tail: bytes, zeros: int) -> None:
    middle = bytes(zeros)
    parts = [(zlib.crc32(part), len(part)) for part in (head, middle, tail)]
    assert combine(parts) == zlib.crc32(head + middle + tail)


def test_nothing() -> None:
    assert combine([]) == zlib.crc32(b"")


def test_more_bytes_than_32_bits_can_count() -> None:
    """Zeros doubled again and again, as no buffer could hold them; any grouping gives one CRC."""
    crc, size = zlib.crc32(b"\0"), 1
    while size < 1 << 40:
        crc, size = combine([(crc, size), (crc, size)]), 2 * size
        if size == 1 << 20:
            assert crc == zlib.crc32(bytes(size))
    three = combine([(crc, size)] * 3)
    assert combine([(three, 3 * size), (crc, size)]) == combine([(crc, size)] * 4)
