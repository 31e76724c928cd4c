"""Checkpoints of real engines: figures against what the ranks hold, and every kind of damage."""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moe_groups import cli, protect_checkpoints
from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.checkpoints.files import list_saved
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.checkpoints.inspect.report import CheckpointReport
from moe_groups.checkpoints.manifest import FILE_NAME, UNFINISHED, read_manifest, write_manifest
from moe_groups.errors import CheckpointError
from tests.support.checkpoints.checkpoint_damage import (
    cut,
    flip_bit,
    overwrite,
    place_of,
    save_again,
    shard_path,
)
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import groups_by, start, train, weights

EXPERTS, LAYERS, STEPS = 4, 2, 2
TAG = f"global_step{STEPS}"
IN_EXPERT = ".moe.deepspeed_moe.experts.deepspeed_experts."


class Case(NamedTuple):
    wrapper: str
    world: int
    split: str
    manifest: bool
    cap: int | None = None
    steps: int = STEPS

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


ZERO1 = Case("zero1", 2, "expert", True)
ZERO1_BARE = Case("zero1", 4, "stock", False)
ZERO2 = Case("zero2", 4, "module", True, 1000)
ZERO2_BARE = Case("zero2", 2, "expert", False)
BF16 = Case("bf16", 4, "parallel_group", True)
BF16_BARE = Case("bf16", 4, "module", False)
UNTRAINED = Case("zero1", 2, "module", True, None, 0)
CASES = [ZERO1, ZERO1_BARE, ZERO2, ZERO2_BARE, BF16, BF16_BARE]

Norms = dict[tuple[str | None, int | None], dict[str, float]]
"""Sums of squares by layer and global expert number."""


def save_all(directory: Path, cases: list[Case]) -> dict[str, dict[str, torch.Tensor]]:
    """Train and save; the master weights by name, of this rank's parameters."""
    found = {}
    for case in cases:
        forget_process_groups()
        options = {"ep_size": 2, "num_experts": EXPERTS, "layers": LAYERS}
        engine = start(case.wrapper, groups_by(case.split, case.cap), model_options=options)
        protect_checkpoints(engine, regroup="refuse" if case.manifest else "off")
        train(engine, case.steps)
        engine.save_checkpoint(str(directory / case.name))
        found[case.name] = weights(engine)
        engine.destroy()
    return found


class Saved(NamedTuple):
    directory: Path
    weights: dict[str, list[dict[str, torch.Tensor]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Every case's checkpoint, and the weights of each rank."""
    directory = tmp_path_factory.mktemp("saved")
    masters: dict[str, list[dict[str, torch.Tensor]]] = {}
    for world in (2, 4):
        cases = [case for case in [*CASES, UNTRAINED] if case.world == world]
        ranks = run_on_ranks(world, save_all, directory, cases, timeout=300)
        masters |= {case.name: [rank[case.name] for rank in ranks] for case in cases}
    return Saved(directory, masters)


def home_of(name: str, ep_rank: int) -> tuple[str | None, int | None]:
    """Layer and global expert number of a parameter, from DeepSpeed's naming."""
    layer, inside, rest = name.partition(IN_EXPERT)
    if not inside:
        return None, None
    return f"{layer}.moe", ep_rank * (EXPERTS // 2) + int(rest.partition(".")[0])


# ---- figures --------------------------------------------------------------------------


def check_norms(report: CheckpointReport, state: str, expected: Norms) -> None:
    found = {(row.layer, row.expert): row.norms[state] for row in report.experts}
    assert found.keys() == expected.keys()
    for home, squares in expected.items():
        assert found[home] == pytest.approx(math.sqrt(squares[state]), rel=1e-9), (home, state)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_of_weights_are_those_of_the_engine(case: Case, saved: Saved) -> None:
    expected: Norms = defaultdict(lambda: defaultdict(float))
    for ep_rank in (0, 1):
        for name, tensor in saved.weights[case.name][ep_rank].items():
            if ep_rank == 0 or IN_EXPERT in name:
                expected[home_of(name, ep_rank)]["fp32"] += float(tensor.double().square().sum())
    report = inspect_checkpoint(saved.directory / case.name)
    assert not report.problems
    check_norms(report, "fp32", expected)
    elements = sum(row.elements for row in report.experts)
    assert elements == sum(group.elements for group in report.groups)
    own = saved.weights[case.name]
    names = own[0].keys()
    assert elements == sum(own[0][n].numel() * (2 if IN_EXPERT in n else 1) for n in names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_norms_of_moments_are_those_in_the_files(case: Case, saved: Saved) -> None:
    """Each file alone, with ``torch.load`` and DeepSpeed's own mapping."""
    expected: Norms = defaultdict(lambda: defaultdict(float))
    for rank in range(case.world):
        path = shard_path(saved.directory / case.name / TAG, rank)
        content = torch.load(path, weights_only=False)["optimizer_state_dict"]
        for index, mapping in enumerate(content["param_slice_mappings"]):
            state = content["base_optimizer_state"]["state"][index]
            for name, at in mapping.items():
                for key in ("exp_avg", "exp_avg_sq"):
                    part = state[key][at.start : at.start + at.numel].double()
                    expected[home_of(name, rank % 2)][key] += float(part.square().sum())
    report = inspect_checkpoint(saved.directory / case.name)
    check_norms(report, "exp_avg", expected)
    check_norms(report, "exp_avg_sq", expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_report_says_what_was_run(case: Case, saved: Saved) -> None:
    report = inspect_checkpoint(saved.directory / case.name)
    wrapper = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "bf16": "BF16_Optimizer"}[case.wrapper]
    assert report.wrapper == wrapper
    assert report.manifest is case.manifest
    assert (report.data_parallel_size, report.model_parallel_size) == (case.world, 1)
    assert report.expert_parallel_sizes == (2,)
    assert report.optimizer_step == report.global_steps == STEPS
    assert {group.step for group in report.groups} == {STEPS}
    assert all(group.options["lr"] == 1e-2 for group in report.groups)
    padding = 3 * 4 * 2 * case.world * len(report.groups)
    states = sum(group.state_bytes for group in report.groups)
    elements = sum(group.elements for group in report.groups)
    assert 3 * 4 * elements <= states <= 3 * 4 * elements + padding
    files = list((saved.directory / case.name / TAG).iterdir())
    assert (report.files, report.bytes) == (len(files), sum(p.stat().st_size for p in files))
    dense = report.groups[0]
    assert (dense.key, dense.layer, dense.ranks) == (None, None, tuple(range(case.world)))
    for group in report.groups[1:]:
        assert group.key == "ep_size_2"
        assert group.ranks == tuple(range(group.ep_rank or 0, case.world, 2))
        mine = {0: {0, 1}, 1: {2, 3}}[group.ep_rank or 0]
        assert set(group.experts) <= mine
        assert (len(group.experts) == 1) >= (case.split == "expert")


def test_without_tensors_the_same_but_norms(saved: Saved) -> None:
    for case in CASES:
        full = inspect_checkpoint(saved.directory / case.name)
        quick = inspect_checkpoint(saved.directory / case.name, data=False)
        assert quick.groups == full.groups
        assert not quick.problems
        assert [row.elements for row in quick.experts] == [row.elements for row in full.experts]
        assert all(row.norms == {} for row in quick.experts)


def test_before_the_first_step_there_are_weights_alone(saved: Saved) -> None:
    report = inspect_checkpoint(saved.directory / UNTRAINED.name)
    assert not report.problems
    assert report.optimizer_step == report.global_steps == 0
    assert {tuple(row.norms) for row in report.experts} == {("fp32",)}


def test_conversion_keeps_every_norm(saved: Saved, tmp_path: Path) -> None:
    before = inspect_checkpoint(saved.directory / BF16.name)
    regroup_checkpoint(saved.directory / BF16.name, tmp_path / "new", "expert")
    after = inspect_checkpoint(tmp_path / "new")
    assert not after.problems
    assert len(after.groups) > len(before.groups)
    for old, new in zip(before.experts, after.experts, strict=True):
        assert (old.layer, old.expert, old.elements) == (new.layer, new.expert, new.elements)
        assert new.norms == pytest.approx(dict(old.norms), rel=1e-12)


# ---- damage ---------------------------------------------------------------------------


class Damage(NamedTuple):
    """Something done to a checkpoint's folder, and what must be reported, and nothing else."""

    name: str
    do: Callable[[Path], Any]
    kind: str
    file: str
    said: tuple[str, ...]
    quick: bool  # is it seen without reading tensors?
    needs_manifest: bool = False


SHARD = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
EXPERT = "layer_1_expert_2_mp_rank_00_model_states.pt"
NAN = float("nan")


def flip_in(state: str, group: int) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = shard_path(folder, 1)
        flip_bit(path, place_of(path, group, state) + 5)

    return do


def put(value: float, state: str, group: int) -> Callable[[Path], None]:
    """In place of the second element of the group's partition on rank 1."""

    def do(folder: Path) -> None:
        path = shard_path(folder, 1)
        overwrite(path, group, state, 0 if state == "step" else 1, value)

    return do


def flip_in_weights(folder: Path) -> None:
    content = (folder / EXPERT).read_bytes()
    flip_bit(folder / EXPERT, content.index(b"data/0") + 200)


def flip_in_pickle(folder: Path) -> None:
    path = shard_path(folder, 1)
    flip_bit(path, path.read_bytes().index(b"clip_grad") + 2)


def leave_a_shard(folder: Path) -> None:
    shutil.copy(shard_path(folder, 1), folder / SHARD.replace("rank_1", "rank_9"))


def change_lr(folder: Path) -> None:
    def change(content: Any) -> None:
        groups = content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
        groups[0]["lr"] = 0.5

    save_again(shard_path(folder, 1), change)


def drop_a_parameter(folder: Path) -> None:
    def change(content: Any) -> None:
        content["optimizer_state_dict"]["param_slice_mappings"][1].popitem()

    save_again(shard_path(folder, 1), change)


def other_world(folder: Path) -> None:
    def change(content: Any) -> None:
        optimizer = content["optimizer_state_dict"]
        optimizer["partition_count"] = [2 * count for count in optimizer["partition_count"]]

    save_again(shard_path(folder, 1), change)


def forget_a_state(folder: Path) -> None:
    def change(content: Any) -> None:
        del content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg_sq"]

    save_again(shard_path(folder, 1), change)


def grow(folder: Path) -> None:
    save_again(folder / MODEL, lambda content: content.update(more="x" * 500))


def nan_weights(folder: Path) -> None:
    def change(content: Any) -> None:
        content["module"]["inp.weight"][3, 3:5] = float("inf")

    save_again(folder / MODEL, change)


def other_latest(folder: Path) -> None:
    (folder.parent / "latest").write_text("global_step99")


DAMAGES = [
    Damage(
        "flip", flip_in("exp_avg", 1), "checksum", SHARD, ("exp_avg of group 1", "CRC-32"), False
    ),
    Damage("flip weights", flip_in("fp32", 0), "checksum", SHARD, ("fp32 of group 0",), False),
    Damage("flip model", flip_in_weights, "checksum", EXPERT, ("data/0",), False),
    Damage("flip pickle", flip_in_pickle, "checksum", SHARD, ("data.pkl",), True),
    Damage("cut", lambda f: cut(shard_path(f, 1)), "unreadable", SHARD, ("cut off",), True),
    Damage("cut model", lambda f: cut(f / MODEL), "unreadable", MODEL, ("cut off",), True),
    Damage("cut expert", lambda f: cut(f / EXPERT), "unreadable", EXPERT, ("cannot",), True),
    Damage("lost", lambda f: shard_path(f, 1).unlink(), "missing", SHARD, ("of rank 1.",), True),
    Damage("lost expert", lambda f: (f / EXPERT).unlink(), "missing", EXPERT, (), True),
    Damage("lost model", lambda f: (f / MODEL).unlink(), "missing", MODEL, (), True),
    Damage("extra", leave_a_shard, "extra", SHARD.replace("rank_1", "rank_9"), ("left",), True),
    Damage("nan", put(NAN, "exp_avg", 0), "not finite", SHARD, ("exp_avg of ", "1 of "), False),
    Damage("inf", put(math.inf, "fp32", 1), "not finite", SHARD, ("fp32 of ",), False),
    Damage(
        "step", put(7.0, "step", 1), "step", SHARD, ("rank 1: ", " is 7, elsewhere it is 2."), True
    ),
    Damage("lr", change_lr, "content", SHARD, ("rank 1: lr of group 'dense' is 0.5, for ",), True),
    Damage(
        "params", drop_a_parameter, "content", SHARD, ("not what the manifest says",), True, True
    ),
    Damage("world", other_world, "content", SHARD, ("left over from another save",), True),
    Damage(
        "states",
        forget_a_state,
        "content",
        SHARD,
        ("rank 1: the optimizer state of group 'dense' is exp_avg, step, for ",),
        True,
    ),
    Damage("size", grow, "size", MODEL, ("when it was saved it had",), True, True),
    Damage("weights", nan_weights, "not finite", MODEL, ("2 values of inp.weight",), False),
    Damage("latest", other_latest, "latest", "latest", ("'global_step99'",), True),
]


def damaged(saved: Saved, case: Case, damage: Damage, tmp_path: Path) -> Path:
    """A copy of the checkpoint with the damage; a file that was saved again is listed so."""
    directory = tmp_path / "damaged"
    shutil.copytree(saved.directory / case.name, directory)
    damage.do(directory / TAG)
    manifest = directory / TAG / FILE_NAME
    if damage.kind in ("content", "not finite", "step", "") and case.manifest:
        said = read_manifest(manifest)
        write_manifest(replace(said, files=list_saved(manifest.parent)), manifest)
    return directory


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
@pytest.mark.parametrize("case", [ZERO2_BARE, ZERO2, BF16, BF16_BARE], ids=lambda case: case.name)
def test_damage_is_found_and_nothing_else(
    case: Case, damage: Damage, saved: Saved, tmp_path: Path
) -> None:
    if damage.needs_manifest and not case.manifest:
        pytest.skip("only a manifest tells")
    directory = damaged(saved, case, damage, tmp_path)
    for data in (True, False):
        problems = inspect_checkpoint(directory, TAG, data=data).problems
        if not data and not damage.quick:
            assert not problems
            continue
        assert [(p.kind, p.file) for p in problems] == [(damage.kind, damage.file)]
        for part in damage.said:
            assert part in problems[0].text
        assert str(directory) not in problems[0].text


def names_in(case: Case, group: int, folder: Path, index: int = 0) -> tuple[str, str]:
    """A group's name, and a parameter's in its partition on rank 1."""
    shard = torch.load(shard_path(folder, 1), weights_only=False)["optimizer_state_dict"]
    name = shard["base_optimizer_state"]["param_groups"][group]["name"]
    return name, list(shard["param_slice_mappings"][group])[index]


@pytest.mark.parametrize("case", [ZERO1, ZERO2_BARE, BF16], ids=lambda case: case.name)
def test_nan_names_parameter_expert_and_count(case: Case, saved: Saved, tmp_path: Path) -> None:
    nan = Damage("", put(NAN, "exp_avg", 1), "not finite", SHARD, (), False)
    directory = damaged(saved, case, nan, tmp_path)
    report = inspect_checkpoint(directory)
    _, param = names_in(case, 1, directory / TAG)
    layer, expert = home_of(param, 1)
    (problem,) = report.problems
    assert f"exp_avg of {param} (expert {expert}): 1 of " in problem.text
    (row,) = [row for row in report.experts if math.isnan(row.norms["exp_avg"])]
    assert (row.layer, row.expert) == (layer, expert)
    assert math.isfinite(row.norms["fp32"])


@pytest.mark.parametrize("case", [ZERO1, BF16_BARE], ids=lambda case: case.name)
def test_flip_and_step_name_the_group(case: Case, saved: Saved, tmp_path: Path) -> None:
    name, _ = names_in(case, 2, saved.directory / case.name / TAG)
    for number, damage in enumerate((flip_in("exp_avg_sq", 2), put(1.0, "step", 2))):
        case_of = Damage("", damage, "", SHARD, (), False)
        directory = damaged(saved, case, case_of, tmp_path / str(number))
        (problem,) = inspect_checkpoint(directory).problems
        assert repr(name) in problem.text
        assert problem.file == SHARD


def test_one_stale_shard_of_another_step(saved: Saved, tmp_path: Path) -> None:
    """All counters of a rank differ: one line, and the engine's step says which side is right."""
    directory = tmp_path / "stale"
    shutil.copytree(saved.directory / ZERO2_BARE.name, directory)
    path = shard_path(directory / TAG, 0)
    content = torch.load(path, weights_only=False)
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] += 40
    torch.save(content, path)
    (problem,) = inspect_checkpoint(directory).problems
    assert (problem.kind, problem.file) == ("step", path.name)
    assert "rank 0: the step counter of groups 'dense', " in problem.text
    assert "and 2 more is 42, elsewhere it is 2." in problem.text


def test_shard_of_another_grouping(saved: Saved, tmp_path: Path) -> None:
    directory = tmp_path / "mixed"
    shutil.copytree(saved.directory / BF16_BARE.name, directory)
    shutil.copy(shard_path(saved.directory / BF16.name / TAG, 1), directory / TAG)
    problems = inspect_checkpoint(directory).problems
    assert [problem.kind for problem in problems] == ["content"]
    assert SHARD in problems[0].text


def test_damaged_manifest_is_reported_and_done_without(saved: Saved, tmp_path: Path) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(saved.directory / ZERO2.name, directory)
    whole = inspect_checkpoint(directory)
    manifest = directory / TAG / FILE_NAME
    manifest.write_text(manifest.read_text()[:-40])
    report = inspect_checkpoint(directory)
    assert [(p.kind, p.file) for p in report.problems] == [("manifest", FILE_NAME)]
    assert not report.manifest
    assert report.experts == whole.experts
    assert [group.name for group in report.groups] == [group.name for group in whole.groups]


def test_a_save_that_was_stopped_is_reported(saved: Saved, tmp_path: Path) -> None:
    directory = tmp_path / "stopped"
    shutil.copytree(saved.directory / ZERO1.name, directory)
    (directory / TAG / FILE_NAME).rename(directory / TAG / UNFINISHED)
    report = inspect_checkpoint(directory)
    assert [(p.kind, p.file) for p in report.problems] == [("unfinished", UNFINISHED)]
    assert "was not saved to its end" in report.problems[0].text
    assert report.experts == inspect_checkpoint(saved.directory / ZERO1.name).experts


def test_what_is_left_is_reported(saved: Saved, tmp_path: Path) -> None:
    """Without a manifest and two of four ranks, the rest still has its groups and norms."""
    directory = tmp_path / "half"
    shutil.copytree(saved.directory / ZERO1_BARE.name, directory)
    whole = inspect_checkpoint(directory)
    for rank in (1, 3):
        shard_path(directory / TAG, rank).unlink()
    report = inspect_checkpoint(directory)
    assert [problem.kind for problem in report.problems] == ["missing", "missing"]
    assert "without the optimizer states of 2 of 4 ranks" in report.notes[0]
    assert [g.name for g in report.groups] == list(dict.fromkeys(g.name for g in whole.groups))
    assert {row.layer for row in report.experts} == {row.layer for row in whole.experts}
    left = sum(row.elements for row in report.experts)
    assert 0 < left < sum(row.elements for row in whole.experts)
    for rank in (0, 2):
        cut(shard_path(directory / TAG, rank))
    report = inspect_checkpoint(directory)
    assert [p.kind for p in report.problems] == ["missing"] * 2 + ["unreadable"] * 2
    assert (report.groups, report.experts) == ((), ())


def test_manifest_alone_tells_what_is_lost(saved: Saved, tmp_path: Path) -> None:
    directory = tmp_path / "empty"
    shutil.copytree(saved.directory / BF16.name, directory)
    for path in (directory / TAG).glob("*_optim_states.pt"):
        path.unlink()
    report = inspect_checkpoint(directory)
    assert [problem.kind for problem in report.problems] == ["missing"] * BF16.world
    whole = inspect_checkpoint(saved.directory / BF16.name)
    assert [g.elements for g in report.groups] == [g.elements for g in whole.groups]


def test_tags(saved: Saved, tmp_path: Path) -> None:
    directory = tmp_path / "tags"
    shutil.copytree(saved.directory / ZERO1.name, directory)
    shutil.copytree(directory / TAG, directory / "older")
    for found in (
        inspect_checkpoint(directory, "older"),
        inspect_checkpoint(directory / "older"),
    ):
        assert (found.tag, found.problems) == ("older", ())
        assert found.notes == (f"latest names {TAG!r}: that is loaded where no tag is given",)
    (directory / "latest").unlink()
    assert "no file 'latest'" in inspect_checkpoint(directory, TAG).notes[0]
    with pytest.raises(CheckpointError, match="latest"):
        inspect_checkpoint(directory)


def test_what_is_no_checkpoint(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        inspect_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        inspect_checkpoint(tmp_path)
    directory = tmp_path / "other"
    shutil.copytree(saved.directory / ZERO1_BARE.name, directory)
    for rank in range(ZERO1_BARE.world):  # as ZeRO-3 would have it
        save_again(
            shard_path(directory / TAG, rank),
            lambda content: content.update(optimizer_state_dict={"fp32_flat_groups": []}),
        )
    with pytest.raises(CheckpointError, match="no optimizer state of ZeRO-1, ZeRO-2 or BF16"):
        inspect_checkpoint(directory)
    for path in (directory / TAG).glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no optimizer states"):
        inspect_checkpoint(directory)


# ---- command line ---------------------------------------------------------------------


def test_command(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(saved.directory / ZERO2.name, directory)
    assert cli.main(["inspect-checkpoint", str(directory)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert max(map(len, shown.out.splitlines()[1:])) <= 100
    assert shown.out.splitlines()[-1] == "no problems"
    for words in ("ZeRO-2, step 2, DP 4, EP 2", "blocks.1.moe", "exp_avg_sq", "moe_groups.json"):
        assert words in shown.out
    shard_path(directory / TAG, 1).unlink()
    assert cli.main(["inspect-checkpoint", str(directory), "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["1 problem:", f"  {SHARD} is missing: the optimizer state of rank 1."]
    assert cli.main(["inspect-checkpoint", str(directory), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [problem["kind"] for problem in found["problems"]] == ["missing"]
    assert found == json.loads(inspect_checkpoint(directory).as_json())
    assert cli.main(["inspect-checkpoint", str(directory), "--tag", "no"]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "has no checkpoint 'no'" in shown.err


def test_regroup_command(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, made = str(saved.directory / ZERO1.name), str(tmp_path / "made")
    arguments = ["regroup-checkpoint", source, made, "--to", "module", "--workers", "2"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert re.fullmatch(rf"wrote {made}: \d+ files, \d+ KiB in \d+\.\d s\n", shown.out)
    assert shown.err == ""
    report = inspect_checkpoint(made)
    assert not report.problems
    assert len(report.groups) == 1 + 2 * LAYERS
    assert cli.main(arguments) == 2
    assert cli.main([*arguments[:2], made + "2", "--to", "layers"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("moe-groups regroup-checkpoint: error: ") for line in lines)
