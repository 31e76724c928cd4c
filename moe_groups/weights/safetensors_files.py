"""A Hugging Face checkpoint of safetensors files: its contents, and slices of its tensors."""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from moe_groups._common.arguments import need
from moe_groups._common.json_file import read_json
from moe_groups._common.own_folder import is_plain
from moe_groups.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Index = tuple[int | slice, ...]

# The format's names (https://github.com/huggingface/safetensors#format) that weights are kept in.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """The entry of one tensor in a file's header.

    Attributes:
        shape: its sizes.
        dtype: the format's name of the dtype, such as "BF16".
        file: name of its file.
    """

    shape: tuple[int, ...]
    dtype: str
    file: str

    def fits(self, dtype: torch.dtype) -> bool:
        """Can it be copied to ``dtype``: is it the same, or are both plain floating point?"""
        known = FLOATS | _OTHERS
        both_float = self.dtype in FLOATS and dtype in FLOATS.values()
        return both_float or known.get(self.dtype) == dtype


_CRC = "crc32"


def stated_crcs(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """An entry of a file's metadata that shows whether its tensors were changed."""
    return {_CRC: json.dumps({name: crc_of(name, tensor) for name, tensor in tensors.items()})}


def crc_of(name: str, tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes, and of what the header says of it."""
    about = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy().data, zlib.crc32(about))


_MAPPED = 32 * 2**20


class SafetensorsFiles:
    """The tensors of a checkpoint by name; each is read when it is needed.

    All headers are read at once, but no weights. The files are mapped into memory until the context
    ends, and mapped anew after each 32 MiB: pages that were read count as memory of the process.

    Args:
        directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the
            files that it names.

    Raises:
        CheckpointError: a file is missing or damaged, or a header does not match the index.
        InvalidArgumentError: the package ``safetensors`` is missing.
    """

    def __init__(self, directory: str | Path) -> None:
        need("safetensors", "safetensors", "safetensors checkpoints")
        self.directory = Path(directory)
        self.tensors: dict[str, StoredTensor] = {}
        self._open: dict[str, Any] = {}
        self._versions: dict[str, tuple[int, ...]] = {}
        self._read: set[str] = set()
        self._mapped = 0
        self._crcs: dict[str, Mapping[str, Any]] = {}
        index = _read_index(self.directory)
        try:
            for file in [SINGLE] if index is None else sorted(set(index.values())):
                self._read_header(file)
            if index is not None:
                self._check_index(index)
        except BaseException:
            self._close([*self._open])
            raise

    def __enter__(self) -> "SafetensorsFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close([*self._open])

    def _close(self, files: Iterable[str]) -> None:
        for file in files:
            self._open.pop(file).__exit__(None, None, None)

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """The tensor, or its ``index``, as a view of the mapped file; reads nothing else.

        Raises:
            CheckpointError: the file is another one than when the headers were read.
        """
        if self._mapped > _MAPPED:
            self._close(self._read)
            self._read, self._mapped = set(), 0
        file = self.tensors[name].file
        if file not in self._open:
            self._map(file)
        opened = self._open[file]
        tensor: torch.Tensor = opened.get_slice(name)[index] if index else opened.get_tensor(name)
        self._read.add(file)
        self._mapped += tensor.nbytes
        return tensor

    def check_data(self, names: Iterable[str]) -> int:
        """Compare tensors with the CRC-32 that our files state; reads all of their bytes.

        Returns:
            Tensors that state none, as in files of others.

        Raises:
            CheckpointError: a tensor was changed.
        """
        unstated = 0
        for name in names:
            file = self.tensors[name].file
            if name not in self._crcs[file]:
                unstated += 1
            elif self._crcs[file][name] != crc_of(name, self.read(name)):
                raise CheckpointError(
                    f"{self.directory / file}: {name} is not what was written (its CRC-32 is "
                    "another one): download or copy the file again."
                )
        return unstated

    def _map(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.directory / file
        try:
            if not path.is_file():  # opening a pipe would block
                raise FileNotFoundError(path)
            found = path.stat()
            version = found.st_ino, found.st_size, found.st_mtime_ns
            opened: Any = safe_open(path, framework="pt")
            opened.__enter__()
        except (SafetensorError, OSError) as error:
            missing = not path.is_file()
            problem = "is missing" if missing else f"is damaged or cut off ({error})"
            raise CheckpointError(
                f"{path} {problem}: download or copy the checkpoint again."
            ) from error
        self._open[file] = opened
        if self._versions.setdefault(file, version) != version:
            raise CheckpointError(f"{path} has been written again while it was read: load it anew.")
        return opened

    def _read_header(self, file: str) -> None:
        opened, path = self._map(file), self.directory / file
        self._crcs[file] = _stated(path, (opened.metadata() or {}).get(_CRC, "{}"))
        for name in opened.keys():  # noqa: SIM118  (no mapping)
            part = opened.get_slice(name)
            self.tensors[name] = StoredTensor(tuple(part.get_shape()), part.get_dtype(), file)

    def _check_index(self, index: dict[str, str]) -> None:
        found = {name: tensor.file for name, tensor in self.tensors.items()}
        if wrong := sorted(name for name in index if found.get(name) != index[name]):
            raise CheckpointError(
                f"{self.directory / INDEX} says that {wrong[0]} is in {index[wrong[0]]}, but it is "
                f"not there{_more(wrong)}: the index and the files are of different checkpoints."
            )


def _stated(path: Path, text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its list of CRC-32 is damaged: download or copy the file again."
        ) from error
    return found if isinstance(found, dict) else {}


def _more(names: list[str]) -> str:
    return f", nor are {len(names) - 1} more" if len(names) > 1 else ""


def _read_index(directory: Path) -> dict[str, str] | None:
    """Names to files; None where the checkpoint is a single file without an index."""
    path = directory / INDEX
    if not path.is_file():
        if (directory / SINGLE).is_file():
            return None
        raise CheckpointError(
            f"{directory} is no checkpoint of safetensors: it has neither {INDEX} nor {SINGLE}."
        )
    names = read_json(path, CheckpointError, "Download or copy it again.").get("weight_map")
    if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
        raise CheckpointError(
            f'{path} is damaged: it must hold "weight_map", the file of each tensor by its name.'
        )
    return names


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and is_plain(name) and "/" not in name
