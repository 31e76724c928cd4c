"""Damaged checkpoints, and ranks that do not see the same."""

import dataclasses
import functools
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import distributed

from moe_groups import protect_checkpoints
from moe_groups.checkpoints.manifest import FILE_NAME, read_manifest, write_manifest
from tests.support.checkpoints.checkpoint_damage import flip_bit, records_of
from tests.support.checkpoints.guard_runs import (
    TAG,
    equal,
    error_of,
    on_first_rank,
    reordered,
    saved,
    shard,
    snapshot,
    started,
)
from tests.support.ranks import run_on_ranks
from tests.support.training import groups_by, train


def damage(kind: str, folder: Path) -> None:
    manifest = folder / TAG / FILE_NAME
    path = manifest if kind.startswith("manifest") else shard(folder, 1)
    if "expert" in kind:
        path = folder / TAG / "layer_1_expert_3_mp_rank_00_model_states.pt"  # rank 1 reads it
    elif "weights" in kind:
        path = folder / TAG / "mp_rank_00_model_states.pt"
    if kind.startswith("no manifest"):
        manifest.unlink()
    if kind.endswith("of another save"):
        shutil.copy(folder / "later" / path.name, path)
    elif kind.endswith("bit flipped"):
        record = max(records_of(path), key=lambda record: record.stop - record.start)
        flip_bit(path, record.stop - 1, 4)
    elif kind.endswith("missing"):
        path.unlink()
    elif kind.endswith("cut off"):
        os.truncate(path, path.stat().st_size // 2)
    elif kind.endswith("empty"):
        os.truncate(path, 0)
    elif kind == "of another checkpoint":
        said = read_manifest(manifest)  # as an earlier release wrote it
        files = {name: saved._replace(digest=None) for name, saved in said.files.items()}
        write_manifest(dataclasses.replace(said, files=files), manifest)
        other = shard(folder, 1, "other")
        assert other.stat().st_size == path.stat().st_size
        shutil.copy(other, path)
    else:
        torch.save({"optimizer_state_dict": None}, path)


MANIFEST = r"moe_groups\.json"
EXPERT = r"layer_1_expert_3_mp_rank_00_model_states\.pt"
WEIGHTS = r"mp_rank_00_model_states\.pt"
SHARD = r"zero_pp_rank_1_mp_rank_00_optim_states\.pt"
DAMAGE = {
    "missing": rf"{SHARD} is missing: moe_groups\.json lists it",
    "cut off": rf"{SHARD} has [\d,]+ bytes, but had [\d,]+ when it was saved",
    "of another checkpoint": f"{SHARD} holds others: the files are not of one checkpoint",
    "shard of another save": f"{SHARD} and {MANIFEST} are of different saves",
    "expert of another save": f"{EXPERT} and {MANIFEST} are of different saves",
    "weights of another save": f"{WEIGHTS} and {MANIFEST} are of different saves",
    "manifest of another save": rf"_states\.pt and {MANIFEST} are of different saves",
    "no manifest, expert missing": f"{EXPERT}, the weights of an expert, is missing",
    "no manifest, expert cut off": f"{EXPERT} cannot be read",
    "no manifest, weights missing": "no weights of model-parallel rank 0",
    "no manifest, weights cut off": f"{WEIGHTS} cannot be read",
    "shard, bit flipped": f"{SHARD} is damaged: the bytes of its record",
    "no manifest, shard, bit flipped": f"{SHARD} is damaged: the bytes of its record",
    "expert, bit flipped": f"{EXPERT} is damaged: the bytes of its record",
    "weights, bit flipped": f"{WEIGHTS} is damaged: the bytes of its record",
    "no manifest, missing": r"optimizer state of data-parallel rank 1 .* is missing",
    "no manifest, cut off": f"{SHARD} cannot be read",
    "no manifest, empty": f"{SHARD} cannot be read",
    "no manifest, no state": f"{SHARD}: no optimizer state of ZeRO-1, ZeRO-2 or BF16_Optimizer",
    "manifest cut off": "is damaged, it is not JSON",
    "manifest empty": "is damaged, it is not JSON",
}


def error_of_damaged(wrapper: str, folder: Path) -> list[tuple[str, bool]]:
    """For each damage the error, and whether the engine is as it was."""
    other = started(wrapper, reordered("module", 0, 2, 1))
    train(other, 2)
    other.save_checkpoint(str(folder / "good"), tag="other")
    later = saved(wrapper, groups_by("module"), folder / "good")
    train(later, 1)
    later.save_checkpoint(str(folder / "good"), tag="later", save_latest=False)
    engine = started(wrapper, groups_by("module"))
    protect_checkpoints(engine, check_data=True)
    before, found = snapshot(engine), []

    def prepare(kind: str, copy: Path) -> None:
        shutil.copytree(folder / "good", copy)
        damage(kind, copy)

    for number, kind in enumerate(DAMAGE):
        copy = folder / str(number)
        on_first_rank(functools.partial(prepare, kind, copy))
        error = error_of(engine, copy)
        found.append((str(error), equal(snapshot(engine), before)))
        if "expert" in kind:  # whatever of it is loaded
            assert str(error_of(engine, copy, load_module_only=True)) == str(error)
    assert error_of(engine, folder / "good") is None
    return found


@pytest.mark.parametrize("wrapper", ["zero1", "bf16"])
def test_damage_that_one_rank_sees(wrapper: str, tmp_path: Path) -> None:
    """All ranks raise the same, and nothing is loaded."""
    first, second = run_on_ranks(2, error_of_damaged, wrapper, tmp_path)
    assert first == second
    for (text, untouched), wanted in zip(first, DAMAGE.values(), strict=True):
        assert re.search(wanted, text), text
        assert untouched, text
        assert text.endswith("Nothing was loaded.")


def see_other_things(folder: Path) -> list[str]:
    """Arguments and files that differ between the ranks."""
    rank = distributed.get_rank()
    saved("zero1", groups_by("module"), folder)
    engine = started("zero1", groups_by("module"))
    on_first_rank(lambda: shutil.copytree(folder / TAG, folder / "again"))
    mine = folder / f"of rank {rank}"
    shutil.copytree(folder, mine, ignore=shutil.ignore_patterns("of rank*"))
    found = [str(error_of(engine, folder, tag=("again", TAG)[rank]))]
    if rank == 1:
        (mine / "latest").unlink()
    found.append(str(error_of(engine, mine)))
    if rank == 1:
        shutil.rmtree(mine / TAG)
    found.append(str(error_of(engine, mine, tag=TAG)))
    if rank == 1:
        (mine / "latest").write_bytes(b"\xff\xfe")
    found.append(str(error_of(engine, mine)))
    assert error_of(engine, folder) is None
    return found


def test_ranks_that_do_not_see_the_same(tmp_path: Path) -> None:
    """No rank goes on alone, which would hang the others."""
    found = run_on_ranks(2, see_other_things, tmp_path, timeout=60)
    assert "different checkpoints" in found[0][0]
    assert "rank 0: 'again', rank 1: 'global_step2'" in found[0][0]
    assert "rank 0: 'global_step2', rank 1: None" in found[0][1]
    assert "rank 1 of 2 ranks: global_step2 is not in" in found[0][2]
    assert "latest is damaged: 'utf-8' codec" in found[0][3]
    assert all("Nothing was loaded" in text for texts in found for text in texts)
