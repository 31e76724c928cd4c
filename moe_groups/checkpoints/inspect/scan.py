"""Read all bytes of a file of ``torch.save`` in small chunks: are they those that were saved,
and what is the norm of each run of numbers among them?
"""

import math
import os
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from moe_groups.checkpoints.torch_file import Record
from moe_groups.errors import CheckpointError

PICKLE = "data.pkl"
"""The record that says what the others are."""

_BUFFER = 4 << 20
_NUMPY: dict[torch.dtype, Any] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
}
FLOATS = frozenset({*_NUMPY, torch.bfloat16})
"""Numbers whose norm can be taken."""

Key: TypeAlias = tuple[int, str, str]
"""What a run of numbers is: group, parameter and kind of state."""


class Segment(NamedTuple):
    """Numbers that lie behind each other in a file.

    Attributes:
        start: offset in the file.
        numel: elements.
        dtype: one of :data:`FLOATS`.
        key: what they are.
    """

    start: int
    numel: int
    dtype: torch.dtype
    key: Key

    @property
    def stop(self) -> int:
        """Offset behind the last byte."""
        return self.start + self.numel * self.dtype.itemsize


@dataclass(slots=True)
class Scan:
    """What was found.

    Attributes:
        changed: records whose CRC-32 is not the one that was stated.
        unstated: number of records that state none.
        squares: sum of the squares of each segment.
        broken: number of NaN and infinite values, where there are any.
    """

    changed: list[Record] = field(default_factory=list)
    unstated: int = 0
    squares: dict[Key, float] = field(default_factory=dict)
    broken: dict[Key, int] = field(default_factory=dict)


def scan_file(
    path: Path,
    records: Sequence[Record],
    segments: Iterable[Segment] = (),
    progress: Callable[[int], None] = lambda numbytes: None,
) -> Scan:
    """Read each record once, through one buffer of a few MiB.

    Args:
        records: of the file.
        segments: numbers of interest; each lies in one record.
        progress: is told how many bytes were read.

    Raises:
        CheckpointError: the file is shorter than its records.
    """
    scan = Scan()
    buffer = memoryview(bytearray(_BUFFER))
    with open(path, "rb") as file:
        for record, inside in _by_record(records, segments):
            crc = 0
            for start, chunk in _chunks(path, file.fileno(), record, buffer):
                crc = zlib.crc32(chunk, crc)
                while inside and inside[0].stop <= start:
                    inside.popleft()
                for segment in inside:
                    if segment.start >= start + len(chunk):
                        break
                    _add(scan, segment, start, chunk)
                progress(len(chunk))
            scan.unstated += record.crc == 0 and record.size > 0
            if record.crc not in (0, crc):
                scan.changed.append(record)
    return scan


def sound_pickle(path: Path, records: Sequence[Record]) -> bool:
    """May the file be unpickled? Changed bytes could make anything of it."""
    return not scan_file(path, [record for record in records if record.name == PICKLE]).changed


def changed_text(name: str, record: Record, what: str | None = None) -> str:
    """A sentence about a record that has another CRC.

    Args:
        name: of the file.
        record: one of its records.
        what: what it holds, where known.
    """
    what = "its list of tensors" if record.name == PICKLE else what or "a part of it"
    return (
        f"{name}: {what} has changed since it was saved (the CRC-32 of its record {record.name} "
        "does not match)."
    )


def _by_record(
    records: Sequence[Record], segments: Iterable[Segment]
) -> Iterator[tuple[Record, deque[Segment]]]:
    ordered = sorted(records, key=lambda record: record.start)
    starts = [record.start for record in ordered]
    inside: list[list[Segment]] = [[] for _ in ordered]
    for segment in segments:
        inside[bisect_right(starts, segment.start) - 1].append(segment)
    for record, some in zip(ordered, inside, strict=True):
        yield record, deque(sorted(some, key=lambda segment: segment.start))


def _chunks(
    path: Path, file: int, record: Record, buffer: memoryview
) -> Iterator[tuple[int, memoryview]]:
    for start in range(record.start, record.start + record.size, len(buffer)):
        chunk = buffer[: min(len(buffer), record.start + record.size - start)]
        if os.preadv(file, [chunk], start) != len(chunk):
            raise CheckpointError(f"{path} cannot be read (it is cut off).")
        yield start, chunk


def _add(scan: Scan, segment: Segment, start: int, chunk: memoryview) -> None:
    """Add what of the segment is in a chunk."""
    first = max(segment.start, start) - start
    stop = min(segment.stop, start + len(chunk)) - start
    if first >= stop:
        return
    values = _widen(chunk[first:stop], segment.dtype)
    square = float(np.einsum("i,i->", values, values))  # in this thread, unlike BLAS
    scan.squares[segment.key] = scan.squares.get(segment.key, 0.0) + square
    if not math.isfinite(square) and (broken := int((~np.isfinite(values)).sum())):
        scan.broken[segment.key] = scan.broken.get(segment.key, 0) + broken


def _widen(data: memoryview, dtype: torch.dtype) -> NDArray[np.float64]:
    if dtype is torch.bfloat16:  # the upper half of a float32
        upper = np.frombuffer(data, np.uint16).astype(np.uint32)
        return (upper << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, _NUMPY[dtype]).astype(np.float64)
