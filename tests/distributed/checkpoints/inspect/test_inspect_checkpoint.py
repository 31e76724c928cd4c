"""Checkpoints of real engines: figures against what the ranks hold, and the commands."""

import argparse
import json
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from moe_groups import cli, protect_checkpoints
from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.checkpoints.inspect.report import CheckpointReport
from tests.support.checkpoints.checkpoint_damage import (
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
    steps: int = STEPS

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


ZERO1 = Case("zero1", 2, "expert", True)
ZERO2_BARE = Case("zero2", 2, "expert", False)
BF16 = Case("bf16", 4, "parallel_group", True)
UNTRAINED = Case("zero1", 2, "module", True, 0)
CASES = [ZERO1, ZERO2_BARE, BF16]

Norms = dict[tuple[str | None, int | None], dict[str, float]]
"""Sums of squares by layer and global expert number."""


def save_all(directory: Path, cases: list[Case]) -> dict[str, dict[str, torch.Tensor]]:
    """Train and save; the master weights by name, of this rank's parameters."""
    found = {}
    for case in cases:
        forget_process_groups()
        options = {"ep_size": 2, "num_experts": EXPERTS, "layers": LAYERS}
        engine = start(case.wrapper, groups_by(case.split), model_options=options)
        protect_checkpoints(engine, regroup="refuse" if case.manifest else "off")
        train(engine, case.steps)
        state = {"args": argparse.Namespace(seed=np.float64(1)), "rng": np.random.get_state()}
        engine.save_checkpoint(str(directory / case.name), client_state=state)
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
    for place, squares in expected.items():
        assert found[place] == pytest.approx(math.sqrt(squares[state]), rel=1e-9), (place, state)


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


# ---- command line ---------------------------------------------------------------------


def test_command(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(saved.directory / ZERO1.name, directory)
    assert cli.main(["inspect-checkpoint", str(directory)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert max(map(len, shown.out.splitlines()[1:])) <= 100
    assert shown.out.splitlines()[-1] == "no problems"
    for words in ("ZeRO-1, step 2, DP 2, EP 2", "blocks.1.moe", "exp_avg_sq", "moe_groups.json"):
        assert words in shown.out
    lost = shard_path(directory / TAG, 1)
    lost.unlink()
    assert cli.main(["inspect-checkpoint", str(directory), "--quick"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["1 problem:", f"  {lost.name} is missing: the optimizer state of rank 1."]
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
