"""Put a file's records together from runs of bytes of other files."""

import functools
import itertools
import mmap
import os
import threading
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from moe_groups.checkpoints.torch_file import Record, read_records
from moe_groups.errors import CheckpointError

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


_BUFFER = 1 << 20  # stays in the cache of a core from the read to the write

Progress: TypeAlias = Callable[[int], None]
"""Called with the number of bytes that were written since the last call."""


class Chunk(NamedTuple):
    """A run of bytes of a file; zeros where ``path`` is None."""

    path: Path | None
    start: int
    size: int


class Sums:
    """CRCs of the runs that were read, from which those of whole records follow.

    A byte that a disk or a network changed would get a new, right CRC where it is written, and
    nobody could find it any more. So what was read is compared with what its file states.
    """

    def __init__(self) -> None:
        self._of: dict[Path, list[tuple[int, int, int]]] = {}
        self._lock = threading.Lock()

    def add(self, chunk: Chunk, crc: int) -> None:
        if chunk.path is not None:
            with self._lock:
                self._of.setdefault(chunk.path, []).append((chunk.start, chunk.size, crc))

    def check(self, path: Path, copier: "Copier") -> None:
        """Compare a file that was read with its own CRCs; what was not read is read now.

        Raises:
            CheckpointError: bytes of the file have changed since it was written.
        """
        runs = sorted(self._of.pop(path, []))
        for record in read_records(path):
            edges = record.start, record.start + record.size
            first, end = (bisect_left(runs, (edge,)) for edge in edges)
            inside = runs[first:end]
            if record.crc and combine(copier.cover(path, record, inside)) != record.crc:
                raise CheckpointError(
                    f"{path} is damaged: the bytes of its record {record.name} do not have the "
                    "CRC-32 that was stated when it was saved."
                )


class Copier:
    """Reads and writes with one small buffer; one for each thread.

    Args:
        sums: gets the CRC of each run that is read.
        progress: is told what was written.
    """

    def __init__(self, sums: Sums, progress: Progress) -> None:
        self.sums = sums
        self.progress = progress
        # pages of it come when they are used: most files are small
        self.buffer = memoryview(mmap.mmap(-1, _BUFFER, flags=mmap.MAP_PRIVATE))
        self.files: dict[Path, int] = {}
        self.stack = ExitStack()

    def close(self) -> None:
        """Close the files that were read."""
        self.stack.close()
        self.files.clear()

    def fill(self, path: Path, records: Iterable[tuple[Record, Sequence[Chunk]]]) -> dict[int, int]:
        """Write each record's bytes; their CRCs by the record's start.

        Raises:
            CheckpointError: a file that is read ends too early.
            OSError: the file cannot be written.
        """
        crcs = {}
        with open(path, "r+b") as target:
            for record, chunks in records:
                at, parts = record.start, []
                for chunk in chunks:
                    crc = self._copy(chunk, target.fileno(), at)
                    self.sums.add(chunk, crc)
                    parts.append((crc, chunk.size))
                    at += chunk.size
                assert at == record.start + record.size
                crcs[record.start] = combine(parts)
        return crcs

    def _copy(self, chunk: Chunk, target: int | None, at: int) -> int:
        """Move the bytes, or only read them where there is no target; their CRC."""
        source = None if chunk.path is None else self._open(chunk.path)
        crc = done = 0
        while done < chunk.size:
            part = self.buffer[: min(len(self.buffer), chunk.size - done)]
            if source is None:
                part[:] = bytes(len(part))
            else:
                _read(chunk, source, part, done)
            crc = zlib.crc32(part, crc)
            if target is not None:
                _write(target, part, at + done)
            self.progress(0 if target is None else len(part))
            done += len(part)
        return crc

    def _move(self, path: Path, at: int, size: int, target: BinaryIO) -> memoryview:
        """Bytes of a file to the same place of another one; they stay in the buffer."""
        part = self.buffer[:size]
        _read(Chunk(path, at, size), self._open(path), part, 0)
        _write(target.fileno(), part, at)
        self.progress(size)
        return part

    def _open(self, path: Path) -> int:
        if path not in self.files:
            if len(self.files) >= 64:
                self.close()
            try:
                self.files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
            self.stack.callback(os.close, self.files[path])
        return self.files[path]

    def cover(
        self, path: Path, record: Record, runs: Sequence[tuple[int, int, int]]
    ) -> list[tuple[int, int]]:
        """``(crc, bytes)`` of runs that make up the record, read where they leave gaps."""
        parts = []
        at, end = record.start, record.start + record.size
        for start, size, crc in runs:
            if start < at:
                continue  # was read more than once
            if start > at:
                parts.append((self._copy(Chunk(path, at, start - at), None, 0), start - at))
            parts.append((crc, size))
            at = start + size
        if at < end:
            parts.append((self._copy(Chunk(path, at, end - at), None, 0), end - at))
        return parts

    def kept(self, path: Path, records: Iterable[tuple[Record, Sequence[Chunk]]]) -> bool:
        """Has a file that :meth:`fill` wrote earlier the bytes that it states?

        Then its bytes count as read from where they came from: what they were when that was read
        is compared with what that states too.
        """
        runs = []
        for record, chunks in records:
            at, parts = record.start, []
            for chunk in chunks:
                crc = self._copy(Chunk(path, at, chunk.size), None, 0)
                runs.append((chunk, crc))
                parts.append((crc, chunk.size))
                at += chunk.size
            if at != record.start + record.size or combine(parts) != record.crc:
                return False
        for chunk, crc in runs:
            self.sums.add(chunk, crc)
        return True

    def copy_file(self, source: Path, target: Path) -> None:
        """Copy a whole file, its mode too; DeepSpeed's only if it has the bytes that it states.

        Raises:
            CheckpointError: it cannot be read, or is one of DeepSpeed's and damaged.
            OSError: the target cannot be written.
        """
        status = source.stat()
        archive = source.name.endswith("_states.pt")
        records = read_records(source) if archive else []
        edges = {*range(0, status.st_size, _BUFFER), status.st_size}
        edges = edges.union(*((r.start, r.start + r.size) for r in records))
        with open(target, "wb") as file:
            for start, end in itertools.pairwise(sorted(edges)):
                if start % _BUFFER == 0:
                    part = self._move(source, start, min(_BUFFER, status.st_size - start), file)
                run = part[start % _BUFFER :][: end - start]
                self.sums.add(Chunk(source, start, end - start), zlib.crc32(run))
        if archive:
            self.sums.check(source, self)
        os.chmod(target, status.st_mode)


def _read(chunk: Chunk, source: int, part: memoryview, skip: int) -> None:
    try:
        count = os.preadv(source, [part], chunk.start + skip)
    except OSError as error:
        raise CheckpointError(f"{chunk.path} cannot be read: {error.strerror}.") from error
    if count != len(part):
        raise CheckpointError(f"{chunk.path} is cut off.")


def _write(target: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(target, data, at)
        data, at = data[written:], at + written


def total_size(fills: Mapping[int, Sequence[Chunk]]) -> int:
    """Bytes of all records."""
    return sum(chunk.size for chunks in fills.values() for chunk in chunks)
