"""Norms, NaN and changed bytes of saved tensors, in little memory: their bytes stay in the file."""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from moe_groups.checkpoints.torch_file import PICKLE, stated_crcs

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Numbers whose norm can be taken."""

_CHUNK = 1 << 17


def examine_values(values: torch.Tensor) -> tuple[float, int]:
    """The sum of the squares of a tensor, and the number of its NaN and infinite values.

    Goes through chunks of 1 MiB as float64.
    """
    square, broken = 0.0, 0
    for chunk in values.detach().flatten().split(_CHUNK):
        part = float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2
        if not part < float("inf"):
            broken += int((~chunk.isfinite()).sum())
        square += part
    return square, broken


def changed_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Names of the tensors of a file whose bytes have a CRC-32 that it states for no record."""
    stated = stated_crcs(path)
    for name, tensor in tensors.items():
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if storage.numel() and zlib.crc32(storage.numpy().data) not in stated:
            yield name


def changed_text(name: str, record: str, what: str | None = None) -> str:
    """A sentence about a record that has another CRC-32.

    Args:
        name: of the file.
        record: its name in the file.
        what: what it holds, where known.
    """
    if what is None:
        what = f"{'its list of tensors' if record == PICKLE else 'a part of it'} ({record})"
    return (
        f"{name}: {what} has changed since it was saved (its bytes do not have the CRC-32 that the "
        "file states)."
    )
