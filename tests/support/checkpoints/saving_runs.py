"""Jobs of ranks that save under difficulties."""

import json
import math
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from moe_groups import protect_checkpoints
from moe_groups.checkpoints.manifest import FILE_NAME
from moe_groups.errors import CheckpointWarning
from tests.support.checkpoints.full_disk import SmallDisk
from tests.support.checkpoints.saving_faults import digest, engine_of
from tests.support.training import train

PAGE = 4096


def save_halves_of_two(folder: Path) -> None:
    """DeepSpeed's saves of two steps under one tag; the files of rank 1 are of the first one."""
    rank = torch.distributed.get_rank()
    engine = engine_of("zero2")
    protect_checkpoints(engine, regroup="off")
    checkpoints = folder / "checkpoints"
    for step in (2, 4):
        train(engine, 2, first=step - 2)
        (folder / f"first-{step}-{rank}").write_text(digest(engine))
        engine.save_checkpoint(str(checkpoints), tag="first")
        for path in checkpoints.glob("first/*pp_rank_1_*") if step == 2 and rank == 0 else ():
            shutil.copy(path, folder)
    for path in folder.glob("*pp_rank_1_*") if rank == 0 else ():
        shutil.copy(path, checkpoints / "first")
    torch.distributed.barrier()


class Saved(NamedTuple):
    """How a save ended.

    Attributes:
        error: name of its class, and text; empty if there was none.
        warnings: texts of ours.
    """

    error: str
    warnings: list[str]


def save_on_full_disk(folder: Path, wrapper: str, second: str, room: str) -> None:
    """Save "first" to the disk that ``folder`` is, then ``second`` when it is full.

    How that ended is left beside the disk (:func:`how_it_ended`).

    Args:
        room: "none", also not what is freed; "as much" as there is; "files" for what DeepSpeed
            writes and for ``latest``; "manifest" for all but ``latest``.
    """
    rank = torch.distributed.get_rank()
    engine = engine_of(wrapper)
    checkpoints = folder / "checkpoints"
    for step, tag in ((2, "first"), (4, second)):
        train(engine, 2, first=step - 2)
        (folder / f"{tag}-{step}-{rank}").write_text(digest(engine))
        if step == 2:
            engine.save_checkpoint(str(checkpoints), tag=tag)
    torch.distributed.barrier()
    if rank == 0:
        SmallDisk(folder).fill(PAGE * _pages(checkpoints / "first", room))
    torch.distributed.barrier()
    full = SmallDisk(folder).kept_full() if room == "none" and rank == 0 else nullcontext()
    with full, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = ""
        try:
            engine.save_checkpoint(str(checkpoints), tag=second)
        except Exception as problem:  # the other rank may wait until this one's process ends
            error = f"{type(problem).__name__}: {problem}"
            raise
        finally:
            ours = [str(w.message) for w in caught if issubclass(w.category, CheckpointWarning)]
            _result(folder, rank).write_text(json.dumps(Saved(error, ours)))


def how_it_ended(folder: Path, rank: int) -> Saved | None:
    """None for a rank that was killed while it waited for the other one."""
    path = _result(folder, rank)
    return Saved(*json.loads(path.read_text())) if path.exists() else None


def _result(folder: Path, rank: int) -> Path:
    return folder.parent / f"saved-{rank}.json"


def _pages(saved: Path, room: str) -> int:
    """Of a tmpfs, for a checkpoint as large as this one."""
    sizes = {path: math.ceil(path.stat().st_size / PAGE) for path in saved.rglob("*")}
    manifest = sizes.pop(saved / FILE_NAME)
    assert manifest > 3
    files = sum(sizes.values())
    return {"none": 0, "as much": 0, "files": files + 2, "manifest": files + manifest}[room]
