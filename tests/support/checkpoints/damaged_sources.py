"""Checkpoints whose files are cut off, changed, missing, unreadable or too new, and conversions."""

import ctypes
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from moe_groups.checkpoints.manifest import FILE_NAME, SCHEMA
from moe_groups.errors import CheckpointError
from tests.support.checkpoints.conversion_faults import TAG, Conversion, convert, tree
from tests.support.checkpoints.fault_table import REFUSED, RIGHT, Tally
from tests.support.checkpoints.made_checkpoints import same
from tests.support.checkpoints.victims import Victim

Damage = tuple[str, Path, Callable[[], None]]
"""What it is, the file that an error has to name, and what makes it."""


def kinds_of_files(conversion: Conversion) -> dict[str, Path]:
    """One file of each kind."""
    folder = conversion.source / TAG
    return {
        "optimizer states": folder / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
        "dense weights": folder / "mp_rank_00_model_states.pt",
        "an expert's weights": folder / "layer_0_expert_0_mp_rank_00_model_states.pt",
        "the manifest": folder / FILE_NAME,
    }


def every_damage(conversion: Conversion, lengths: int, bits: int) -> list[Tally]:
    """Each kind of file cut off, with single bits changed, missing; and a newer manifest."""
    files = kinds_of_files(conversion)
    tallies = []
    for kind, path in files.items():
        tallies += [
            damaged(conversion, f"{kind}: cut off", cut_off(path, lengths)),
            damaged(conversion, f"{kind}: a bit changed", flipped(path, bits)),
        ]
    gone = [*files.values(), conversion.source / "latest"]
    return [
        *tallies,
        damaged(conversion, "a file is missing", missing(gone)),
        damaged(conversion, "manifest of a newer schema", newer_manifest(files["the manifest"])),
    ]


def damaged(conversion: Conversion, fault: str, damages: Iterable[Damage]) -> Tally:
    """Convert after each damage: the right result, or an error that names the file."""
    tally = Tally("converting", fault)
    for what, path, damage in damages:
        before = path.read_bytes()
        damage()
        try:
            problem, refused = _attempt(conversion, path)
        finally:
            path.unlink(missing_ok=True)
            path.write_bytes(before)
        if problem:
            tally.wrong(f"{what} of {path.name}: {problem}")
        else:
            tally.add(REFUSED if refused else RIGHT)
    return tally


def _attempt(conversion: Conversion, path: Path) -> tuple[str | None, bool]:
    """What is wrong, and was it refused?"""
    source, destination = tree(conversion.source), conversion.new_place()
    try:
        convert(conversion.source, destination, conversion.second)
    except CheckpointError as error:
        if path.name not in str(error):
            return f"the error does not name it: {error}", True
        if destination.exists():
            return "a destination beside the error", True
    except Exception as error:
        return f"no error of ours: {type(error).__name__}: {error}", True
    finally:
        shutil.rmtree(f"{destination}.incomplete", ignore_errors=True)
    if tree(conversion.source) != source:
        return "the source was changed", False
    if destination.exists():
        return (None if _is_right(conversion, destination) else "silently another result"), False
    return None, True


def _is_right(conversion: Conversion, destination: Path) -> bool:
    """The same content; the bytes between the records of a copied archive mean nothing."""
    found, right = tree(destination), conversion.right
    differ = [name for name in right if found.get(name) != right[name]]
    if not (conversion.source / TAG / FILE_NAME).exists():
        differ.remove(f"{TAG}/{FILE_NAME}")  # says less then
    pairs = [(destination / name, conversion.place / "1" / name) for name in differ]
    return found.keys() == right.keys() and all(
        same(*(torch.load(path, weights_only=False) for path in pair)) for pair in pairs
    )


def cut_off(path: Path, lengths: int) -> Iterator[Damage]:
    """The file cut off at some lengths, from nothing to its last byte."""
    whole = path.read_bytes()
    for number in range(lengths):
        length = len(whole) * number // lengths if number else 0
        yield f"{length} bytes", path, _write(path, whole[:length])
    yield "all but a byte", path, _write(path, whole[:-1])


def flipped(path: Path, count: int, seed: int = 0) -> Iterator[Damage]:
    """Single bits changed at random places."""
    whole = path.read_bytes()
    draw = random.Random(seed)
    for _ in range(count):
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        changed = bytearray(whole)
        changed[at] ^= 1 << bit
        yield f"bit {bit} of byte {at}", path, _write(path, bytes(changed))


def _write(path: Path, content: bytes) -> Callable[[], None]:
    def write() -> None:
        path.write_bytes(content)

    return write


def missing(paths: list[Path]) -> Iterator[Damage]:
    for path in paths:
        yield "missing", path, path.unlink


def newer_manifest(path: Path) -> Iterator[Damage]:
    """As a later release would write it: more than this one can know."""
    content = json.loads(path.read_text())
    for changes in ({"schema": SCHEMA + 1}, {"schema": SCHEMA + 1, "groups": {"in": "columns"}}):
        text = json.dumps(content | changes)
        yield "a newer schema", path, _write(path, text.encode())


def convert_by_the_modes(conversion: Conversion, destination: Path) -> None:
    """As somebody to whom the modes of files apply; root loses what they do not to."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
    convert(conversion.source, destination, conversion.second)


def forbidden(conversion: Conversion) -> Tally:
    """Files that may not be read, and a destination that may not be made."""
    tally = Tally("converting", "no permission")
    folder = conversion.source / TAG
    for path in (*kinds_of_files(conversion).values(), folder, conversion.place):
        destination, mode = conversion.new_place(), path.stat().st_mode
        path.chmod(0o555 if path == conversion.place else 0)
        end = Victim(convert_by_the_modes, conversion, destination).go().end()
        path.chmod(mode)
        named = f"{destination}.incomplete" if path == conversion.place else str(path)
        if end.value != "CheckpointError" or named not in end.text or destination.exists():
            tally.wrong(f"{path.name}: {end}")
        else:
            tally.add(REFUSED)
        shutil.rmtree(f"{destination}.incomplete", ignore_errors=True)
    return tally
