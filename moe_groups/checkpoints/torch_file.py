"""Files of ``torch.save``: read without loading the tensors, compared with their CRC-32, written.

Such a file is a zip archive with one uncompressed record for each storage and a pickle
(``data.pkl``) that says what they are; the archive states a CRC-32 for each record. torch maps
the records into memory, so that the operating system reads those bytes that somebody looks at.
A mapped file must not become shorter while it is read: the system ends the process then.
"""

import contextlib
import errno
import importlib
import io
import lzma
import pickle
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_groups.checkpoints import saved_objects
from moe_groups.errors import CheckpointError
from moe_groups.groups.grouping import fingerprint

PICKLE = "data.pkl"
"""The record that says what the others are."""

DAMAGE = (
    *(OSError, EOFError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(RuntimeError, pickle.UnpicklingError, ImportError, MemoryError),
    *(ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError),
)
"""What a damaged file raises in ``zipfile``, in torch's reader, while it is unpickled, and in
code that looks for something that is not in it or is of another type."""

_CHUNK = 1 << 20
_OLD_FORMAT = b"\x80\x02"  # a pickle, which does not show whether it is complete
_NUMPY, _REBUILD = ("core", "_core"), ("_reconstruct", "scalar")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into an error that names the file.

    Raises:
        CheckpointError: the file is missing, cut off, damaged, or not what it is called.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing.") from error
    except DAMAGE as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {line}).") from error


_ALLOWED = frozenset(
    (
        *saved_objects.STAND_INS,
        *("argparse.Namespace", "types.SimpleNamespace"),
        *("pathlib.PosixPath", "pathlib._local.PosixPath"),
        *("datetime.datetime", "datetime.timedelta", "builtins.frozenset", "builtins.slice"),
        *("numpy.dtype", "numpy.ndarray"),
        *(f"numpy.{core}.multiarray.{name}" for core in _NUMPY for name in _REBUILD),
    )
)
"""What DeepSpeed and its users save beside tensors and plain containers: data, no code."""

_READING = threading.Lock()  # torch's list of allowed classes is the process's


def read_torch_file(path: Path, trust: bool = False) -> Any:
    """The content of a file, with tensors whose bytes are read when somebody looks at them.

    The pickle is compared with its CRC-32 first, as changed bytes could make anything of it; the
    tensors are not: see :func:`check_crcs`.

    Args:
        path: the file.
        trust: unpickle objects of any class, as DeepSpeed does when it loads: that can run any
            code. Without, a file with objects of unknown classes is refused, and nothing of it
            is run.

    Raises:
        CheckpointError: it is missing, cut off, damaged, in torch's format from before 1.6, or
            not trusted and holds objects of unknown classes.
    """
    with reading(path), open_archive(path) as archive:
        for info in archive.infolist():
            if _name(info) == PICKLE and info.CRC:
                archive.read(info)
        if trust:
            return torch.load(
                path, map_location="cpu", pickle_module=saved_objects, mmap=True, weights_only=False
            )
        try:
            return _read_data(path)
        except pickle.UnpicklingError as error:
            said = str(error).rpartition("WeightsUnpickler error: ")[2]
            what = (said.splitlines() or ["no pickle"])[0]
            raise CheckpointError(
                f"{path} was not read: it holds {what.rstrip('.')}, and to read that can run any "
                "code. If you trust its author as you do when you load it, give trust=True "
                "(--trust on the command line)."
            ) from error


def _read_data(path: Path) -> Any:
    """The content, where it is tensors, containers and objects of allowed classes."""
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise CheckpointError(
            f"{path} was not read: torch {torch.__version__} cannot list the classes that a file "
            "holds, and to read unknown ones can run any code. Install torch 2.6 or newer; or, if "
            "you trust its author as you do when you load it, give trust=True (--trust on the "
            "command line)."
        )
    with _READING:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if unknown := sorted({*found} - _ALLOWED):
            raise pickle.UnpicklingError(f"objects of {', '.join(unknown[:5])}")
        with torch.serialization.safe_globals(_resolve(found)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _resolve(names: Collection[str]) -> list[Any]:
    """The allowed classes of these names, and what numpy's need besides."""
    found: list[Any] = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        kind = saved_objects.STAND_INS.get(name)
        found.append((kind or getattr(importlib.import_module(module), attribute), name))
        if name == "numpy.dtype":
            found += [one for one in vars(np.dtypes).values() if isinstance(one, type)]
    return found


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The records of a file.

    Raises:
        zipfile.BadZipFile: it is cut off, damaged, or no archive.
        OSError: it cannot be opened.
    """
    if path.is_file() and not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("no zip archive: cut off, or in an old format of torch")
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise zipfile.BadZipFile("a record is compressed, which torch never does")
        yield archive


class Checksums(NamedTuple):
    """The records of a file compared with the CRC-32 that it states for them.

    Attributes:
        changed: names of records that have another one: ``data/0`` is a storage.
        unstated: number of records that state none (``torch.serialization.set_crc32_options``).
    """

    changed: list[str]
    unstated: int


def compare_crcs(
    path: Path,
    progress: Callable[[int], object] = lambda numbytes: None,
    names: Collection[str] | None = None,
) -> Checksums:
    """Read the records through a buffer of 1 MiB and compare them.

    Args:
        path: the file.
        progress: called with the number of bytes that were read since the last call.
        names: of the records to compare; None for all.

    Raises:
        CheckpointError: the file is missing or cut off, or its directory is damaged.
    """
    changed: list[str] = []
    unstated = 0
    with contextlib.ExitStack() as stack:
        with reading(path):
            archive = stack.enter_context(open_archive(path))
        for info in archive.infolist():
            if names is not None and _name(info) not in names:
                continue
            if not info.CRC:
                unstated += info.file_size > 0
                continue
            for numbytes in _read(path, archive, info, changed):
                progress(numbytes)
    return Checksums(changed, unstated)


def _read(
    path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, changed: list[str]
) -> Iterator[int]:
    with reading(path):
        try:
            with archive.open(info) as record:
                while chunk := record.read(_CHUNK):
                    yield len(chunk)
        except zipfile.BadZipFile:  # the CRC-32 differs, or another record is at its place
            changed.append(_name(info))


def _name(info: zipfile.ZipInfo) -> str:
    """Without the archive's folder."""
    return info.filename.partition("/")[2]


def stated_crcs(path: Path) -> set[int]:
    """The CRC-32 of each record, as the file states it.

    Raises:
        CheckpointError: the file is missing or cut off, or its directory is damaged.
    """
    with reading(path), open_archive(path) as archive:
        return {info.CRC for info in archive.infolist()}


def digest_of(path: Path) -> str | None:
    """Of the names, sizes and CRC-32 of all records, as the file states them; reads no record.

    So files of two saves have different digests. None for a file in another format,
    or with a damaged list of records.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            rows = [(_name(info), info.file_size, info.CRC) for info in archive.infolist()]
    except OSError:
        raise
    except DAMAGE:
        return None
    return fingerprint(rows).hex()


def check_archive(path: Path) -> None:
    """Is a file an archive with its directory, which is at the end, or in torch's older format?

    Raises:
        CheckpointError: it is missing or cut off.
    """
    with reading(path), open(path, "rb") as file:
        if file.read(2) != _OLD_FORMAT:
            zipfile.ZipFile(path).close()


def check_crcs(path: Path, progress: Callable[[int], object] = lambda numbytes: None) -> int:
    """Compare all records of a file with the CRC-32 that it states for them.

    Returns:
        The number of records that state none.

    Raises:
        CheckpointError: the file cannot be read, or bytes have changed since it was saved.
    """
    changed, unstated = compare_crcs(path, progress)
    if changed:
        raise CheckpointError(
            f"{path} is damaged: the bytes of its record {changed[0]} do not have the CRC-32 that "
            "was stated when it was saved."
        )
    return unstated


def save(content: Any, path: Path) -> None:
    """``torch.save``.

    Raises:
        OSError: the file cannot be written; torch's own error does not say so, nor why.
    """
    with _InPieces(path, "wb") as file:
        try:
            torch.save(content, file, pickle_module=saved_objects)
        except RuntimeError as error:
            reason = f"torch.save could not write all bytes ({str(error).splitlines()[0]})"
            raise OSError(errno.EIO, reason, str(path)) from error


class _InPieces(io.FileIO):
    """A file to which torch's large records are written in pieces of 1 MiB.

    The operating system takes them faster than one write of gigabytes (conversions: a third), and
    its error says why they cannot be written, which torch's own writer does not.
    """

    def write(self, data: Any) -> int:
        view = memoryview(data)
        at = 0
        while at < len(view):
            at += super().write(view[at : at + _CHUNK])
        return at
