"""Files of ``torch.save`` without their tensors' bytes: what is in them, and where.

Such a file is a zip archive of uncompressed records, one for each storage (torch's notes on
serialization). Loaded under ``FakeTensorMode`` it gives its content with tensors that have no
bytes but know where in the file these are; saved under ``skip_data`` it gets records whose
bytes are still to be written. So tensors of any size go from file to file through a small
buffer, and nothing is ever held whole.
"""

import errno
import os
import struct
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch
from torch.serialization import skip_data

from moe_groups.errors import CheckpointError

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

_FAKE = threading.RLock()  # the modes are switched for the process
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_CENTRAL_HEADER = struct.Struct("<4s12xI8xHHH12x")
_END = struct.Struct("<4s16xH")
_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_HAS_DESCRIPTOR = 0x08


_own = threading.local()


def _fake_mode() -> "FakeTensorMode":
    """A new mode. The first one imports ``torch._dynamo``, which takes as long as torch does."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _own_mode() -> "FakeTensorMode":
    """This thread's mode for the tensors that it makes: a new one takes longer than a tensor."""
    if not hasattr(_own, "mode"):
        _own.mode = _fake_mode()
    mode: FakeTensorMode = _own.mode
    return mode


class Record(NamedTuple):
    """A record of the archive.

    Attributes:
        name: without the archive's folder: ``data/0`` is a storage.
        start: offset of its first byte in the file.
        size: bytes.
        crc: CRC-32 that the archive states.
    """

    name: str
    start: int
    size: int
    crc: int


def read_records(path: Path) -> list[Record]:
    """The records of a file, in the order of the file.

    Raises:
        CheckpointError: it is missing, cut off, or not an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            return [_record(archive, info, file) for info in archive.infolist()]
    except Exception as error:  # a damaged directory makes zipfile raise anything
        raise _unreadable(path, error) from error


def _record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: IO[bytes]) -> Record:
    file.seek(info.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + name + extra
    named = file.read(name) == info.orig_filename.encode()
    stored = info.compress_type == zipfile.ZIP_STORED
    sound = signature == _LOCAL and named and stored
    if not sound or start + info.file_size > archive.start_dir:
        raise zipfile.BadZipFile(f"{info.filename} is not where the archive's directory says")
    return Record(info.filename.partition("/")[2], start, info.file_size, info.CRC)


def ends_with_directory(path: Path) -> bool:
    """Is nothing behind the archive? Readers look for its end, and take no notice of more."""
    with open(path, "rb") as file:
        file.seek(-_END.size, os.SEEK_END)
        signature, comment = _END.unpack(file.read())
    return bool(signature == b"PK\x05\x06" and not comment)


def read_skeleton(path: Path) -> Any:
    """The content of a file with fake tensors in place of the tensors.

    Tensors that shared a storage have one each, as torch remembers no storage without bytes.
    Unpickles, as DeepSpeed does when it loads: only for files that you trust.

    Raises:
        CheckpointError: it is missing, cut off, damaged, or in torch's format from before 1.6.
    """
    try:
        _check_pickle(path)
        with _FAKE, _fake_mode():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # damaged pickles raise anything
        raise _unreadable(path, error) from error


def read_mapped(path: Path) -> Any:
    """The content of a file with tensors whose bytes are read when somebody looks at them.

    Many times faster than :func:`read_skeleton` where there are many tensors. Unpickles too.

    Raises:
        CheckpointError: it is missing, cut off, damaged, or in torch's format from before 1.6.
    """
    try:
        _check_pickle(path)
        with _FAKE:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # damaged pickles raise anything
        raise _unreadable(path, error) from error


def _check_pickle(path: Path) -> None:
    """Does it have its CRC? Changed bytes could make anything of it; torch does not look."""
    if path.is_file() and not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("no zip archive: cut off, or in an old format of torch")
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.filename.endswith("/data.pkl") and info.CRC:  # 0 where torch stated none
                archive.read(info)


def _unreadable(path: Path, why: object) -> CheckpointError:
    if isinstance(why, FileNotFoundError):
        return CheckpointError(f"{path} is missing.")
    lines = str(why).strip().splitlines()
    kind = f"{type(why).__name__}: " if isinstance(why, Exception) else ""
    return CheckpointError(f"{path} cannot be read ({kind}{lines[0] if lines else ''}).")


def fake_like(dtype: torch.dtype, numel: int) -> torch.Tensor:
    """A tensor without bytes, for a skeleton that is to be written."""
    with _FAKE, _own_mode():
        return torch.empty(numel, dtype=dtype)


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples, in a fixed order."""
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from tensors_in(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensors_in(value)


def storage_of(tensor: torch.Tensor) -> int:
    """A number that tensors with one storage share, while they live."""
    return int(tensor.untyped_storage()._cdata)


def storage_start(tensor: torch.Tensor) -> int:
    """Offset of a loaded fake tensor's storage in its file."""
    start = tensor.untyped_storage()._checkpoint_offset
    assert start is not None
    return start


def tensor_start(tensor: torch.Tensor) -> int:
    """Offset of a loaded fake tensor's first element in its file."""
    assert tensor.is_contiguous()
    return storage_start(tensor) + int(tensor.storage_offset()) * tensor.itemsize


def save(content: Any, path: Path) -> None:
    """``torch.save``.

    Raises:
        OSError: the file cannot be written; torch's own error does not say so, nor why.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:
        reason = f"torch.save could not write all bytes ({str(error).splitlines()[0]})"
        raise OSError(errno.EIO, reason, str(path)) from error


def write_skeleton(content: Any, path: Path) -> dict[int, Record]:
    """Save ``content`` without bytes; the record of each storage, by :func:`storage_of`.

    Parameters become tensors, and tensors lose attributes that somebody gave them.

    Raises:
        CheckpointError: a tensor is hidden in an object that is no dict, list or tuple.
        OSError: the file cannot be written.
    """
    with _FAKE, _fake_mode(), skip_data(materialize_fake_tensors=True):
        save(content, path)
    return storage_records(content, path)


def storage_records(content: Any, path: Path) -> dict[int, Record]:
    """The record of each storage of ``content`` in a file that has the same content.

    Raises:
        CheckpointError: it has not, or holds tensors where they cannot be seen.
    """
    written = list(tensors_in(read_skeleton(path)))  # as long as they live, their numbers differ
    record_at = {record.start: record for record in read_records(path)}
    found = {
        storage_of(tensor): record_at[storage_start(again)]
        for tensor, again in zip(tensors_in(content), written, strict=True)
    }
    storages = sum(record.name.startswith("data/") for record in record_at.values())
    if len(found) != storages:
        raise CheckpointError(
            f"{path.name} holds tensors inside of objects of its own, which cannot be converted."
        )
    return found


def write_crcs(path: Path, crcs: Mapping[int, int]) -> None:
    """State the CRC of records whose bytes were written later, by the record's start."""
    with zipfile.ZipFile(path) as archive:
        infos, central = archive.infolist(), archive.start_dir
    with open(path, "r+b") as file:
        for info, record in zip(infos, read_records(path), strict=True):
            file.seek(central)
            header = file.read(_CENTRAL_HEADER.size)
            signature, _, name, extra, comment = _CENTRAL_HEADER.unpack(header)
            assert signature == _CENTRAL
            if record.start in crcs:
                crc = struct.pack("<I", crcs[record.start])
                os.pwrite(file.fileno(), crc, central + 16)
                os.pwrite(file.fileno(), crc, _other_crc(info, record, file))
            central += _CENTRAL_HEADER.size + name + extra + comment


def _other_crc(info: zipfile.ZipInfo, record: Record, file: IO[bytes]) -> int:
    """Where the CRC is said a second time: behind the record, or in the header before it."""
    if not info.flag_bits & _HAS_DESCRIPTOR:
        return info.header_offset + 14
    end = record.start + record.size
    assert os.pread(file.fileno(), 4, end) == _DESCRIPTOR
    return end + 4


def read_small(path: Path, tensor: torch.Tensor) -> torch.Tensor:
    """The real tensor of a loaded fake one; for counters and the like."""
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    with open(path, "rb") as file:
        data = os.pread(file.fileno(), tensor.numel() * tensor.itemsize, tensor_start(tensor))
    return torch.frombuffer(bytearray(data), dtype=tensor.dtype).reshape(tensor.shape)
