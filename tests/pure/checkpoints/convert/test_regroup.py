"""Conversion of checkpoints: random models, random pairs of groupings."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import LRRangeTest, WarmupLR
from hypothesis import given, settings, strategies as st

from moe_groups import MoE, cli
from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.checkpoints.files import find_checkpoint
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.checkpoints.manifest import Manifest, read_manifest, write_manifest
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.errors import CheckpointError, InvalidArgumentError
from tests.support.checkpoints.checkpoint_damage import save_again
from tests.support.checkpoints.made_checkpoints import (
    make_checkpoint,
    random_state,
    same,
    shard_contents,
    state_of,
)
from tests.support.checkpoints.made_layouts import layout_of
from tests.support.models import TinyMoE
from tests.support.pairwise import Row, label, pairwise
from tests.support.training import make_groups


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def grouped(
    dense: list[list[tuple[str, int]]],
    experts: list[list[tuple[str, int]]],
    world: int,
    ep_size: int,
    experts_first: bool = False,
    names: str = "",
) -> Layout:
    """The layout of groups of ``(name, elements)``; every rank's experts have the same names."""
    columns = []
    for rank in range(world):
        own = [_group(f"{names}dense.{i}", tuple(range(world)), g) for i, g in enumerate(dense)]
        shared = tuple(range(rank % ep_size, world, ep_size))
        moe = [
            _group(f"ep_size_{ep_size}_{names}{i}", shared, g, f"ep_size_{ep_size}", rank % ep_size)
            for i, g in enumerate(experts)
        ]
        columns.append((Rank(0, rank), moe + own if experts_first else own + moe))
    return merge_ranks(columns)


def _group(
    name: str,
    ranks: tuple[int, ...],
    params: list[tuple[str, int]],
    parallel_group: str | None = None,
    ep_rank: int | None = None,
) -> FlatGroup:
    rows = lay_out([FlatParam(name, numel, 0) for name, numel in params])
    return FlatGroup(name, ranks, rows, 0, parallel_group, ep_rank)


@st.composite
def partitions(draw: Any, params: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """The parameters in a random order, cut into random groups."""
    order = draw(st.permutations(params))
    cuts = draw(st.lists(st.integers(1, len(order)), max_size=len(order)))
    edges = sorted({0, len(order), *cuts})
    return [order[a:b] for a, b in itertools.pairwise(edges)]


@st.composite
def pairs(draw: Any) -> tuple[Layout, Layout]:
    """Two groupings of one random model, on as many or on other ranks."""
    sizes = st.integers(1, 40)
    dense = [(f"d.{i}", draw(sizes)) for i in range(draw(st.integers(1, 6)))]
    experts = [(f"e.{i}", draw(sizes)) for i in range(draw(st.integers(1, 6)))]
    ep_size = draw(st.sampled_from([1, 2]))
    worlds = [ep_size * draw(st.integers(1, 3)) for _ in range(2)]
    if draw(st.booleans()):
        worlds[1] = worlds[0]
    made = [
        grouped(
            draw(partitions(dense)),
            draw(partitions(experts)),
            world,
            ep_size,
            draw(st.booleans()),
            draw(st.sampled_from(["", "n."])),
        )
        for world in worlds
    ]
    return made[0], made[1]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pairs(), st.sampled_from(["zero", "bf16"]), st.booleans())
def test_every_parameter_keeps_its_state_bit_for_bit(
    pair: tuple[Layout, Layout], kind: str, manifest: bool
) -> None:
    first, second = pair
    values = random_state(first)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_checkpoint(place / "a", first, values, kind)
        if manifest:
            write_manifest(Manifest(first, kind), place / "a/global_step7/moe_groups.json")
        regroup_checkpoint(place / "a", place / "b", second)
        assert same(state_of(place / "b", second), values)
        regroup_checkpoint(place / "b", place / "c", first)
        assert same(shard_contents(place / "c"), shard_contents(place / "a"))
        models = [
            torch.load(place / d / "global_step7/mp_rank_00_model_states.pt") for d in ("a", "c")
        ]
        assert same(*models)


SPLITS: dict[str, tuple[str, int | None]] = {
    "stock": ("stock", None),
    "module": ("module", None),
    "expert": ("expert", None),
    "capped": ("parallel_group", 500),
    "stock_capped": ("stock", 700),
}
CONVERSIONS = pairwise(
    {
        "old": list(SPLITS),
        "new": list(SPLITS),
        "ep_size": [1, 2],
        "world": [2, 4],
        "kind": ["zero", "bf16"],
    },
    lambda old, new, **_: old != new,
)


def layout_of_run(split: str, ep_size: int, world: int) -> Layout:
    """As a run with this split saves it, its groups made by the function that users call."""
    model = TinyMoE(MoE, ep_size=ep_size)
    names: dict[int, tuple[str, int | None]] = {
        id(param): (name, getattr(param, "expert_number", None))
        for name, param in model.named_parameters()
    }
    return layout_of(make_groups(model, *SPLITS[split]), names, world)


@pytest.mark.parametrize("row", CONVERSIONS, ids=label)
def test_every_grouping_becomes_every_other(row: Row, place: Path) -> None:
    first, second = (layout_of_run(row[it], row["ep_size"], row["world"]) for it in ("old", "new"))
    values = random_state(first)
    for name, layout in (("a", first), ("second", second)):
        make_checkpoint(place / name, layout, values, row["kind"])
        write_manifest(Manifest(layout, row["kind"]), place / name / "global_step7/moe_groups.json")
    regroup_checkpoint(place / "a", place / "b", place / "second")
    assert same(state_of(place / "b", second), values)
    assert same(shard_contents(place / "b"), shard_contents(place / "second"))
    regroup_checkpoint(place / "b", place / "c", place / "a")
    assert same(shard_contents(place / "c"), shard_contents(place / "a"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pairs(), st.sampled_from(["zero", "bf16"]))
def test_deepspeeds_own_files_tell_the_layout(pair: tuple[Layout, Layout], kind: str) -> None:
    layout, _ = pair
    with tempfile.TemporaryDirectory() as scratch:
        make_checkpoint(Path(scratch) / "a", layout, random_state(layout), kind)
        found = read_layout(find_checkpoint(Path(scratch) / "a"))
    assert found.fingerprint() == layout.fingerprint()
    for rank in layout.order:
        for one, other in zip(found.of(rank), layout.of(rank), strict=True):
            assert (one.name, one.ep_rank, one.parallel_group) == (
                other.name,
                other.ep_rank,
                other.parallel_group,
            )


DENSE = [("d.0", 30), ("d.1", 7)]
EXPERTS = [("e.0", 12), ("e.1", 12), ("e.2", 5)]
ONE = grouped([DENSE], [EXPERTS], 4, 2)
MANY = grouped([DENSE[:1], DENSE[1:]], [[row] for row in EXPERTS], 4, 2)


@pytest.fixture
def source(place: Path) -> Path:
    make_checkpoint(place / "a", ONE, random_state(ONE))
    return place / "a"


def everything(directory: Path) -> dict[str, bytes]:
    """All files under a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_the_result_is_a_whole_checkpoint(source: Path, place: Path) -> None:
    before = everything(source)
    (source / "trainer_state.json").write_text("{}")
    (source / "moe_groups_12345678.json").write_text("a target that a refused load wrote")
    result = regroup_checkpoint(source, place / "b", MANY)
    files = everything(place / "b")
    assert result.files == len(files)
    assert result.bytes == sum(map(len, files.values()))
    assert files["latest"] == b"global_step7"
    assert files["trainer_state.json"] == b"{}"
    expert = "global_step7/layer_0_expert_0_mp_rank_00_model_states.pt"
    assert files[expert] == before[expert]
    assert files.keys() - before.keys() == {"global_step7/moe_groups.json", "trainer_state.json"}
    manifest = read_manifest(place / "b/global_step7/moe_groups.json")
    assert manifest.layout == MANY
    sizes = {f"global_step7/{name}": saved.size for name, saved in manifest.files.items()}
    assert sizes == {n: len(c) for n, c in files.items() if "/" in n and "moe_groups" not in n}
    assert before.items() <= everything(source).items()
    assert not (place / "b.incomplete").exists()


def test_groups_keep_their_hyperparameters_and_get_new_names(source: Path, place: Path) -> None:
    shutil.rmtree(source)
    options: dict[str, dict[str, Any]] = {
        "dense.0": {"weight_decay": 0.3, "betas": (0.9, 0.95)},
        "ep_size_2_0": {"lr": 0.7},
    }
    make_checkpoint(source, ONE, random_state(ONE), options=options)
    regroup_checkpoint(source, place / "b", MANY)
    for content in shard_contents(place / "b").values():
        groups = content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
        assert [group["name"] for group in groups] == [g.name for g in MANY.of(Rank(0, 0))]
        assert [group["params"] for group in groups] == [[i] for i in range(5)]
        for group in groups[:2]:
            assert (group["weight_decay"], group["betas"], group["lr"]) == (0.3, (0.9, 0.95), 0.1)
            assert "moe" not in group
        for group in groups[2:]:
            assert (group["lr"], group["moe"]) == (0.7, True)
            assert "weight_decay" not in group


def test_a_learning_rate_may_be_a_tensor(place: Path) -> None:
    lr = {"lr": torch.tensor(0.25)}
    options = {group.name: lr for group in MANY.groups}
    make_checkpoint(place / "a", MANY, random_state(MANY), options=options)
    assert read_layout(find_checkpoint(place / "a")).groups[0].options["lr"] == 0.25
    regroup_checkpoint(place / "a", place / "b", ONE)
    regroup_checkpoint(place / "b", place / "c", MANY)
    assert same(shard_contents(place / "c"), shard_contents(place / "a"))
    shutil.rmtree(place / "a")
    options |= {"dense.1": {"lr": torch.tensor(0.5)}}
    make_checkpoint(place / "a", MANY, random_state(MANY), options=options)
    shutil.rmtree(place / "b")
    refused(place / "a", place, ONE, r"dense.0.*lr .*0\.25.* and .*0\.5")


def test_lists_of_the_lr_scheduler_follow_the_groups(source: Path, place: Path) -> None:
    shutil.rmtree(source)
    scheduler = {
        "base_lrs": [0.1, 0.2],
        "_last_lr": [0.01, 0.02],
        "betas": [0.9, 0.99],  # as long as there are groups, and no list of theirs
        "last_epoch": 7,
        "_schedulers": [{"base_lrs": [1.0, 2.0]}],
    }
    make_checkpoint(source, ONE, random_state(ONE), scheduler=scheduler)
    regroup_checkpoint(source, place / "b", MANY)
    content = torch.load(place / "b/global_step7/mp_rank_00_model_states.pt")
    assert content["lr_scheduler"] == {
        "base_lrs": [0.1, 0.1, 0.2, 0.2, 0.2],
        "_last_lr": [0.01, 0.01, 0.02, 0.02, 0.02],
        "betas": [0.9, 0.99],
        "last_epoch": 7,
        "_schedulers": [{"base_lrs": [1.0, 1.0, 2.0, 2.0, 2.0]}],
    }
    names = [list(shapes) for shapes in content["param_shapes"]]
    assert names == [["d.0"], ["d.1"], ["e.0"], ["e.1"], ["e.2"]]
    assert content["client"] == {"epoch": 3}


def keep_in_client_state(source: Path, state: Any) -> None:
    (path,) = source.glob("*/mp_rank_00_model_states.pt")
    torch.save(torch.load(path) | state, path)


SCHEDULERS = torch.optim.lr_scheduler
MANY_LISTS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda own: SCHEDULERS.LambdaLR(own, [lambda t: 1.0, lambda t: 0.5]),
    "cyclic": lambda own: SCHEDULERS.CyclicLR(own, [0.1, 0.2], [0.3, 0.4]),
    "plateau": lambda own: SCHEDULERS.ReduceLROnPlateau(own, min_lr=[0.1, 0.2]),
    "milestones": lambda own: SCHEDULERS.MultiStepLR(own, [3, 5]),
    "chained": lambda own: SCHEDULERS.SequentialLR(
        own, [SCHEDULERS.ConstantLR(own) for _ in range(3)], milestones=[2, 4]
    ),
    "one cycle": lambda own: SCHEDULERS.OneCycleLR(own, [0.1, 0.2], total_steps=9),
    "deepspeed": lambda own: WarmupLR(own, [0.0, 0.1], [0.2, 0.3]),
    "range": lambda own: LRRangeTest(own, [0.2, 0.3]),
}


@pytest.mark.parametrize("name", MANY_LISTS)
def test_schedulers_in_a_client_state_follow_the_groups(
    name: str, source: Path, place: Path
) -> None:
    """Wherever a trainer keeps them: as Lightning does, by name, in a file beside the tag."""

    def state_for(groups: list[int]) -> dict[str, Any]:
        params = [
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1 + 0.1 * group}
            for group in groups
        ]
        scheduler = MANY_LISTS[name](torch.optim.SGD(params, momentum=0.9))
        return {k: v for k, v in vars(scheduler).items() if k not in ("optimizer", "anneal_func")}

    saved = plain(state_for([0, 1]))
    state = {"lr_schedulers": [saved], "mine": {"warm": saved}, "epoch": 3}
    keep_in_client_state(source, state)
    torch.save(saved, source / "scheduler.pt")
    regroup_checkpoint(source, place / "b", MANY)
    found = torch.load(place / "b/global_step7/mp_rank_00_model_states.pt")
    wanted = spread(saved)
    assert found["lr_schedulers"] == [wanted]
    assert found["mine"] == {"warm": wanted}
    assert found["epoch"] == 3
    assert torch.load(place / "b/scheduler.pt") == wanted


def plain(value: Any) -> Any:
    """Numbers, strings and what holds them, as schedulers save them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not callable(v)}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value if not callable(v)] or [None] * len(value)
    return plain(value.state_dict()) if hasattr(value, "state_dict") else value


def spread(state: Any) -> Any:
    """A scheduler's state with the values of two groups for those of five."""
    if isinstance(state, list):
        return [spread(item) for item in state]
    if not isinstance(state, dict):
        return state
    kept = ("_milestones", "milestones", "_schedule_phases")
    return {
        key: [value[0]] * 2 + [value[1]] * 3
        if isinstance(value, list) and len(value) == 2 and key not in kept
        else spread(value)
        for key, value in state.items()
    }


def test_numbers_that_may_be_those_of_groups_are_refused(source: Path, place: Path) -> None:
    """A scheduler of somebody's own has a list with as many entries as there are groups."""
    keep_in_client_state(source, {"my_sched": {"floors": [0.1, 0.2]}, "history": [1.0, 2.0]})
    refused(source, place, MANY, r"my_sched\.floors in the checkpoint has 2 numbers")
    keep_in_client_state(source, {"my_sched": {"floors": [0.1, 0.2, 0.3]}})
    regroup_checkpoint(source, place / "c", MANY)
    found = torch.load(place / "c/global_step7/mp_rank_00_model_states.pt")
    assert (found["my_sched"], found["history"]) == ({"floors": [0.1, 0.2, 0.3]}, [1.0, 2.0])


def refused(source: Path, place: Path, to: Any, words: str) -> None:
    """The call raises, says so, changes nothing and leaves no destination."""
    before = everything(source)
    with pytest.raises(CheckpointError, match=words):
        regroup_checkpoint(source, place / "b", to)
    assert everything(source) == before
    assert not (place / "b").exists()


def test_groups_with_other_hyperparameters_do_not_become_one(place: Path) -> None:
    options = {"dense.1": {"weight_decay": 0.3}}
    make_checkpoint(place / "a", MANY, random_state(MANY), options=options)
    refused(place / "a", place, ONE, "dense.0.*weight_decay None and 0.3")


def test_groups_with_other_counters_do_not_become_one(place: Path) -> None:
    make_checkpoint(place / "a", MANY, random_state(MANY))
    for path in (place / "a").glob("*/*optim*"):
        content = torch.load(path, weights_only=False)
        state = content["optimizer_state_dict"]["base_optimizer_state"]["state"]
        state[3]["step"] += 1
        torch.save(content, path)
    refused(place / "a", place, ONE, "'step'.* 7.* and .*8")


def change_states(source: Path, change: Callable[[dict[str, Any]], None], rank: str = "*") -> None:
    for path in source.glob(f"*/*pp_rank_{rank}_*optim*"):
        save_again(path, lambda content: change(content["optimizer_state_dict"]))  # type: ignore[arg-type]


def test_groups_with_states_of_other_dtypes_do_not_become_one(place: Path) -> None:
    make_checkpoint(place / "a", MANY, random_state(MANY))

    def change(optimizer: dict[str, Any]) -> None:
        state = optimizer["base_optimizer_state"]["state"][3]
        state["exp_avg"] = state["exp_avg"].bfloat16()

    change_states(place / "a", change)
    refused(place / "a", place, ONE, r"exp_avg in torch.float32 and torch.bfloat16")


def test_a_state_that_is_too_short_is_refused(source: Path, place: Path) -> None:
    def change(optimizer: dict[str, Any]) -> None:
        state = optimizer["base_optimizer_state"]["state"][0]
        state["exp_avg"] = state["exp_avg"][:3].clone()

    change_states(source, change, rank="2")
    refused(source, place, MANY, r"pp_rank_2_.*: exp_avg of group 0 has 3 elements, its param")


def test_a_state_that_is_not_there_is_refused(source: Path, place: Path) -> None:
    change_states(source, lambda o: o["base_optimizer_state"]["state"][0].pop("exp_avg"), rank="2")
    refused(source, place, MANY, r"pp_rank_2_.* cannot be read \(KeyError: 'exp_avg'\)")


@pytest.mark.parametrize("kind", ["zero", "bf16"])
def test_what_was_converted_can_be_inspected(kind: str, place: Path) -> None:
    make_checkpoint(place / "a", ONE, random_state(ONE), kind)
    regroup_checkpoint(place / "a", place / "b", MANY)
    report = inspect_checkpoint(place / "b")
    assert report.problems == ()
    assert report.wrapper == ("ZeRO-2" if kind == "zero" else "BF16_Optimizer")


def test_other_parameters_are_refused(source: Path, place: Path) -> None:
    other = grouped([[*DENSE, ("d.2", 3)]], [EXPERTS[:2]], 4, 2)
    refused(source, place, other, r"d\.2 .* was not trained .* no weight of 3 elements for it")
    foreign = grouped([[("a", 3)]], [[("b", 3)]], 4, 2)
    refused(
        source, place, foreign, "not of one model .*d.0 is in the checkpoint alone.*load_module"
    )
    longer = grouped([[("d.0", 31), ("d.1", 7)]], [EXPERTS], 4, 2)
    refused(source, place, longer, r"d\.0.* has 31 elements, in the checkpoint it has 30")
    sharded = grouped([DENSE], [EXPERTS], 4, 4)
    refused(
        source,
        place,
        sharded,
        "with experts of ep_size_2, the run has .* of ep_size_4.*load_module",
    )


def _forget_steps(content: dict[str, Any]) -> None:
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        del state["step"]


def test_what_only_one_run_trains_is_dropped_or_starts_afresh(
    source: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thawed parameter has a group of its own, and the schedule of one like it."""
    part = grouped([DENSE[:1]], [EXPERTS[:2]], 4, 2)
    write_manifest(Manifest(part, "zero"), place / "part.json")
    paths = [str(place / name) for name in ("a", "told", "part.json")]
    assert cli.main(["regroup-checkpoint", *paths[:2], "--to", paths[2]]) == 0
    said = "dropped the optimizer state of what no group has now: d.1, e.2\n"
    assert capsys.readouterr().out.endswith(said)
    done = regroup_checkpoint(source, place / "part", part)
    assert done.since == (("d.1", "e.2"), ())
    wanted = state_of(source, ONE)
    kept = state_of(place / "part", part)
    assert len(kept) == 5
    assert same(kept, {key: wanted[key] for key in kept})
    weight = torch.arange(7.0).bfloat16()
    schedule = {"base_lrs": [0.3, 0.4], "last_epoch": 7}
    save_again(
        place / "part/global_step7/mp_rank_00_model_states.pt",
        lambda found: found.update(module={"d.1": weight}, lr_scheduler=schedule),
    )
    (place / "part/global_step7/moe_groups.json").unlink()
    refused(
        place / "part", place, grouped([DENSE], [EXPERTS[:2]], 4, 2), r"overrides=\[\('d.1', {}"
    )
    shutil.copytree(place / "part", place / "momentum")
    for path in (place / "momentum").glob("*/*optim_states.pt"):  # of SGD, which counts no steps
        save_again(path, _forget_steps)
    one = grouped([DENSE], [EXPERTS[:2]], 4, 2)
    regroup_checkpoint(place / "momentum", place / "one", one)
    found = state_of(place / "one", one)
    zeros = torch.zeros(7)
    fresh = {"fp32": weight.float(), "exp_avg": zeros, "exp_avg_sq": zeros}
    assert same(found.pop((0, None, None, "d.1")), fresh)
    assert same(found, kept)
    apart = grouped([DENSE[:1], DENSE[1:]], [EXPERTS[:2]], 4, 2)
    groups = [replace(group, options={"moe": bool(group.parallel_group)}) for group in apart.groups]
    apart = replace(apart, groups=tuple(groups))
    other = [replace(group, options={"lr": index}) for index, group in enumerate(apart.groups)]
    words = (
        r"'dense.1' were not trained, and the .* schedule \(lr_scheduler.base_lrs\) has no value"
    )
    refused(place / "part", place, replace(apart, groups=tuple(other)), words)
    done = regroup_checkpoint(place / "part", place / "apart", apart)
    assert done.since == ((), ("d.1",))
    assert "started afresh, from saved weights, what was not trained before: d.1" in str(done.since)
    found = state_of(place / "apart", apart)
    assert same(found.pop((0, None, None, "d.1")), {"fp32": weight.float()})
    assert same(found, kept)
    content = torch.load(place / "apart/global_step7/mp_rank_00_model_states.pt")
    assert content["lr_scheduler"]["base_lrs"] == [0.3, 0.3, 0.4]
    assert [*content["param_shapes"][1].values()] == [torch.Size([7])]
    assert inspect_checkpoint(place / "apart").problems == ()


def test_what_is_no_state_of_groups_is_refused(source: Path, place: Path) -> None:
    (source / "global_step7/offloaded_tensors").mkdir()
    refused(source, place, MANY, "offloaded to NVMe")
    (source / "global_step7/offloaded_tensors").rmdir()
    paths = list(source.glob("*/*optim*"))
    for path in paths:
        path.unlink()
    write_manifest(Manifest(ONE, "FP16_Optimizer"), source / "global_step7/moe_groups.json")
    refused(source, place, MANY, "no optimizer states of ZeRO-1, ZeRO-2 or BF16_Optimizer")


def test_names_and_files_that_mean_nothing_are_refused(source: Path, place: Path) -> None:
    refused(source, place, "modules", "is none of stock, parallel_group, module, expert")
    refused(source, place, source, "is none of stock")
    with pytest.raises(CheckpointError, match="no directory"):
        regroup_checkpoint(place / "nowhere", place / "b", MANY)
    with pytest.raises(CheckpointError, match="no checkpoint 'global_step9'"):
        regroup_checkpoint(source, place / "b", MANY, tag="global_step9")


def test_a_name_is_no_folder_that_is_called_so(
    source: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "expert").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(source, place, "expert", "nothing says what the groups")
    refused(source, place, "./expert", "expert is no checkpoint")


@pytest.mark.parametrize("workers", [0, -1])
def test_no_workers(source: Path, place: Path, workers: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"workers={workers} must be an integer"):
        regroup_checkpoint(source, place / "new", MANY, workers=workers)
    assert not (place / "new.incomplete").exists()


def test_a_destination_in_the_way_is_refused(source: Path, place: Path) -> None:
    for destination, words in (
        (source, "is the source"),
        (source / "global_step7", "is the source"),
        (source / "global_step7/deeper", "inside of the source"),
        (place, "exists"),
    ):
        before = everything(place)
        with pytest.raises(CheckpointError, match=words):
            regroup_checkpoint(source, destination, MANY)
        assert everything(place) == before


def damage(source: Path) -> Iterator[tuple[str, Path]]:
    """What can happen to the file of a shard, and what it is called."""
    path = sorted(source.glob("*/*pp_rank_2_*optim*"))[0]
    whole = path.read_bytes()
    path.unlink()
    yield "is missing", path
    for cut in (0, 10, len(whole) // 3, len(whole) - 30):
        path.write_bytes(whole[:cut])
        yield "cannot be read", path
    flipped = bytearray(whole)
    content = torch.load(path.with_name(path.name.replace("rank_2", "rank_0")), weights_only=False)
    first = content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg"]
    assert first.numel()
    start = whole.index(_bytes_in(whole))
    flipped[start + 8] ^= 0x10
    path.write_bytes(bytes(flipped))
    yield "CRC-32", path
    path.write_bytes(whole)


def _bytes_in(whole: bytes) -> bytes:
    """Some bytes of the largest tensor in a file."""
    import io

    content = torch.load(io.BytesIO(whole), weights_only=False)["optimizer_state_dict"]
    state = content["base_optimizer_state"]["state"][0]["exp_avg"]
    return bytes(state.numpy().tobytes())


def test_damaged_shards_are_refused_with_their_names(source: Path, place: Path) -> None:
    seen = 0
    for words, path in damage(source):
        before = everything(source)
        with pytest.raises(CheckpointError, match=words) as error:
            regroup_checkpoint(source, place / "b", MANY)
        assert path.name in str(error.value) or "rank 2" in str(error.value)
        assert everything(source) == before
        assert not (place / "b").exists()
        shutil.rmtree(place / "b.incomplete", ignore_errors=True)
        seen += 1
    assert seen == 6
    regroup_checkpoint(source, place / "b", MANY)


def test_work_of_another_conversion_is_not_continued(source: Path, place: Path) -> None:
    (place / "b.incomplete").mkdir()
    (place / "b.incomplete/.job.json").write_text('{"source": "elsewhere"}')
    refused(source, place, MANY, "another checkpoint or to other groups")


def test_progress_ends_at_the_total(source: Path, place: Path) -> None:
    calls: list[tuple[int, int]] = []
    regroup_checkpoint(
        source, place / "b", MANY, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({total for _, total in calls}) == 1
