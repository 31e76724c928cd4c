"""Conversions whose disk fills up, or whose files change while they are stopped or at work."""

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.errors import CheckpointError
from tests.support.checkpoints.conversion_faults import TAG, Conversion, convert
from tests.support.checkpoints.fault_table import AGAIN, REFUSED, RIGHT, Tally
from tests.support.checkpoints.full_disk import SmallDisk


class StoppedError(Exception):
    """What the tests stop a conversion with."""


def convert_until(
    conversion: Conversion,
    destination: Path,
    part: float,
    act: Callable[[], None],
    workers: int = 1,
) -> None:
    """Convert; do something once that part of the bytes is written."""
    acted = False

    def progress(done: int, total: int) -> None:
        nonlocal acted
        if done >= part * total and not acted:
            acted = True
            act()

    regroup_checkpoint(
        conversion.source, destination, conversion.second, workers=workers, progress=progress
    )


def stop_at(conversion: Conversion, destination: Path, part: float) -> Path:
    """Stop a conversion there; the folder with the files that it has finished."""

    def stop() -> None:
        raise StoppedError

    try:
        convert_until(conversion, destination, part, stop)
    except StoppedError:
        return Path(f"{destination}.incomplete/checkpoint/{TAG}")
    raise AssertionError("it was not stopped")


# ---- full disk ------------------------------------------------------------------------


def too_small(conversion: Conversion, disk: SmallDisk, size: int) -> Tally:
    """A disk on which the result cannot fit, made larger then."""
    tally = Tally("converting", "disk too small, seen in advance")
    destination = disk.path / "too-small"
    said = _error(lambda: convert(conversion.source, destination, conversion.second))
    if said is None or f"{destination}.incomplete needs" not in said or "make room" not in said:
        tally.wrong(f"no clear error: {said}")
    elif [*disk.path.iterdir()]:
        tally.wrong(f"left behind: {[*disk.path.rglob('*')]}")
    else:
        disk.remount(f"size={size}")
        _finish(tally, conversion, destination)
    shutil.rmtree(destination, ignore_errors=True)
    return tally


def filled(conversion: Conversion, disk: SmallDisk, moments: list[tuple[float, int]]) -> Tally:
    """The disk gets full when a part of the bytes is written, but for so many bytes."""
    tally = Tally("converting", "disk full in the middle")
    for number, (part, leave) in enumerate(moments):
        destination = disk.path / str(number)
        fill = partial(disk.fill, leave)
        said = _error(lambda: convert_until(conversion, destination, part, fill, workers=2))
        where = f"at {part:.0%}, {leave} bytes left"
        if destination.exists() and conversion.problem(destination) is None:  # it was enough
            tally.add(RIGHT)
        elif said is None or f"{destination}.incomplete" not in said or "make room" not in said:
            tally.wrong(f"{where}: no clear error: {said}")
        else:
            disk.make_room()
            _finish(tally, conversion, destination, where)
        disk.make_room()
        for path in disk.path.iterdir():
            shutil.rmtree(path)
    return tally


def filled_at_many_moments(conversion: Conversion, disk: SmallDisk) -> Tally:
    """From the first bytes to the manifest; with room for nothing or for some pages."""
    parts, pages = (0, 0.2, 0.4, 0.6, 0.8, 1), (0, 5, 40)
    return filled(conversion, disk, [(part, 4096 * n) for part in parts for n in pages])


def _error(call: Callable[[], None]) -> str | None:
    """What it raises; an error that is not ours is a failure of the test."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return None


def _finish(tally: Tally, conversion: Conversion, destination: Path, where: str = "") -> None:
    try:
        problem = conversion.problem(destination) or conversion.finish(destination)
    except CheckpointError as error:
        problem = f"calling again: {error}"
    if problem:
        tally.wrong(f"{where}: {problem}")
    else:
        tally.add(AGAIN)


# ---- files that change between two attempts -------------------------------------------


def changed_work(conversion: Conversion, seed: int = 0) -> Tally:
    """What an earlier attempt left is cut off, damaged, mixed up or added to."""
    tally = Tally("converting", "unfinished work changed between attempts")
    for what, change in _changes(conversion, random.Random(seed)).items():
        destination = conversion.new_place()
        change(stop_at(conversion, destination, 0.7))
        try:
            problem, end = conversion.finish(destination), RIGHT
        except CheckpointError as error:
            named = f"{destination}.incomplete" in str(error)
            problem, end = None if named else str(error), REFUSED
        if problem:
            tally.wrong(f"{what}: {problem}")
        else:
            tally.add(end)
    return tally


Change = Callable[[Path], object]
"""Made to the folder of the tag in unfinished work."""


def _changes(conversion: Conversion, draw: random.Random) -> dict[str, Change]:
    def cut(folder: Path) -> None:
        os.truncate(path := _finished(folder), draw.randrange(path.stat().st_size))

    def flip(folder: Path) -> None:
        content = bytearray((path := _finished(folder)).read_bytes())
        content[len(content) // 4 + draw.randrange(len(content) // 2)] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

    return {
        **{f"a file cut off, {n}": cut for n in range(3)},
        **{f"a bit of a file, {n}": flip for n in range(9)},
        "an empty file": lambda folder: _finished(folder).write_bytes(b""),
        "a file is gone": lambda folder: _finished(folder).unlink(),
        "a part of a file": _writing("mp_rank_00_model_states.pt.part", b"PK"),
        "the rest of a manifest": _writing(".moe_groups.json.0123", b"{"),
        "a manifest": _writing("moe_groups.json", b"{}"),
        "a file of nobody": _writing("zero_pp_rank_9_mp_rank_00_optim_states.pt", b""),
        "latest": _writing("../latest", b"global_step3"),
        "no lock": lambda folder: (folder / "../../.lock").unlink(),
        "half of the job": lambda folder: os.truncate(folder / "../../.job.json", 40),
        "an empty job": _writing("../../.job.json", b""),
        "a job that is no text": _writing("../../.job.json", b"\xff\xfe"),
    }


def _finished(folder: Path) -> Path:
    return min(folder.glob("*optim_states.pt"))


def _writing(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def changed_source(conversion: Conversion) -> Tally:
    """The checkpoint changes between two attempts, or while it is converted."""
    tally = Tally("converting", "source changed in between")
    path = sorted((conversion.source / TAG).glob("*optim_states.pt"))[1]
    for moment in (
        "between, other time",
        "between, same time",
        "after damage",
        "meanwhile",
        "gone",
    ):
        destination = conversion.new_place()
        whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        other = bytearray(whole)
        for part in range(1, 20):
            other[len(whole) * part // 20] ^= 1
        said: str | None
        if moment.startswith("between"):
            stop_at(conversion, destination, 0.7)
            path.write_bytes(other)
            if "same" in moment:
                os.utime(path, ns=times)
            said = _error(lambda: convert(conversion.source, destination, conversion.second))
        elif moment == "after damage":  # nothing is made of damaged bytes that could be kept
            path.write_bytes(other)
            os.utime(path, ns=times)
            said = _error(lambda: convert(conversion.source, destination, conversion.second))
        else:
            act = path.unlink if moment == "gone" else lambda: os.utime(path)
            said = _error(lambda: convert_until(conversion, destination, 0.5, act))
        path.write_bytes(whole)
        os.utime(path, ns=times)
        _judge_change(tally, conversion, destination, moment, said)
    return tally


def _judge_change(
    tally: Tally, conversion: Conversion, destination: Path, moment: str, said: str | None
) -> None:
    """An error that names source or work, and nothing of it in what comes then."""
    folder = str(conversion.source / TAG)
    if said is None or destination.exists():
        tally.wrong(f"{moment}: no error")
    elif folder not in said and f"{destination}.incomplete" not in said:
        tally.wrong(f"{moment}: {said}")
    else:
        if "remove" in said:
            shutil.rmtree(f"{destination}.incomplete")
        _finish(tally, conversion, destination, moment)
