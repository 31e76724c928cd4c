"""Other wrappers, worlds, settings and releases of DeepSpeed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from moe_groups import MoE, create_moe_param_groups, protect_checkpoints
from moe_groups.checkpoints.layout import Rank
from moe_groups.checkpoints.manifest import FILE_NAME, read_manifest
from moe_groups.errors import CheckpointMismatchError
from tests.support.checkpoints.guard_runs import (
    ALIGNED,
    EXPERTS,
    ROUND_ROBIN,
    TAG,
    Case,
    Odd,
    collected,
    equal,
    error_of,
    forget_manifest,
    on_first_rank,
    refusal_of,
    reordered,
    saved,
    shard,
    snapshot,
    started,
)
from tests.support.models import HIDDEN
from tests.support.ranks import run_on_ranks
from tests.support.training import config, groups_by, initialize, train, weights

# ---- wrappers that do not write what their groups hold --------------------------------------


def without_mapping(wrapper: str, folder: Path) -> dict[str, Any]:
    engine = saved(wrapper, groups_by("module"), folder)
    found: dict[str, Any] = {"wrapper": read_manifest(folder / TAG / FILE_NAME).wrapper}
    wrong = started(wrapper, reordered("module", 0, 2, 1))
    found["refusal"] = refusal_of(wrong, folder)
    end = train(engine, 2, 2)
    engine = started(wrapper, groups_by("module"))
    with collected() as warned:
        engine.load_checkpoint(str(folder))
    found["same"] = not warned and train(engine, 2, 2) == end
    engine = started(wrapper, groups_by("module"))
    engine.load_checkpoint(str(folder), load_optimizer_states=False)
    found["masters"] = all(
        equal(
            master.to(engine.module.inp.weight.dtype), dict(engine.module.named_parameters())[name]
        )
        for name, master in weights(engine).items()
    )
    forget_manifest(folder)
    with collected() as warned:
        engine.load_checkpoint(str(folder))
    found["unknown"] = warned
    on_first_rank((folder / TAG / "expp_rank_1_mp_rank_00_optim_states.pt").unlink)
    found["missing"] = str(error_of(engine, folder))
    return found


@pytest.mark.parametrize("wrapper", ["half", "half_unfused", "fp32"])
def test_other_wrappers(wrapper: str, tmp_path: Path) -> None:
    """The manifest alone says what their groups are; without it a warning tells that."""
    names = {"half": "FP16_Optimizer", "half_unfused": "FP16_UnfusedOptimizer", "fp32": "AdamW"}
    for found in run_on_ranks(2, without_mapping, wrapper, tmp_path):
        assert found["wrapper"] == names[wrapper]
        assert "group 1 ('ep_size_2_blocks.1.moe') was saved as group 2" in found["refusal"]
        assert "Converting does not help" in found["refusal"]
        assert found["same"]
        assert found["masters"]
        ((text, file),) = found["unknown"]
        assert f"{names[wrapper]} does not write which parameters its groups hold" in text
        assert file == __file__
        assert "expp_rank_1_mp_rank_00_optim_states.pt, the optimizer states of" in found["missing"]


def zero3(folder: Path) -> tuple[bool, bool, str | None]:
    """A dense model, whose groups are steps of their own there."""

    def engine(turned: bool) -> Any:
        model = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(2)))
        groups = create_moe_param_groups(model, max_group_size=280)
        optimizer = torch.optim.AdamW(groups[::-1] if turned else groups)
        return initialize(model, optimizer, config("zero1", zero_optimization={"stage": 3}))

    saving = engine(False)
    saving.save_checkpoint(str(folder))
    layout = read_manifest(folder / "global_step0" / FILE_NAME).layout
    names = [param.name for group in layout.of(Rank(0, 0)) for param in group.params]
    right = names == [name for name, _ in saving.module.named_parameters()]
    loads = error_of(engine(False), folder) is None
    return right, loads, refusal_of(engine(True), folder)


def test_zero3(tmp_path: Path) -> None:
    for right, loads, refusal in run_on_ranks(2, zero3, tmp_path):
        assert right
        assert loads
        assert refusal is not None
        assert "group 0 ('dense.tile.1') was saved as group 1 ('dense.tile.1')" in refusal
        assert "Checkpoints of ZeRO-3 cannot be converted: make the groups" in refusal


# ---- other worlds and settings --------------------------------------------------------------


def save_mixed(wrapper: str, folder: Path, **options: Any) -> None:
    saved(wrapper, groups_by("module"), folder, **options)


def refusal_in(wrapper: str, folder: Path, split: str, **options: Any) -> tuple[str, list[str]]:
    engine = started(wrapper, groups_by(split), **options)
    before = snapshot(engine)
    found = []
    for again in (False, True):
        if again:
            forget_manifest(folder)
        error = error_of(engine, folder)
        assert isinstance(error, CheckpointMismatchError), error
        found.append(error.lines)
    assert equal(snapshot(engine), before)
    assert found[0] == found[1]
    return str(error), found[0]


@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("split", ["module", "expert"])
def test_another_world(old: int, new: int, split: str, tmp_path: Path) -> None:
    run_on_ranks(old, save_mixed, "zero1", tmp_path)
    answers = run_on_ranks(new, refusal_in, "zero1", tmp_path, split)
    assert all(answer == answers[0] for answer in answers)
    text, lines = answers[0]
    assert lines[0] == f"it was saved by {old} data-parallel ranks, the run has {new}"
    assert len(lines) == (1 if split == "module" else 2 + 18)
    assert "moe-groups regroup-checkpoint" in text


OTHER_SIZES = "it was saved with experts of ep_size_2, the run has experts of ep_size_1"


def test_another_ep_size(tmp_path: Path) -> None:
    """In the end without the manifest, which numbers the experts."""
    run_on_ranks(2, save_mixed, "zero1", tmp_path)
    options = {"model_options": {"ep_size": 1, "layers": 2}}
    for text, lines in run_on_ranks(2, refusal_in, "zero1", tmp_path, "module", **options):
        assert lines == [OTHER_SIZES]
        assert "nothing says which expert of all ranks blocks.0." in text
        assert "load_module_only=True" in text


def fewer_experts(folder: Path) -> tuple[str, list[str]]:
    options = {"ep_size": 1, "layers": 2, "num_experts": 2}
    engine = started("zero1", groups_by("module"), model_options=options)
    protect_checkpoints(engine, regroup="auto")
    error = error_of(engine, folder)
    assert isinstance(error, CheckpointMismatchError), error
    return str(error), error.lines


def test_fewer_experts_with_another_ep_size(tmp_path: Path) -> None:
    run_on_ranks(2, save_mixed, "zero1", tmp_path)
    for text, lines in run_on_ranks(2, fewer_experts, tmp_path):
        lost = f"the model has no blocks.0.{EXPERTS}.2.up.weight, the checkpoint has"
        assert lines[0] == OTHER_SIZES
        assert lost in lines
        assert "the model or its parallel sizes differ" in text


def test_another_model(tmp_path: Path) -> None:
    run_on_ranks(2, save_mixed, "bf16", tmp_path)
    options = {"model_options": {"ep_size": 2, "layers": 1}}
    for text, lines in run_on_ranks(2, refusal_in, "bf16", tmp_path, "module", **options):
        wanted = f"blocks.1.{EXPERTS}.0.up.bias is in the checkpoint, but no group of the engine"
        assert any(line.startswith(wanted) for line in lines)
        assert "Converting does not help" in text


@pytest.mark.long
def test_other_arrangement_of_experts(tmp_path: Path) -> None:
    run_on_ranks(4, save_mixed, "zero1", tmp_path)
    options = {"use_data_before_expert_parallelism": True}
    for text, lines in run_on_ranks(4, refusal_in, "zero1", tmp_path, "module", **options):
        assert lines == [
            "the experts of expert-parallel rank 0 of ep_size_2 were on data-parallel ranks 0, 2, "
            "and are on 0, 1",
            "the experts of expert-parallel rank 1 of ep_size_2 were on data-parallel ranks 1, 3, "
            "and are on 2, 3",
        ]
        assert "moe-groups regroup-checkpoint" in text


def with_setting(before: dict[str, Any], after: dict[str, Any], folder: Path) -> list[Any]:
    """Refusals with and without the manifest; where there are none, whether it trains on equal."""
    cases = [
        Case("zero2", "module", 1, None, {"contiguous_gradients": True, **zero}, Odd)
        for zero in (before, after)
    ]
    engine = cases[0].engine()
    train(engine, 2)
    engine.save_checkpoint(str(folder))
    end = train(engine, 2, 2)
    found: list[Any] = []
    for again in (False, True):
        if again:
            forget_manifest(folder)
        engine = cases[1].engine()
        refusal = refusal_of(engine, folder)
        found.append(refusal or train(engine, 2, 2) == end)
    return found


@pytest.mark.parametrize("before", [{}, ROUND_ROBIN, ALIGNED])
@pytest.mark.parametrize("after", [{}, ROUND_ROBIN, ALIGNED])
def test_settings_that_move_parameters(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    name = f"blocks.0.{EXPERTS}.0.down.weight"
    for found in run_on_ranks(2, with_setting, before, after, tmp_path):
        if before == after:
            assert found == [True, True]
            continue
        for text in found:
            assert "parameters of a rank are in another place" in text
        if ROUND_ROBIN not in (before, after):
            assert f"{name} (expert 0): saved in group 1" in found[0]


def converted(before: dict[str, Any], after: dict[str, Any], folder: Path) -> list[bool]:
    """Converted while loading, from DeepSpeed's own files: trains, is saved and is loaded."""
    old, new = (
        Case("zero2", split, 1, None, {"contiguous_gradients": True, **zero}, Odd)
        for split, zero in (("module", before), ("expert", after))
    )
    engine = old.engine()
    train(engine, 2)
    engine.save_checkpoint(str(folder))
    end = train(engine, 3, 2)["loss"]
    forget_manifest(folder)
    engine = new.engine()
    protect_checkpoints(engine, regroup="auto")
    engine.load_checkpoint(str(folder))
    found = [train(engine, 3, 2)["loss"] == end]
    engine.save_checkpoint(str(folder / "again"))
    end = train(engine, 2, 5)["loss"]
    engine = new.engine()
    engine.load_checkpoint(str(folder / "again"))
    return [*found, train(engine, 2, 5)["loss"] == end]


@pytest.mark.parametrize(
    ("before", "after"),
    [(ROUND_ROBIN, ROUND_ROBIN), (ROUND_ROBIN, {}), ({}, ROUND_ROBIN), (ROUND_ROBIN, ALIGNED)],
)
def test_conversion_between_settings(
    before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    assert run_on_ranks(2, converted, before, after, tmp_path) == [[True, True]] * 2


# ---- files of other releases and settings of DeepSpeed ---------------------------------------


def load_older(folder: Path) -> tuple[bool, str | None]:
    """Without what DeepSpeed 0.18 did not write."""
    engine = saved("zero1", groups_by("expert"), folder, model=Odd(MoE, 1))
    assert any(engine.optimizer.groups_padding) == (distributed.get_rank() == 1)
    end = train(engine, 2, 2)
    path = shard(folder, distributed.get_rank())
    content = torch.load(path, weights_only=False)
    del content["optimizer_state_dict"]["param_alignment_paddings"]
    torch.save(content, path)
    forget_manifest(folder)
    refusal = refusal_of(started("zero1", groups_by("module"), model=Odd(MoE, 1)), folder)
    engine = started("zero1", groups_by("expert"), model=Odd(MoE, 1))
    assert error_of(engine, folder) is None
    return train(engine, 2, 2) == end, refusal


def test_files_without_alignment(tmp_path: Path) -> None:
    for same, refusal in run_on_ranks(2, load_older, tmp_path):
        assert same
        assert refusal is not None


def load_elastic(folder: Path) -> list[str]:
    """DeepSpeed's own error for AdamW, whose steps it does not find; or a refusal of ours."""
    options = {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}
    saved("zero1", groups_by("module"), folder, **options)
    found = []
    for again in (False, True):
        if again:
            forget_manifest(folder)
        for split in ("module", "expert"):
            try:
                started("zero1", groups_by(split), **options).load_checkpoint(str(folder))
            except Exception as error:
                found.append(f"{type(error).__name__} {error}")
    return found


def test_elastic_checkpoints_are_compared(tmp_path: Path) -> None:
    for found in run_on_ranks(2, load_elastic, tmp_path):
        assert found[0] == found[2] == "AssertionError "
        assert found[1].startswith("CheckpointMismatchError")
        assert '"elastic_checkpoint": true' in found[3]
