"""Inspection of made checkpoints: random models, random bits, large files, large reports."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moe_groups import cli
from moe_groups._common.progress import in_order
from moe_groups.checkpoints.files import list_saved
from moe_groups.checkpoints.inspect import examine
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.checkpoints.inspect.report import CheckpointReport, Problem, SavedExpert, SavedGroup
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.checkpoints.manifest import FILE_NAME, UNFINISHED, Manifest, write_manifest
from moe_groups.cli.checkpoint_report import common_ends, fold, print_report
from moe_groups.cli.progress import show_progress
from moe_groups.errors import CheckpointError, InvalidArgumentError
from tests.support.checkpoints.checkpoint_damage import (
    cut,
    flip_bit,
    overwrite,
    place_of,
    records_of,
    save_again,
    shard_path,
)
from tests.support.checkpoints.made_checkpoints import key_of, make_checkpoint, random_state

TAG = "global_step7"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


# ---- reading in chunks ----------------------------------------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_sums_are_those_of_the_whole_tensors(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    numel = data.draw(st.integers(0, 60))
    tensor = torch.randn(numel, generator=generator).to(data.draw(st.sampled_from(DTYPES)))
    for bad in (math.nan, math.inf, -math.inf)[: data.draw(st.integers(0, 3)) if numel else 0]:
        tensor[data.draw(st.integers(0, numel - 1))] = bad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examine, "_CHUNK", data.draw(st.integers(1, 70)))
        square, broken = examine.examine_values(tensor)
    wide = tensor.double()
    assert square == pytest.approx(float(wide.square().sum()), rel=1e-12, nan_ok=True)
    assert broken == int((~wide.isfinite()).sum())


def test_large_numbers_are_no_infinite_values() -> None:
    assert examine.examine_values(torch.full((3,), 1e200, dtype=torch.float64)) == (math.inf, 0)


def test_records_without_a_crc_are_counted(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        layout = made_layout(tmp_path, 2, 1, {0: [[3]]})
    finally:
        torch.serialization.set_crc32_options(before)
    report = inspect_checkpoint(tmp_path)
    assert layout.groups
    assert not report.problems
    (note,) = report.notes
    assert "records state no CRC-32" in note


# ---- made checkpoints -----------------------------------------------------------------


def layout_of(
    world: int, ep_size: int, layers: dict[int, list[list[int]]], dense: tuple[int, ...] = (5, 8)
) -> Layout:
    """Layers whose local experts have parameters of these sizes; a group for each layer."""
    columns = []
    for rank in range(world):
        ep_rank, own = rank % ep_size, []
        names = [FlatParam(f"dense.{i}", numel, 0) for i, numel in enumerate(dense)]
        own.append(FlatGroup("dense", tuple(range(world)), lay_out(names)))
        for layer, experts in layers.items():
            rows = [
                FlatParam(
                    f"layers.{layer}.moe.deepspeed_moe.experts.deepspeed_experts.{number}.w{i}",
                    numel,
                    0,
                    expert=ep_rank * len(experts) + number,
                )
                for number, sizes in enumerate(experts)
                for i, numel in enumerate(sizes)
            ]
            name, key = f"ep_size_{ep_size}_layers.{layer}.moe", f"ep_size_{ep_size}"
            shared = tuple(range(ep_rank, world, ep_size))
            own.append(FlatGroup(name, shared, lay_out(rows), 0, key, ep_rank))
        columns.append((Rank(0, rank), own))
    return merge_ranks(columns)


def made_layout(
    directory: Path, world: int, ep_size: int, layers: dict[int, list[list[int]]]
) -> Layout:
    layout = layout_of(world, ep_size, layers)
    make_checkpoint(directory, layout, random_state(layout))
    return layout


def add_manifest(directory: Path, layout: Layout, wrapper: str = "ZeRO-2") -> None:
    folder = directory / TAG
    made = Manifest(layout, wrapper, {"step": 7}, list_saved(folder))
    write_manifest(made, folder / FILE_NAME)


@st.composite
def models(draw: Any) -> tuple[int, int, dict[int, list[list[int]]]]:
    ep_size = draw(st.sampled_from([1, 2, 3]))
    sizes = st.lists(st.integers(1, 20), min_size=1, max_size=3)
    layers = {}
    for layer in draw(st.lists(st.integers(0, 20), min_size=1, max_size=3, unique=True)):
        layers[layer] = [draw(sizes)] * draw(st.integers(1, 3))
    return ep_size * draw(st.integers(1, 3)), ep_size, layers


@settings(max_examples=30, deadline=None, derandomize=True)
@given(model=models(), kind=st.sampled_from(["zero", "bf16"]))
def test_norms_by_expert_with_and_without_a_manifest(
    model: tuple[int, int, dict[int, list[list[int]]]], kind: str
) -> None:
    layout = layout_of(*model)
    values = random_state(layout, seed=3)
    expected: dict[tuple[str | None, int | None], dict[str, float]] = defaultdict(
        lambda: defaultdict(float)
    )
    for group in layout.groups:
        for param in group.params:
            layer = None if group.parallel_group is None else param.name.split(".deepspeed")[0]
            for state, tensor in values[key_of(group, param.name)].items():
                expected[layer, param.expert][state] += float(tensor.double().square().sum())
    with tempfile.TemporaryDirectory() as place:
        make_checkpoint(Path(place), layout, values, kind)
        bare = inspect_checkpoint(place)
        add_manifest(Path(place), layout, "ZeRO-2" if kind == "zero" else "BF16_Optimizer")
        full = inspect_checkpoint(place, workers=3)
    assert bare.problems == full.problems == ()
    assert (bare.manifest, full.manifest) == (False, True)
    assert bare.experts == full.experts
    assert bare.wrapper == full.wrapper
    assert len(full.experts) == len(expected)
    for row in full.experts:
        squares = {state: norm**2 for state, norm in row.norms.items()}
        assert squares == pytest.approx(dict(expected[row.layer, row.expert]), rel=1e-12)


def test_model_parallel_ranks_are_kept_apart(tmp_path: Path) -> None:
    one = layout_of(2, 1, {0: [[4], [4]]})
    columns = [
        (Rank(m, r.data), [dataclasses.replace(g, model_rank=m) for g in one.of(r)])
        for m in (0, 1)
        for r in sorted(one.order)
    ]
    layout = merge_ranks(columns)
    make_checkpoint(tmp_path, layout, random_state(layout))
    report = inspect_checkpoint(tmp_path)
    assert not report.problems
    assert report.model_parallel_size == 2
    assert [(row.model_rank, row.expert) for row in report.experts] == [
        *((0, None), (1, None)),
        *((0, 0), (0, 1), (1, 0), (1, 1)),
    ]
    shard = tmp_path / TAG / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
    shard.unlink()
    (problem,) = inspect_checkpoint(tmp_path).problems
    assert (problem.kind, problem.file) == ("missing", shard.name)
    assert problem.text.endswith("the optimizer state of rank 1 of model-parallel rank 1.")


def set_lr(path: Path, lr: float) -> None:
    def change(content: Any) -> None:
        for group in content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group["lr"] = lr

    save_again(path, change)


def test_the_rank_that_differs_from_most_is_named(tmp_path: Path) -> None:
    made_layout(tmp_path, 4, 1, {0: [[3]], 1: [[3]]})
    path = shard_path(tmp_path / TAG, 0)
    set_lr(path, 0.3)
    (problem,) = inspect_checkpoint(tmp_path).problems
    assert (problem.kind, problem.file) == ("content", path.name)
    groups = "groups 'dense', 'ep_size_1_layers.0.moe', 'ep_size_1_layers.1.moe'"
    assert problem.text == f"rank 0: lr of {groups} is 0.3, for most ranks it is 0.1."


def test_other_wrappers_are_refused(tmp_path: Path) -> None:
    layout = made_layout(tmp_path, 2, 1, {0: [[3]]})
    add_manifest(tmp_path, layout, "FP16_Optimizer")
    with pytest.raises(CheckpointError, match="saved by FP16_Optimizer; checkpoints of ZeRO-1"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(InvalidArgumentError, match="workers=0"):
        inspect_checkpoint(tmp_path, workers=0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    layout = made_layout(directory, 2, 2, {0: [[3, 5], [3, 5]]})
    save_again(directory / TAG / MODEL, lambda content: content.update(num_experts=[1]))
    add_manifest(directory, layout)
    return directory


# ---- damage ---------------------------------------------------------------------------


class Damage(NamedTuple):
    """Something done to a checkpoint's folder, and what must be reported, and nothing else."""

    do: Callable[[Path], Any]
    kind: str
    file: str
    said: str
    quick: bool = True  # is it seen without reading tensors?


SHARD = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
EXPERT = "layer_0_expert_0_mp_rank_00_model_states.pt"
EXTRA = SHARD.replace("rank_1", "rank_9")


def flip_in(state: str, group: int) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        flip_bit(folder / SHARD, place_of(folder / SHARD, group, state) + 5)

    return do


def flip_record(file: str, name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (record,) = (record for record in records_of(folder / file) if record.name == name)
        flip_bit(folder / file, (record.start + record.stop) // 2)

    return do


def put(value: float, state: str, group: int) -> Callable[[Path], None]:
    return lambda folder: overwrite(folder / SHARD, group, state, int(state != "step"), value)


def in_shard(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        save_again(folder / SHARD, lambda content: change(content["optimizer_state_dict"]))  # type: ignore[arg-type]

    return do


def nan_weights(folder: Path) -> None:
    save_again(folder / MODEL, lambda c: c["module"]["dense"][3:5].fill_(math.inf))  # type: ignore[index]


STATE = "base_optimizer_state"
DAMAGES = {
    "flip": Damage(flip_in("exp_avg", 1), "checksum", SHARD, "exp_avg of group 1 .*CRC-32", False),
    "flip model": Damage(flip_record(EXPERT, "data/0"), "checksum", EXPERT, "data/0", False),
    "flip pickle": Damage(flip_record(SHARD, "data.pkl"), "checksum", SHARD, "data.pkl"),
    "flip model's pickle": Damage(flip_record(MODEL, "data.pkl"), "checksum", MODEL, "data.pkl"),
    "cut": Damage(lambda f: cut(f / SHARD), "unreadable", SHARD, "cut off"),
    "cut model": Damage(lambda f: cut(f / MODEL), "unreadable", MODEL, "cut off"),
    "cut expert": Damage(lambda f: cut(f / EXPERT), "unreadable", EXPERT, "cut off"),
    "lost": Damage(lambda f: (f / SHARD).unlink(), "missing", SHARD, "state of rank 1"),
    "lost model": Damage(lambda f: (f / MODEL).unlink(), "missing", MODEL, ""),
    "lost expert": Damage(
        lambda f: save_again(f / MODEL, lambda content: content.update(num_experts=[2])),
        *("missing", EXPERT.replace("expert_0", "expert_1"), "the weights of an expert"),
    ),
    "extra": Damage(lambda f: shutil.copy(f / SHARD, f / EXTRA), "extra", EXTRA, "left over"),
    "nan": Damage(
        *(put(math.nan, "exp_avg", 1), "not finite", SHARD),
        *(r"exp_avg of layers.*\(expert 2\): 1 of 3 values", False),
    ),
    "weights": Damage(nan_weights, "not finite", MODEL, "2 values of dense", False),
    "step": Damage(put(9.0, "step", 1), "step", SHARD, "rank 1: .*is 9, elsewhere it is 7"),
    "engine's step": Damage(
        lambda f: save_again(f / MODEL, lambda content: content.update(global_steps=8)),
        *("step", MODEL, "was saved at step 8, the manifest says 7"),
    ),
    "lr": Damage(
        in_shard(lambda c: c[STATE]["param_groups"][0].update(lr=0.5)),
        *("content", SHARD, "rank 1: lr of group 'dense' is 0.5, for rank 0 it is 0.1"),
    ),
    "params": Damage(
        in_shard(lambda c: c["param_slice_mappings"][1].popitem()),
        *("content", SHARD, "not what the manifest says: group 1 .* holds 3 parameters"),
    ),
    "world": Damage(
        in_shard(lambda c: c.update(partition_count=[2 * n for n in c["partition_count"]])),
        *("content", SHARD, "left over from another save"),
    ),
    "states": Damage(
        in_shard(lambda c: c[STATE]["state"][0].pop("exp_avg_sq")),
        *("content", SHARD, "rank 1: the optimizer state of group 'dense' is exp_avg, step, for"),
    ),
    "latest": Damage(
        lambda f: (f.parent / "latest").write_text("step99"), "latest", "latest", "'step99'"
    ),
}
WITH_MANIFEST = ("params", "engine's step")


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_nothing_else(
    sound: Path, name: str, manifest: bool, tmp_path: Path
) -> None:
    damage = DAMAGES[name]
    if not manifest and name in WITH_MANIFEST:
        pytest.skip("only a manifest tells")
    directory = tmp_path / "damaged"
    shutil.copytree(sound, directory)
    if not manifest or name == "lost expert":
        (directory / TAG / FILE_NAME).unlink()
    damage.do(directory / TAG)
    if manifest and damage.kind in ("content", "not finite", "step"):  # as that save has listed it
        add_manifest(directory, layout_of(2, 2, {0: [[3, 5], [3, 5]]}))
    kind, said = damage.kind, damage.said
    if manifest and kind == "unreadable":  # sizes are compared first
        kind, said = "size", r"has \S+ bytes; when it was saved"
    for data in (True, False):
        problems = inspect_checkpoint(directory, TAG, data=data).problems
        if not data and not damage.quick:
            assert not problems
            continue
        assert [(problem.kind, problem.file) for problem in problems] == [(kind, damage.file)]
        assert re.search(said, problems[0].text), problems[0].text
        assert str(directory) not in problems[0].text


def test_a_damaged_manifest_is_done_without(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(sound, directory)
    whole = inspect_checkpoint(directory)
    manifest = directory / TAG / FILE_NAME
    for content in (manifest.read_text()[:-40], "[" * 200_000):
        manifest.write_text(content)
        report = inspect_checkpoint(directory)
        assert [(p.kind, p.file) for p in report.problems] == [("manifest", FILE_NAME)]
        assert not report.manifest
        assert report.experts == whole.experts
        assert [group.name for group in report.groups] == [group.name for group in whole.groups]
    manifest.rename(directory / TAG / UNFINISHED)
    (problem,) = inspect_checkpoint(directory).problems
    assert (problem.kind, problem.file) == ("unfinished", UNFINISHED)


def test_what_is_lost_is_counted(sound: Path, tmp_path: Path) -> None:
    """With a manifest the groups are known all the same; without, they need all ranks' files."""
    directory = tmp_path / "half"
    shutil.copytree(sound, directory)
    whole = inspect_checkpoint(directory)
    (directory / TAG / SHARD).unlink()
    report = inspect_checkpoint(directory)
    assert "without the optimizer states of 1 of 2 ranks" in report.notes[0]
    assert [g.elements for g in report.groups] == [g.elements for g in whole.groups]
    (directory / TAG / FILE_NAME).unlink()
    report = inspect_checkpoint(directory)
    assert [problem.kind for problem in report.problems] == ["missing"]
    assert "without a manifest" in report.notes[0]
    assert (report.groups, report.experts, report.data_parallel_size) == ((), (), 2)


@pytest.mark.parametrize("value", [-1, 10**15, 1 << 70, True, 2.5, "2", [[]], None, {}])
def test_numbers_that_no_run_has(value: Any, tmp_path: Path) -> None:
    """What the files count is not believed blindly: nothing is raised, and nothing takes long."""
    made_layout(tmp_path, 2, 1, {0: [[3, 5]]})

    def change(content: dict[str, Any]) -> None:
        content.update(num_experts=value, dp_world_size=value, global_steps=value)
        content["checkpoint_parallel_dimensions"] = {"pp_degree": value, "tp_degree": value}

    save_again(tmp_path / TAG / MODEL, change)
    in_shard(lambda c: c.update(partition_count=value))(tmp_path / TAG)
    report = inspect_checkpoint(tmp_path)
    assert report.data_parallel_size == 2
    assert len(report.problems) < 4
    assert report.as_json()


def test_shard_of_another_grouping(tmp_path: Path) -> None:
    made_layout(tmp_path / "a", 2, 1, {0: [[3, 5]]})
    made_layout(tmp_path / "b", 2, 1, {0: [[8, 5]]})
    shutil.copy(tmp_path / "b" / TAG / SHARD, tmp_path / "a" / TAG)
    (problem,) = inspect_checkpoint(tmp_path / "a").problems
    assert problem.kind == "content"
    assert SHARD in problem.text


def test_what_is_no_checkpoint(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "other"
    shutil.copytree(sound, directory)
    (directory / TAG / FILE_NAME).unlink()
    for path in (directory / TAG).glob("*optim_states.pt"):  # as ZeRO-3 would have it
        save_again(path, lambda c: c.update(optimizer_state_dict={"fp32_flat_groups": []}))
    with pytest.raises(CheckpointError, match="no optimizer state of ZeRO-1, ZeRO-2 or BF16"):
        inspect_checkpoint(directory)
    for path in (directory / TAG).glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="has no optimizer states"):
        inspect_checkpoint(directory)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        inspect_checkpoint(tmp_path)


def test_tags(sound: Path, tmp_path: Path) -> None:
    directory = tmp_path / "tags"
    shutil.copytree(sound, directory)
    shutil.copytree(directory / TAG, directory / "older")
    for found in (inspect_checkpoint(directory, "older"), inspect_checkpoint(directory / "older")):
        assert (found.tag, found.problems) == ("older", ())
        assert found.notes == (f"latest names {TAG!r}, which is loaded if no tag is given",)
    (directory / "latest").unlink()
    assert "no file 'latest'" in inspect_checkpoint(directory, TAG).notes[0]
    with pytest.raises(CheckpointError, match="latest"):
        inspect_checkpoint(directory)


@pytest.mark.parametrize("manifest", [True, False])
def test_any_damage_gives_a_report(sound: Path, manifest: bool, tmp_path: Path) -> None:
    """Random bits and ends of every file; what holds something is blamed, and nothing else."""
    directory = tmp_path / "damaged"
    shutil.copytree(sound, directory)
    if not manifest:
        (directory / TAG / FILE_NAME).unlink()
    files = sorted(path for path in (directory / TAG).iterdir())
    records = {path: records_of(path) for path in files if path.suffix == ".pt"}
    chance = random.Random(5)
    for _ in range(100):
        path = chance.choice(files)
        whole = path.read_bytes()
        offset = chance.randrange(len(whole))
        if chance.random() < 0.2:
            os.truncate(path, offset)
            inside = offset < len(whole) - 1  # a manifest does without its last line's end
        else:
            flip_bit(path, offset, chance.randrange(8))
            own = records.get(path, [])
            inside = any(r.start <= offset < r.stop for r in own)
            inside |= path.name == FILE_NAME
        report = inspect_checkpoint(directory, TAG)
        blamed = {problem.file for problem in report.problems}
        assert blamed == {path.name} or (not blamed and not inside), (path.name, offset)
        path.write_bytes(whole)
    assert not inspect_checkpoint(directory, TAG).problems


MEMORY = """
import re, sys, threading, time
from pathlib import Path
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
def held():  # without the pages of files, which the system drops when it needs room
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
assert not inspect_checkpoint(sys.argv[1], workers=2).problems
before, peak, done = held(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, held())
thread = threading.Thread(target=watch)
thread.start()
assert not inspect_checkpoint(sys.argv[2], workers=2).problems
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_shards(sound: Path, tmp_path: Path) -> None:
    numel = 12 << 20  # three states of 48 MiB, on two ranks
    rows = lay_out([FlatParam("w", numel, 0)])
    group = FlatGroup("dense", (0, 1), rows)
    layout = merge_ranks([(Rank(0, rank), [group]) for rank in (0, 1)])
    zeros = dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), torch.zeros(numel))
    make_checkpoint(tmp_path, layout, {key_of(group, "w"): zeros})
    command = [sys.executable, "-c", MEMORY, str(sound), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 40  # MiB; two buffers of 4 MiB and as float64


def test_progress_ends_at_all_bytes(sound: Path) -> None:
    calls: list[tuple[int, int]] = []
    inspect_checkpoint(sound, progress=lambda done, total: calls.append((done, total)))
    done = [now for now, _ in calls]
    assert done == sorted(done)
    (total,) = {total for _, total in calls}
    files = [path for path in (sound / TAG).iterdir() if path.suffix == ".pt"]
    assert total == sum(path.stat().st_size for path in files)
    assert done[-1] == total


def test_results_come_in_order_and_few_are_kept() -> None:
    started: list[int] = []
    taken = 0

    def work(number: int) -> int:
        started.append(number)
        return number

    with ThreadPoolExecutor(4) as pool:
        for result in in_order(pool, ((work, number) for number in range(50)), 6):
            assert result == taken
            taken += 1
            assert len(started) <= taken + 6
    assert taken == 50


# ---- what is shown --------------------------------------------------------------------


def large_report(layers: int, local: int, ep_size: int, problems: int = 0) -> CheckpointReport:
    groups, experts = [], []
    options = {"lr": 3e-4, "weight_decay": 0.1}
    dense = SavedGroup(
        *("dense", None, None, (), None, 0, tuple(range(64)), 40, 10**9), options, 12 * 10**9, 5.0
    )
    names = ("fp32", "exp_avg", "exp_avg_sq")
    for layer in range(layers):
        label = f"model.layers.{layer}.block_sparse_moe"
        for expert in range(local * ep_size):
            ep_rank, number = divmod(expert, local)
            name = f"ep_size_{ep_size}_{label}.expert.{number}"
            ranks = tuple(range(ep_rank, 64, ep_size))
            groups.append(
                SavedGroup(
                    *(name, f"ep_size_{ep_size}", label, (expert,), ep_rank, 0, ranks, 3),
                    *(176160768, options, 12 * 176160768, 5.0),
                )
            )
            norms = dict.fromkeys(names, 10.0 ** (-(expert + 1)))
            experts.append(SavedExpert(label, expert, ep_rank, 0, 3, 176160768, norms))
    first = SavedExpert(None, None, None, 0, 40, 10**9, dict.fromkeys(names, 1.5))

    return CheckpointReport(
        *("/data/run", "global_step5", "ZeRO-2", True, True, 64, 1, (ep_size,), 5.0, 5),
        *({"deepspeed": "0.19.8"}, 700, 10**12, (dense, *groups), (first, *experts)),
        problems=tuple(Problem("missing", f"f{i}", f"f{i} is missing.") for i in range(problems)),
    )


def shown(capsys: pytest.CaptureFixture[str], report: CheckpointReport, *args: Any) -> list[str]:
    print_report(report, *args)
    return capsys.readouterr().out.splitlines()


@pytest.mark.long
def test_thousands_of_groups_fit_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    report = large_report(layers=61, local=4, ep_size=8)
    lines = shown(capsys, report)
    assert len(lines) < 100
    assert max(map(len, lines)) <= 100
    text = "".join("".join(lines).split())
    assert "ep_size_8_model.layers.{0..60}.block_sparse_moe.expert.{0..3}(experts0-31)" in text
    assert "layer: model.layers.*.block_sparse_moe" in lines
    (row,) = [line for line in lines if line.startswith("7 ")]
    assert row.split()[1:3] == ["32", "5,637,144,576"]
    assert row.split()[3:6] == ["1.00e-32", "to", "0.100"]
    assert sum(line.split(" ")[0].isdigit() for line in lines) == 61
    everything = shown(capsys, report, True)
    assert len(everything) > 2 * 61 * 32
    assert max(map(len, everything)) <= 100


def test_hidden_rows_and_problems_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, large_report(layers=90, local=2, ep_size=2, problems=31))
    assert "... and 27 more; --all or --json shows them" in lines  # 91 lines of layers, 64 shown
    start = lines.index("31 problems:")
    assert lines[start + 1] == "  f0 is missing."
    assert lines[start + 20 :] == ["  f19 is missing.", "  ... and 11 more"]
    everything = shown(capsys, large_report(layers=90, local=2, ep_size=2, problems=31), True)
    assert everything[-1] == "  f30 is missing."


@pytest.mark.parametrize(
    ("labels", "ends"),
    [
        (["model.layers.1.ffn.moe", "model.layers.20.ffn.moe"], ("model.layers.", ".ffn.moe")),
        (["encoder.layers.11.moe", "decoder.layers.11.moe"], ("", ".layers.11.moe")),
        (["some.long.path.to.a", "some.long.path.to.a.a"], ("some.long.path.to.", "")),
        (["some.long.path.to.a.moe"], ("", "")),
        (["layers.0", "layers.1"], ("", "")),
    ],
)
def test_long_labels_are_cut_where_they_agree(labels: list[str], ends: tuple[str, str]) -> None:
    assert common_ends(labels) == ends


def test_folds_keep_sums_and_tell_options_apart() -> None:
    groups = large_report(layers=5, local=2, ep_size=4).groups
    odd = dataclasses.replace(groups[3], options={"lr": 1e-5})
    folds = fold([*groups[:3], odd, *groups[4:]])
    assert [len(rows) for rows in folds] == [1, 5 * 8 - 1, 1]
    assert sum(row.elements for rows in folds for row in rows) == sum(g.elements for g in groups)


def test_json_is_strict(tmp_path: Path) -> None:
    report = large_report(layers=1, local=1, ep_size=2)
    broken = dataclasses.replace(report.experts[1], norms={"fp32": math.nan, "exp_avg": 1.0})
    report = dataclasses.replace(report, experts=(broken,))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(report.as_json(), parse_constant=refuse)
    assert found["experts"][0]["norms"] == {"fp32": None, "exp_avg": 1.0}
    assert set(found) == {field.name for field in dataclasses.fields(report)}


def test_text_of_a_report_is_short() -> None:
    lines = str(large_report(layers=61, local=4, ep_size=8, problems=3)).splitlines()
    assert lines[0].startswith(
        "/data/run (global_step5): ZeRO-2, step 5, DP 64, EP 8, 1,953 groups"
    )
    assert lines[1:] == ["3 problems:", *(f"  f{i} is missing." for i in range(3))]


# ---- command line ---------------------------------------------------------------------

BAD = [
    (["inspect-checkpoint"], "DIR"),
    (["inspect-checkpoint", "/no/such"], "/no/such is no directory"),
    (["inspect-checkpoint", "SOUND", "--tag", "other"], "no checkpoint 'other'"),
    (["regroup-checkpoint", "SOUND", "new"], "--to"),
    (["regroup-checkpoint", "SOUND", "--to", "module"], "DST"),
    (["regroup-checkpoint", "SOUND", "new", "--to", "module", "--workers", "0"], "at least 1"),
    (["regroup-checkpoint", "SOUND", "new", "--to", "module", "--max-group-size", "x"], "number"),
    (["regroup-checkpoint", "/no/such", "new", "--to", "module"], "/no/such is no directory"),
]


@pytest.mark.parametrize(("args", "said"), BAD)
def test_bad_input_is_one_line(
    args: list[str], said: str, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = cli.main([arg.replace("SOUND", str(sound)) for arg in args])
    except SystemExit as stop:
        status = int(stop.code or 0)
    shown = capsys.readouterr()
    assert (status, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert shown.err.startswith(f"moe-groups {args[0]}: error: ")
    assert said in shown.err


def test_errors_of_the_system_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect-checkpoint", "x" * 5000]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert "must be a path that the system allows" in shown.err


def test_tables_need_rich_and_json_does_not(
    sound: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert cli.main(["inspect-checkpoint", str(sound)]) == 2
    assert "pip install 'moe-groups[cli]'" in capsys.readouterr().err
    assert cli.main(["inspect-checkpoint", str(sound), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


@pytest.fixture
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_groups.cli.progress._SECONDS_BETWEEN_LINES", 0.0)


@pytest.mark.usefixtures("_no_wait")
def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("reading") as progress:
        for quarter in range(1, 5):
            progress(quarter << 30, 1 << 32)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "reading:  25%" in shown.err
    assert "1.00G/4.00G" in shown.err


def test_progress_is_silent_for_short_work(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("reading") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")
