"""Loads into other groups are refused, those into equal ones train on."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from torch import distributed, nn

from moe_groups import MoE, create_moe_param_groups, inspect_checkpoint, protect_checkpoints
from moe_groups.checkpoints.files import find_checkpoint
from moe_groups.checkpoints.layout import Rank
from moe_groups.checkpoints.manifest import FILE_NAME, read_manifest
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.errors import CheckpointError, CheckpointMismatchError, InvalidArgumentError
from tests.support.checkpoints.conversion_faults import tree
from tests.support.checkpoints.guard_runs import (
    EP2,
    EXPERTS,
    TAG,
    WRAPPERS,
    Mixed,
    collected,
    equal,
    error_of,
    falling,
    forget_manifest,
    on_first_rank,
    refusal_of,
    reordered,
    saved,
    snapshot,
    started,
)
from tests.support.checkpoints.made_checkpoints import same as same_state, state_of
from tests.support.hash_seeds import two_hash_seeds
from tests.support.models import TinyMoE
from tests.support.pairwise import Row, label, long_on_four_ranks, pairwise
from tests.support.ranks import run_in_fresh_processes, run_on_ranks, run_on_stock
from tests.support.training import (
    GroupsOf,
    config,
    groups_by,
    initialize,
    make_groups,
    train,
    weights,
)

# ---- a load into other groups ---------------------------------------------------------


def refused(wrapper: str, folder: Path) -> tuple[str, list[str], str]:
    """Load into other groups, and train on beside an engine that never tried."""
    saved(wrapper, groups_by("module"), folder, lr_scheduler=falling)
    engine, twin = (started(wrapper, groups_by("expert"), lr_scheduler=falling) for _ in range(2))
    train(engine, 1, 7), train(twin, 1, 7)
    before = snapshot(engine)
    assert equal(before, snapshot(twin))
    error = error_of(engine, folder)
    assert isinstance(error, CheckpointMismatchError)
    assert equal(snapshot(engine), before)
    assert train(engine, 2, 8) == train(twin, 2, 8)
    assert equal(snapshot(engine), snapshot(twin))
    assert error.target is not None
    return str(error), error.lines, error.target


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_load_into_other_groups_is_refused(wrapper: str, tmp_path: Path) -> None:
    """The same on all ranks; the engine is as if nobody had tried."""
    first, second = run_on_ranks(2, refused, wrapper, tmp_path)
    assert first == second
    message, lines, target = first
    for rank, number in ((0, 1), (1, 3)):  # experts that were behind another one
        name = f"blocks.1.{EXPERTS}.1.down.weight (expert {number})"
        (line,) = (line for line in lines if line.startswith(name))
        assert line == (
            f"{name}: saved in group 2 ('ep_size_2_blocks.1.moe') from element 1200, now in group "
            "4 ('ep_size_2_blocks.1.moe.expert.1') from element 408"
        ), rank
    assert not any(line.startswith(f"blocks.0.{EXPERTS}.0") for line in lines)
    assert "9 of 22 parameters of a rank are in another place" in lines[0]
    assert message.startswith(f"{tmp_path} ({TAG}) was saved with other groups.\n")
    assert f"--to {target}" in message
    layout = read_manifest(Path(target)).layout
    assert len(layout.of(Rank(0, 0))) == 5
    assert layout.fingerprint() != read_manifest(tmp_path / TAG / FILE_NAME).layout.fingerprint()


# ---- state of another optimizer ---------------------------------------------------------

OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "RAdam": (torch.optim.RAdam, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
}


def stepping(wrapper: str, cls: Any, split: str = "module", **options: Any) -> Any:
    model = TinyMoE(MoE, **EP2)
    optimizer = cls(make_groups(model, split), lr=1e-2, **options)
    return initialize(model, optimizer, config(wrapper))


def loads_of_others(wrapper: str, folder: Path) -> list[str]:
    """AdamW's state into others; what the refusal advises; and into Adam."""
    reference = weights(saved(wrapper, groups_by("module"), folder))
    problems = []
    for name, (cls, options) in OTHERS.items():
        engine = stepping(wrapper, cls, "expert" if name == "NAdam" else "module", **options)
        protect_checkpoints(engine, regroup="auto")
        before = snapshot(engine)
        error = error_of(engine, folder)
        if not isinstance(error, CheckpointMismatchError) or not equal(before, snapshot(engine)):
            problems.append(f"{name}: {error}")
            continue
        assert "torch.optim.adamw.AdamW (exp_avg, exp_avg_sq, step)" in str(error)
        assert f".{cls.__name__} (" in str(error)
        if name in ("RAdam", "SGD"):
            assert error_of(engine, folder, load_module_only=True) is None
            problems += [
                f"{name}: {key}"
                for key, was in reference.items()
                if not torch.allclose(was, weights(engine)[key], rtol=2**-8)
            ]
            train(engine, 1)
    forget_manifest(folder)
    error = error_of(stepping(wrapper, torch.optim.SGD, momentum=0.9), folder)
    if "an optimizer (exp_avg, exp_avg_sq, step)" not in str(error):
        problems.append(f"without a manifest: {error}")
    error = error_of(stepping(wrapper, torch.optim.RAdam), folder)
    if "the options of its groups are with amsgrad" not in str(error):
        problems.append(f"RAdam without a manifest: {error}")
    engine = stepping(wrapper, torch.optim.Adam)
    assert error_of(engine, folder) is None
    if any(group["decoupled_weight_decay"] for group in engine.optimizer.param_groups):
        problems.append("Adam became AdamW")
    problems += [key for key, was in reference.items() if not equal(was, weights(engine)[key])]
    return problems


@pytest.mark.parametrize("wrapper", ["zero2", pytest.param("bf16", marks=pytest.mark.long)])
def test_state_of_another_optimizer_is_refused(wrapper: str, tmp_path: Path) -> None:
    """Before anything is read, with "auto" too; the way out works."""
    assert run_on_ranks(2, loads_of_others, wrapper, tmp_path) == [[], []]


# ---- what converting cannot repair -------------------------------------------------------


def partly_frozen(frozen: tuple[str, ...], split: str = "module") -> GroupsOf:
    def groups_of(model: nn.Module) -> list[dict[str, Any]]:
        for name, param in model.named_parameters():
            param.requires_grad_(not name.startswith(frozen))
        return make_groups(model, split)

    return groups_of


FROZEN = ("inp", f"blocks.0.{EXPERTS}")


def thawed(*rules: tuple[str, dict[str, float]]) -> GroupsOf:
    """Everything is trained; a rule without options keeps what it matches apart."""
    return lambda model: create_moe_param_groups(model, overrides=rules)


ALL_EXPERTS = tuple(f"blocks.{block}.{EXPERTS}" for block in (0, 1))
CHANGES: dict[str, tuple[GroupsOf, GroupsOf]] = {
    "frozen": (groups_by("module"), partly_frozen(FROZEN, "expert")),
    "thawed": (partly_frozen(FROZEN), thawed(("inp.*", {}))),
    "experts frozen": (groups_by("module"), partly_frozen(ALL_EXPERTS)),
    "experts thawed": (partly_frozen(ALL_EXPERTS), groups_by("expert")),
}


def trained_since(wrapper: str, folder: Path, name: str) -> list[str]:
    """Load with "auto" after a change of what is trained; go on, save and inspect."""
    before, after = CHANGES[name]
    thaws = "thawed" in name
    reference = saved(wrapper, before, folder / "a", lr_scheduler=falling)
    was = state_of(folder / "a", read_layout(find_checkpoint(folder / "a")))
    engine = started(wrapper, after, lr_scheduler=falling)
    protect_checkpoints(engine, regroup="auto")
    with collected() as warned:
        engine.load_checkpoint(str(folder / "a"))
    problems = [] if len(warned) == (distributed.get_rank() == 0) else [f"warned: {warned}"]
    for text, _ in warned:
        wanted = "started afresh" if thaws else "dropped the optimizer state"
        problems += [] if wanted in text and f"blocks.0.{EXPERTS}.0.down.weight" in text else [text]
    (rate,) = {group["lr"] for group in engine.optimizer.param_groups}
    engine.save_checkpoint(str(folder / "b"))
    now = state_of(folder / "b", read_layout(find_checkpoint(folder / "b")))
    weight = dict(reference.module.named_parameters())
    fresh = now.keys() - was.keys()
    for key in now.keys() & was.keys():
        problems += [] if same_state(now[key], was[key]) else [f"other state: {key}"]
    for key in fresh:
        own = weight[key[3]].detach().float().flatten()
        elsewhere = key[2] not in (None, distributed.get_rank())
        if [*now[key]] != ["fp32"] or not (elsewhere or same_state(now[key]["fp32"], own)):
            problems.append(f"not fresh: {key}")
    masters = weights(engine)
    train(engine, 1, 2)
    for name, value in weights(engine).items():
        step = (value - masters[name] * (1 - rate * 0.01)).abs().max()  # of decoupled decay
        if name in {key[3] for key in fresh} and not 0 < step < 1.001 * rate:
            problems.append(f"{name} moved by {step} at a rate of {rate}")
    engine.save_checkpoint(str(folder / "b"))
    problems += map(str, inspect_checkpoint(folder / "b").problems)
    return problems if bool(fresh) == thaws else ["nothing was tested"]


WRAPPERS_LONG = ["zero2", *(pytest.param(w, marks=pytest.mark.long) for w in ("zero1", "bf16"))]


@pytest.mark.parametrize("wrapper", WRAPPERS_LONG)
@pytest.mark.parametrize("name", [*CHANGES])
def test_what_is_frozen_or_thawed_since_is_converted(
    wrapper: str, name: str, tmp_path: Path
) -> None:
    """State of the frozen is dropped; the thawed start as Adam starts, the others go on."""
    assert run_on_ranks(2, trained_since, wrapper, tmp_path, name) == [[], []]


def unconvertible(wrapper: str, folder: Path) -> list[str]:
    """With "auto" a refusal says what differs and a way out, which works."""
    problems = []
    whole, part, other = groups_by("module"), partly_frozen(FROZEN), {"ep_size": 1, "layers": 2}
    cases: list[tuple[str, GroupsOf, dict[str, Any], str]] = [
        ("shared", part, {}, "overrides=[('inp.*', {})]"),
        ("ep_size", whole, {"model_options": other}, "nothing says which expert"),
    ]
    for name, before, options, text in cases:
        source = folder / name
        reference = saved(wrapper, before, source)
        if name == "ep_size":
            forget_manifest(source)  # which numbers the experts over all ranks
        engine = started(wrapper, whole, **options)
        state, files = snapshot(engine), {*source.iterdir()}
        for regroup in ("refuse", "auto"):
            protect_checkpoints(engine, regroup=regroup)
            error = error_of(engine, source)
            assert isinstance(error, CheckpointMismatchError), error
            if text not in str(error) or "load_module_only=True" not in str(error):
                problems.append(f"{name}: {error}")
        if not equal(snapshot(engine), state) or {*source.iterdir()} != files:
            problems.append(f"{name}: something was changed")
        assert error_of(engine, source, load_module_only=True) is None
        loaded = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        problems += [
            f"{name}: {key}"
            for key, param in reference.module.named_parameters()
            if (name != "ep_size" or EXPERTS not in key) and not equal(param, loaded[key])
        ]
        problems += [
            f"{name}: master of {key}"
            for key, master in weights(engine).items()
            if not equal(master.bfloat16(), loaded[key])
        ]
        train(engine, 1)
    reference = started(wrapper, part)
    reference.save_checkpoint(str(folder / "without"), exclude_frozen_parameters=True)
    engine = started(wrapper, thawed(("inp.*", {})))
    protect_checkpoints(engine, regroup="auto")
    error = error_of(engine, folder / "without")
    assert isinstance(error, CheckpointMismatchError), error
    assert "has no weight of 256 elements for it (exclude_frozen_parameters" in str(error)
    return problems


@pytest.mark.parametrize("wrapper", WRAPPERS_LONG)
def test_way_out_where_converting_does_not_help(wrapper: str, tmp_path: Path) -> None:
    """Something thawed is among what was trained, or nothing says which expert is on which rank."""
    assert run_on_ranks(2, unconvertible, wrapper, tmp_path) == [[], []]


# ---- loads that DeepSpeed does without a word -------------------------------------------


def swapped(group: int, first: str, second: str, split: str = "module") -> GroupsOf:
    """Two parameters of one group in each other's place."""

    def groups_of(model: nn.Module) -> list[dict[str, Any]]:
        groups = make_groups(model, split)
        named = dict(model.named_parameters())
        params = groups[group]["params"]
        places = [
            next(index for index, param in enumerate(params) if param is named[name])
            for name in (first, second)
        ]
        assert named[first].shape == named[second].shape
        for place, name in zip(places, (second, first), strict=True):
            params[place] = named[name]
        return groups

    return groups_of


class Change(NamedTuple):
    before: GroupsOf
    after: GroupsOf
    named: str
    """Part of the refusal."""
    model: type[TinyMoE] = TinyMoE


def changes(name: str) -> Change:
    up = f"blocks.0.{EXPERTS}.{{}}.up.weight"
    return {
        "experts in a group": Change(
            groups_by("module"),
            swapped(1, up.format(0), up.format(1)),
            f"{up.format(1)} (expert 1): saved in group 1 ('ep_size_2_blocks.0.moe') from element "
            "792, now in group 1 ('ep_size_2_blocks.0.moe') from element 0",
        ),
        "dense parameters": Change(
            groups_by("module"),
            swapped(0, "inp.weight", "out.weight"),
            "inp.weight: saved in group 0 ('dense') from element 0, now in group 0 ('dense')",
        ),
        "layers": Change(
            groups_by("module"),
            reordered("module", 0, 2, 1),
            "group 1 ('ep_size_2_blocks.1.moe') was saved as group 2 ('ep_size_2_blocks.1.moe')",
        ),
        "stock split": Change(
            groups_by("stock"),
            reordered("stock", 0, 2, 1),
            "group 1 ('ep_size_2') was saved as group 2 ('ep_size_2')",
            Mixed,
        ),
    }[name]


def loads_of_moved(
    wrapper: str, name: str, folder: Path, layer: type[nn.Module] = MoE
) -> list[str | None]:
    """Refusals with and without the manifest, and nothing for DeepSpeed's own load."""
    change = changes(name)
    options: dict[str, Any] = {} if change.model is Mixed else EP2
    engine = saved(wrapper, change.before, folder, model=change.model(layer, **options))
    before = weights(engine)
    engine = started(wrapper, change.after, model=change.model(layer, **options))
    protect_checkpoints(engine)
    found = [refusal_of(engine, folder)]
    forget_manifest(folder)
    found.append(refusal_of(engine, folder))
    protect_checkpoints(engine, regroup="off")
    engine.load_checkpoint(str(folder))
    assert not equal(weights(engine), before), "DeepSpeed loads this right: it tests nothing"
    return found


@pytest.mark.parametrize(
    "row",
    long_on_four_ranks(
        pairwise(
            {
                "name": ["experts in a group", "dense parameters", "layers", "stock split"],
                "wrapper": ["zero1", "zero2", "zero2_fp32_grads", "bf16"],
                "world": [2, 4],
            }
        )
    ),
    ids=label,
)
def test_silent_wrong_loads_are_refused(row: Row, tmp_path: Path) -> None:
    name = row["name"]
    for refusals in run_on_ranks(row["world"], loads_of_moved, row["wrapper"], name, tmp_path):
        for text in refusals:
            assert text is not None
            assert changes(name).named in text


# ---- loads that are right ---------------------------------------------------------------


def without_labels(model: nn.Module) -> list[dict[str, Any]]:
    """Our groups under the names of DeepSpeed's own split, one of them without a name."""
    dense, *experts = make_groups(model, "module")
    return [
        {"params": dense["params"]},
        *({"params": group["params"], "moe": True, "name": "ep_size_2"} for group in experts),
    ]


def renamed(name: str) -> tuple[GroupsOf, GroupsOf]:
    return {
        "stock": (groups_by("parallel_group"), groups_by("stock")),
        "fewer names": (groups_by("module"), without_labels),
        "more names": (without_labels, groups_by("module")),
    }[name]


def goes_on(wrapper: str, name: str, folder: Path) -> list[str]:
    """Load into groups of other names; what differs from the run that went on."""
    before, after = renamed(name)
    engine = saved(wrapper, before, folder, lr_scheduler=falling)
    end = train(engine, 3, 2), weights(engine)
    engine = started(wrapper, after, lr_scheduler=falling)
    names = names_of(engine)
    path, _ = engine.load_checkpoint(str(folder))
    problems = [] if path is not None and path.startswith(str(folder)) else [f"path {path}"]
    if names_of(engine) != names:
        problems.append(f"{names_of(engine)}, not {names}")
    if not equal((train(engine, 3, 2), weights(engine)), end):
        problems.append("it trains on otherwise")
    return problems


def names_of(engine: Any) -> list[dict[str, Any]]:
    keys = ("name", "expert_group_name", "expert_number")
    return [{k: g[k] for k in keys if k in g} for g in engine.optimizer.param_groups]


@pytest.mark.parametrize("name", ["stock", "fewer names", "more names"])
@pytest.mark.parametrize("wrapper", [*WRAPPERS, "half", "fp32"])
def test_equal_but_for_names(wrapper: str, name: str, tmp_path: Path) -> None:
    """It loads, keeps the names of the run, and trains on as the saved run does."""
    assert run_on_ranks(2, goes_on, wrapper, name, tmp_path) == [[], []]


def stock_run(wrapper: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """DeepSpeed as it is."""
    engine = started(wrapper, groups_by("stock"), layer=DeepSpeedMoE)
    train(engine, 2)
    engine.save_checkpoint(str(folder))
    assert not (folder / TAG / FILE_NAME).exists()
    return train(engine, 2, 2), weights(engine)


def load_stock(wrapper: str, folder: Path) -> tuple[str | None, Any, dict[str, torch.Tensor]]:
    engine = started(wrapper, groups_by("module"))
    refusal = refusal_of(engine, folder)
    engine = started(wrapper, groups_by("parallel_group"))
    engine.load_checkpoint(str(folder))
    return refusal, train(engine, 2, 2), weights(engine)


@pytest.mark.parametrize("wrapper", ["zero1", "bf16"])
def test_checkpoint_of_a_stock_run(wrapper: str, tmp_path: Path) -> None:
    wanted = run_on_stock(2, stock_run, wrapper, tmp_path)
    found = run_on_ranks(2, load_stock, wrapper, tmp_path)
    for (history, end), (refusal, *resumed) in zip(wanted, found, strict=True):
        assert equal(resumed, [history, end])
        assert "6 of 22 parameters of a rank are in another place" in refusal
        assert "now in group 2 ('ep_size_2_blocks.1.moe') from element 0" in refusal


def stock_mixed(wrapper: str, folder: Path, save: bool) -> tuple[list[str], str | None]:
    """DeepSpeed's own split, guarded by a call; its order is the hash's."""
    engine = started(wrapper, stock_groups, model=Mixed(DeepSpeedMoE))
    protect_checkpoints(engine)
    names = [group["name"] for group in engine.optimizer.param_groups]
    if save:
        train(engine, 2)
        engine.save_checkpoint(str(folder))
        return names, None
    return names, refusal_of(engine, folder)


def stock_groups(model: nn.Module) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stock_split({"params": list(model.parameters()), "name": "dense"})
    return found


@pytest.mark.long
def test_stock_split_under_other_hash_seeds(tmp_path: Path) -> None:
    """A restarted run may have its groups in another order, and the error says so."""
    seeds = two_hash_seeds(["ep_size_1", "ep_size_2"])
    first, again, other = (
        run_in_fresh_processes(2, stock_mixed, "bf16", tmp_path, save, env={"PYTHONHASHSEED": seed})
        for seed, save in ((seeds[0], True), (seeds[0], False), (seeds[1], False))
    )
    for rank in range(2):
        assert again[rank] == first[rank]
        names, refusal = other[rank]
        assert names != first[rank][0]
        assert "group 1 ('ep_size_" in refusal
        assert "was saved as group 2 ('ep_size_" in refusal


def parts_that_need_no_groups(folder: Path, off: bool) -> list[Any]:
    """What a load into other groups does that puts no optimizer state into them."""
    engine = started("zero1", groups_by("expert"))
    if off:
        protect_checkpoints(engine, regroup="off")
    found: list[Any] = []
    for options in ({"load_module_only": True}, {"load_optimizer_states": False}):
        path, state = engine.load_checkpoint(str(folder), **options)
        found.append((path, sorted(state), snapshot(engine)))
    found.append(engine.load_checkpoint(str(folder / "missing")))
    return found


def compare_with_off(folder: Path) -> list[bool]:
    saved("zero1", groups_by("module"), folder)
    on, off = (parts_that_need_no_groups(folder, off) for off in (False, True))
    assert on[2] == (None, None)
    return [equal(*pair) for pair in zip(on, off, strict=True)]


def test_other_loads_are_deepspeeds(tmp_path: Path) -> None:
    """Weights alone, no optimizer states, missing checkpoints: as without this library."""
    assert run_on_ranks(2, compare_with_off, tmp_path) == [[True] * 3] * 2


def off_and_on(folder: Path) -> tuple[bool, bool, str | None, str | None]:
    """Manifests with and without a guard; what the same wrong load says with "off" and after."""
    engine = started("zero1", groups_by("module"))
    train(engine, 1)
    engine.save_checkpoint(str(folder), tag=TAG)
    first = (folder / TAG / FILE_NAME).exists()
    distributed.barrier()
    protect_checkpoints(engine, regroup="off")
    engine.save_checkpoint(str(folder), tag=TAG)
    distributed.barrier()
    second = (folder / TAG / FILE_NAME).exists()
    engine = started("zero1", reordered("module", 0, 2, 1))
    protect_checkpoints(engine, regroup="off")
    off = refusal_of(engine, folder)
    protect_checkpoints(engine, regroup="refuse")
    return first, second, off, refusal_of(engine, folder)


def test_off(tmp_path: Path) -> None:
    """All is left to DeepSpeed; a manifest of groups that are no more goes."""
    for first, second, off, refusal in run_on_ranks(2, off_and_on, tmp_path):
        assert (first, second, off) == (True, False, None)
        assert refusal is not None


# ---- tags ------------------------------------------------------------------------------------


def tags_that_lead_elsewhere(folder: Path) -> tuple[list[str], Any]:
    """Saves and loads of them; all of the folder before and after."""
    engine = saved("zero1", groups_by("module"), folder / "ck", lr_scheduler=falling)
    engine.save_checkpoint(str(folder / "precious"), tag="t")
    protect_checkpoints(engine, regroup="auto")
    distributed.barrier()
    before, said = tree(folder), []
    distributed.barrier()
    for tag in ("../precious/t", f"{folder}/precious/t", "../new", ".", "a//b"):
        for call in (engine.save_checkpoint, engine.load_checkpoint):
            with pytest.raises(CheckpointError) as error:
                call(str(folder / "ck"), tag=tag)
            said.append(str(error.value))
    on_first_rank(lambda: (folder / "ck/latest").rename(folder / "latest"))
    on_first_rank(lambda: (folder / "ck/latest").write_text("../precious/t"))
    said.append(str(error_of(engine, folder / "ck")))
    on_first_rank(lambda: (folder / "latest").rename(folder / "ck/latest"))
    return said, (before, tree(folder))


def test_a_tag_that_leads_elsewhere_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    for said, (before, after) in run_on_ranks(2, tags_that_lead_elsewhere, tmp_path):
        assert len(said) == 11
        assert all("is not the name of a folder in" in text for text in said)
        assert after == before


def converted_from_a_deep_tag(folder: Path) -> tuple[bool, Any]:
    """Load it into other groups; the folder before and after."""
    engine = started("zero1", groups_by("module"))
    train(engine, 2)
    own = {"own": Fraction(1, 3)}  # of a class that files are not read with unless they are trusted
    engine.save_checkpoint(str(folder), tag="a/b", client_state=own)
    wanted, here = weights(engine), folder / "a/b"
    # the files that are read are called otherwise than those that are written
    on_first_rank(lambda: copy_as("rank_0_", *here.glob("*optim*")))
    on_first_rank(lambda: (here / FILE_NAME).unlink())
    before = tree(folder)
    distributed.barrier()
    engine = started("zero1", groups_by("expert"))
    protect_checkpoints(engine, regroup="auto")
    path, client_state = engine.load_checkpoint(str(folder))
    assert path is not None
    assert path.startswith(str(here))
    assert client_state["own"] == Fraction(1, 3)
    distributed.barrier()
    return equal(weights(engine), wanted), (before, tree(folder))


def copy_as(model: str, *paths: Path) -> None:
    for path in paths:
        shutil.copy(path, path.with_name(path.name.replace("rank_00_", model)))


def test_a_tag_of_several_folders_is_converted_while_it_is_loaded(tmp_path: Path) -> None:
    """What is written is written beside the source's files, though links to those lie there."""
    for same, (before, after) in run_on_ranks(2, converted_from_a_deep_tag, tmp_path):
        assert same
        assert after == before


# ---- arguments -------------------------------------------------------------------------------


def wrong_arguments() -> list[str]:
    found = []
    engine = started("zero1", groups_by("module"))
    for subject, regroup in ((engine, "on"), (engine.optimizer, "off"), (None, "auto")):
        with pytest.raises(InvalidArgumentError) as error:
            protect_checkpoints(subject, regroup=regroup)  # type: ignore[arg-type]
        found.append(str(error.value))
    return found


def test_arguments_of_protect_checkpoints() -> None:
    for found in run_on_ranks(2, wrong_arguments):
        assert "regroup='on'" in found[0]
        assert "engine=<DeepSpeedZeroOptimizer> must be an engine" in found[1]
        assert "engine=None must be an engine" in found[2]
