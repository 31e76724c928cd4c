"""Put a file's records together from runs of bytes of other files."""

import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeAlias

from moe_groups.crc import combine
from moe_groups.errors import CheckpointError
from moe_groups.torch_file import Record, read_records

_BUFFER = 4 << 20

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
            inside = [run for run in runs if record.start <= run[0] < record.start + record.size]
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
        self.buffer = memoryview(bytearray(_BUFFER))
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
            elif os.preadv(source, [part], chunk.start + done) != len(part):
                raise CheckpointError(f"{chunk.path} is cut off.")
            crc = zlib.crc32(part, crc)
            if target is not None:
                _write(target, part, at + done)
                self.progress(len(part))
            done += len(part)
        return crc

    def _open(self, path: Path) -> int:
        if path not in self.files:
            if len(self.files) >= 64:
                self.close()
            self.files[path] = os.open(path, os.O_RDONLY)
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

    def copy_file(self, source: Path, target: Path) -> None:
        """Copy a whole file, its mode too.

        Raises:
            OSError: it cannot be read or written.
        """
        size = source.stat().st_size
        with open(target, "wb") as file:
            self._copy(Chunk(source, 0, size), file.fileno(), 0)
            os.fsync(file.fileno())
        os.chmod(target, source.stat().st_mode)


def _write(target: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(target, data, at)
        data, at = data[written:], at + written


def total_size(fills: Mapping[int, Sequence[Chunk]]) -> int:
    """Bytes of all records."""
    return sum(chunk.size for chunks in fills.values() for chunk in chunks)
