"""Ways to damage a checkpoint, each as a disk, a network or a person would do it."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from moe_groups.checkpoints.shard import read_shard
from moe_groups.checkpoints.torch_file import Record, read_records, tensor_start, write_crcs


def shard_path(folder: Path, data_rank: int) -> Path:
    (path,) = folder.glob(f"*zero_pp_rank_{data_rank}_mp_rank_00_optim_states.pt")
    return path


def place_of(path: Path, group: int, state: str) -> int:
    """Where a group's state begins in a shard; ``state`` is "fp32" or the optimizer's name."""
    shard = read_shard(path)
    if state == "fp32":
        tensor = shard.optimizer["single_partition_of_fp32_groups"][group]
    else:
        tensor = shard.states(group)[state]
    return tensor_start(tensor)


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)


def overwrite(path: Path, offset: int, value: float) -> None:
    """Put an fp32 number into a record, as the run itself would have saved it."""
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), torch.tensor(value).numpy().tobytes(), offset)
    record = next(r for r in read_records(path) if r.start <= offset < r.start + r.size)
    write_crcs(path, {record.start: zlib.crc32(_bytes_of(path, record))})


def _bytes_of(path: Path, record: Record) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), record.size, record.start)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def save_again(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Load a file, change its content, and save it."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
