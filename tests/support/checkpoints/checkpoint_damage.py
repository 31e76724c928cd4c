"""Ways to damage a checkpoint, each as a disk, a network or a person would do it."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


def shard_path(folder: Path, data_rank: int) -> Path:
    (path,) = folder.glob(f"*zero_pp_rank_{data_rank}_mp_rank_00_optim_states.pt")
    return path


def state_in(content: Any, group: int, state: str) -> torch.Tensor:
    """A group's tensor in a shard; ``state`` is "fp32" or the optimizer's name."""
    optimizer = content["optimizer_state_dict"]
    if state == "fp32":
        found: torch.Tensor = optimizer["single_partition_of_fp32_groups"][group]
    else:
        found = optimizer["base_optimizer_state"]["state"][group][state]
    return found.detach()


def place_of(path: Path, group: int, state: str) -> int:
    """Where that tensor begins in the file."""
    tensor = state_in(torch.load(path, weights_only=False), group, state)
    whole, sought = path.read_bytes(), tensor.numpy().tobytes()
    assert whole.count(sought) == 1
    return whole.index(sought)


class Record(NamedTuple):
    """A record, and where its bytes are in the file."""

    name: str
    start: int
    stop: int


def records_of(path: Path) -> list[Record]:
    whole, found = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, extra = (
                int.from_bytes(whole[info.header_offset + at :][:2], "little") for at in (26, 28)
            )
            start = info.header_offset + 30 + name + extra
            assert whole[start : start + info.file_size] == archive.read(info)
            found.append(Record(info.filename.partition("/")[2], start, start + info.file_size))
    return found


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    with open(path, "r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), offset)


def overwrite(path: Path, group: int, state: str, element: int, value: float) -> None:
    """Put a number into a tensor, as the run itself would have saved it."""

    def change(content: dict[str, object]) -> None:
        state_in(content, group, state).view(-1)[element] = value

    save_again(path, change)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def save_again(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Load a file, change its content, and save it."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
