"""Real ranks that load a checkpoint of other groups (regroup="auto"), and meet damage."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_groups import protect_checkpoints
from moe_groups.checkpoints.manifest import FILE_NAME
from moe_groups.errors import MoEGroupsError
from tests.support.checkpoints.fault_table import REFUSED, RIGHT, Tally
from tests.support.checkpoints.saving_faults import WORLD, digest, engine_of
from tests.support.ranks import run_on_ranks
from tests.support.training import train

KINDS = {
    "optimizer states": "*pp_rank_1_*optim_states.pt",
    "dense weights": "mp_rank_00_model_states.pt",
    "an expert's weights": "layer_1_expert_15_*",  # read by rank 1 alone
    "the manifest": FILE_NAME,
}


class Damage(NamedTuple):
    """What is done to a file before it is loaded; ``content`` None removes it."""

    kind: str
    fault: str
    path: Path
    content: bytes | None


def save(folder: Path, wrapper: str) -> None:
    """A checkpoint of groups by module."""
    engine = engine_of(wrapper)
    train(engine, 2)
    engine.save_checkpoint(str(folder / "checkpoints"), tag="first")


def load_damaged(
    folder: Path, wrapper: str, damages: list[Damage], split: str, scratch: Path | None = None
) -> list[tuple[str, str, bool]]:
    """Load into other groups after each damage: how it ended, error or digest, and is anything
    of the engine changed although it was refused? The first attempt is without damage."""
    engine = engine_of(wrapper, split)
    protect_checkpoints(engine, regroup="auto", scratch_dir=scratch)
    results = []
    for damage in (None, *damages):
        train(engine, 1)  # so that there is something to load
        before = digest(engine)
        whole = _apply(damage)
        try:
            engine.load_checkpoint(str(folder / "checkpoints"))
            results.append((RIGHT, digest(engine), False))
        except MoEGroupsError as error:
            results.append((REFUSED, str(error), digest(engine) != before))
        except Exception as error:
            results.append(("error", f"{type(error).__name__}: {error}", False))
        _undo(damage, whole)
    return results


def _apply(damage: Damage | None) -> bytes:
    whole = b""
    if damage is not None and torch.distributed.get_rank() == 0:
        whole = damage.path.read_bytes()
        if damage.content is None:
            damage.path.unlink()
        else:
            damage.path.write_bytes(damage.content)
    torch.distributed.barrier()
    return whole


def _undo(damage: Damage | None, whole: bytes) -> None:
    torch.distributed.barrier()
    if damage is not None and torch.distributed.get_rank() == 0:
        damage.path.write_bytes(whole)
    torch.distributed.barrier()


def damages_of(folder: Path, lengths: int, bits: int, seed: int = 0) -> Iterator[Damage]:
    """Each kind of file cut off, with single bits changed, and missing."""
    draw = random.Random(seed)
    for kind, pattern in KINDS.items():
        (path,) = (folder / "checkpoints/first").glob(pattern)
        whole = path.read_bytes()
        for number in range(lengths):
            yield Damage(kind, "cut off", path, whole[: len(whole) * number // lengths])
        for _ in range(bits):
            changed = bytearray(whole)
            changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            yield Damage(kind, "a bit changed", path, bytes(changed))
        yield Damage("a file", "missing", path, None)


def damaged_loads(folder: Path, wrapper: str, lengths: int, bits: int) -> list[Tally]:
    """Damage the checkpoint of other groups that ranks load."""
    run_on_ranks(WORLD, save, folder, wrapper)
    damages = list(damages_of(folder, lengths, bits))
    rows = run_on_ranks(WORLD, load_damaged, folder, wrapper, damages, "expert", timeout=400)
    first, *rest = zip(*rows, strict=True)
    assert [end for end, *_ in first] == [RIGHT] * WORLD
    tallies: dict[str, Tally] = {}
    for damage, found in zip(damages, rest, strict=True):
        fault = f"{damage.kind}: {damage.fault}"
        tally = tallies.setdefault(fault, Tally('loading with regroup="auto"', fault))
        problem = _problem(damage, list(found), list(first))
        if problem:
            tally.wrong(f"{damage.path.name}: {problem}")
        else:
            tally.add(found[0][0])
    left = [*(folder / "checkpoints").glob(".moe_groups*")]
    assert left == []
    return list(tallies.values())


def _problem(damage: Damage, found: list[Any], right: list[Any]) -> str | None:
    if {end for end, *_ in found} == {RIGHT}:
        return None if found == right else "silently other state"
    if {end for end, *_ in found} != {REFUSED}:
        return f"ranks differ, or no error of ours: {found}"
    if any(changed for *_, changed in found):
        return "something was loaded before the error"
    text = found[0][1]
    return None if damage.path.name in text else f"the error does not name it: {text}"


def load_with_error_on_rank_1(folder: Path, wrapper: str) -> None:
    """The caller's own function fails on one rank in the middle of DeepSpeed's loading."""
    engine = engine_of(wrapper, "expert")
    protect_checkpoints(engine, regroup="auto")

    def load_module(src: Any, dst: torch.nn.Module) -> None:
        if torch.distributed.get_rank() == 1:
            raise ValueError("an error of rank 1")
        dst.load_state_dict(src)

    engine.load_checkpoint(str(folder / "checkpoints"), custom_load_fn=load_module)
