"""Files of a checkpoint that are of two saves, cut off or missing, without an engine."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.checkpoints.files import list_saved
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Rank, merge_ranks
from moe_groups.checkpoints.manifest import FILE_NAME, Manifest, write_manifest
from moe_groups.errors import CheckpointError
from tests.support.checkpoints.checkpoint_damage import cut, save_again
from tests.support.checkpoints.made_checkpoints import make_checkpoint, random_state

SHARED = FlatGroup("dense", (0, 1), (FlatParam("a", 64, 0),))
LAYOUT = merge_ranks([(Rank(0, rank), [SHARED]) for rank in (0, 1)])
SHARD = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
WEIGHTS = "mp_rank_00_model_states.pt"
EXPERT = "layer_0_expert_0_mp_rank_00_model_states.pt"


def saved(directory: Path, tag: str, seed: int, manifest: bool = True) -> Path:
    """A checkpoint; all files of two have the same names and sizes."""
    make_checkpoint(directory, LAYOUT, random_state(LAYOUT, seed), tag=tag)
    torch.save({"w": torch.arange(5.0) + seed}, directory / tag / EXPERT)
    for number in (WEIGHTS, seed), (EXPERT, seed):
        save_again(directory / tag / number[0], lambda content: content.update(seed=seed))
    if manifest:
        made = Manifest(LAYOUT, "ZeRO-2", {"step": 7}, list_saved(directory / tag))
        write_manifest(made, directory / tag / FILE_NAME)
    return directory / tag


@pytest.mark.parametrize("name", [SHARD, WEIGHTS, EXPERT, FILE_NAME])
def test_files_of_two_saves_are_told_apart(name: str, tmp_path: Path) -> None:
    folder, later = (saved(tmp_path, tag, seed) for seed, tag in enumerate(("t", "t2")))
    assert inspect_checkpoint(tmp_path, "t").problems == ()
    shutil.copy(later / name, folder / name)
    problems = inspect_checkpoint(tmp_path, "t", data=False).problems
    found = {problem.file for problem in problems if "are of different saves" in problem.text}
    everything = {path.name for path in folder.glob("*_states.pt")}
    assert found == (everything if name == FILE_NAME else {name})
    with pytest.raises(CheckpointError, match="are of different saves"):
        regroup_checkpoint(tmp_path, tmp_path / "new", LAYOUT, tag="t")
    assert not (tmp_path / "new").exists()


def lose(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [lose, cut])
@pytest.mark.parametrize("name", [WEIGHTS, EXPERT])
def test_weights_without_a_manifest(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = saved(tmp_path, "t", 0, manifest=False)
    save_again(folder / WEIGHTS, lambda content: content.update(num_experts=[2]))
    shutil.copy(folder / EXPERT, folder / EXPERT.replace("expert_0", "expert_1"))
    regroup_checkpoint(tmp_path, tmp_path / "whole", LAYOUT)
    damage(folder / name)
    wanted = "cannot be read" if damage is cut else "is missing|has no weights"
    with pytest.raises(CheckpointError, match=wanted):
        regroup_checkpoint(tmp_path, tmp_path / "new", LAYOUT)
    assert not (tmp_path / "new").exists()
