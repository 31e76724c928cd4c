"""CRC-32 of a whole from the CRC-32s of its parts, so that each byte is read once.

Arithmetic on polynomials over GF(2) modulo the CRC's own, as in Mark Adler's description of
``crc32_combine`` (zlib's ``crc32.c``): appending n bytes multiplies a CRC by x**(8 n).
"""

import functools
from collections.abc import Iterable

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # the polynomial 1: CRC-32 keeps the highest power in the lowest bit


def _times(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=65536)
def _shift(numbytes: int) -> int:
    """x**(8 * numbytes)."""
    power, base, bits = _ONE, _ONE >> 1, 8 * numbytes
    while bits:
        if bits & 1:
            power = _times(base, power)
        base = _times(base, base)
        bits >>= 1
    return power


def combine(parts: Iterable[tuple[int, int]]) -> int:
    """The CRC of what consists of parts with these ``(crc, bytes)``."""
    total = 0
    for crc, numbytes in parts:
        total = _times(_shift(numbytes), total) ^ crc
    return total
