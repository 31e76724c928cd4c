"""Save under one grouping, convert, load under another, train on as if nothing had happened."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_groups import protect_checkpoints, regroup_checkpoint
from moe_groups.checkpoints.guard.engine_layout import gather_layout
from moe_groups.checkpoints.guard.guard import GUARDS
from moe_groups.checkpoints.layout import Layout
from moe_groups.checkpoints.manifest import read_manifest
from tests.support.checkpoints.made_checkpoints import same, shard_contents, state_of
from tests.support.pairwise import Row, label, pairwise
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import NORM_TOLERANCE, groups_by, start, train

SPLITS: dict[str, tuple[str, int | None]] = {
    "stock": ("stock", None),
    "module": ("module", None),
    "expert": ("expert", None),
    "capped": ("parallel_group", 500),
    "stock_capped": ("stock", 700),
}
TAG = "global_step2"
History = dict[str, list[float]]


def engine_for(wrapper: str, split: str, ep_size: int, **changes: Any) -> Any:
    forget_process_groups()
    options = {"ep_size": ep_size, "num_experts": 4}
    changes = {"gradient_clipping": 0.0} | changes
    return start(wrapper, groups_by(*SPLITS[split]), model_options=options, **changes)


def scheduler(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def save_all(directory: Path, wrapper: str, ep_size: int, splits: list[str]) -> dict[str, History]:
    """Save under each split, and train on."""
    histories = {}
    for split in splits:
        engine = engine_for(wrapper, split, ep_size, lr_scheduler=scheduler)
        protect_checkpoints(engine)  # stock groups too
        train(engine, 2)
        engine.save_checkpoint(str(directory / split))
        histories[split] = train(engine, 2, 2) | rates(engine)
        GUARDS.pop(engine, None)
        engine.destroy()
    return histories


def rates(engine: Any) -> History:
    return {"lr": sorted({group["lr"] for group in engine.optimizer.param_groups})}


def resume_all(
    directory: Path, wrapper: str, ep_size: int, pairs: list[tuple[str, str]], **changes: Any
) -> dict[tuple[str, str], History]:
    """Load what was converted for each pair into the second's groups, and train on."""
    histories = {}
    for old, new in pairs:
        engine = engine_for(wrapper, new, ep_size, lr_scheduler=scheduler, **changes)
        path, _ = engine.load_checkpoint(str(directory / f"{old}-{new}"))
        assert path is not None
        assert engine.global_steps == 2
        histories[old, new] = train(engine, 2, 2) | rates(engine)
        engine.destroy()
    return histories


def resume_auto(directory: Path, wrapper: str, ep_size: int, old: str, new: str) -> History:
    engine = engine_for(wrapper, new, ep_size, lr_scheduler=scheduler)
    protect_checkpoints(engine, regroup="auto")
    path, _ = engine.load_checkpoint(str(directory / old))
    assert Path(path).parent == directory / old / TAG
    return train(engine, 2, 2) | rates(engine)


def convert(directory: Path, pairs: list[tuple[str, str]]) -> None:
    for old, new in pairs:
        regroup_checkpoint(directory / old, directory / f"{old}-{new}", directory / new)


def check(ranks: int, directory: Path, wrapper: str, ep_size: int, pairs: Any) -> None:
    splits = list(dict.fromkeys(split for pair in pairs for split in pair))
    saved = run_on_ranks(ranks, save_all, directory, wrapper, ep_size, splits)
    convert(directory, pairs)
    resumed = run_on_ranks(ranks, resume_all, directory, wrapper, ep_size, pairs)
    for rank in range(ranks):
        for old, new in pairs:
            # the norm is summed in another order, and reported, but clips nothing here
            for key in ("loss", "lr"):
                assert resumed[rank][old, new][key] == saved[rank][old][key], (old, new, key)
            norms = resumed[rank][old, new]["norm"]
            assert norms == pytest.approx(saved[rank][old]["norm"], rel=NORM_TOLERANCE)
    layouts = {
        split: read_manifest(directory / split / TAG / "moe_groups.json").layout for split in splits
    }
    for old, new in pairs:
        made = state_of(directory / f"{old}-{new}", layouts[new])
        assert same(made, state_of(directory / old, layouts[old])), (old, new)
        back = directory / f"{old}-{new}-back"
        regroup_checkpoint(directory / f"{old}-{new}", back, directory / old)
        assert same(optimizers(back), optimizers(directory / old)), (old, new)


def optimizers(directory: Path) -> dict[str, Any]:
    """The optimizer states without the configs that differ in nothing but their identity."""
    return {name: c["optimizer_state_dict"] for name, c in shard_contents(directory).items()}


ROUND = ["stock", "expert", "capped", "module", "stock_capped", "stock"]
"""Each grouping once; the pure tests of conversion have every pair of them."""


ROWS = pairwise(
    {
        "wrapper": ["zero1", "zero2", "bf16", "zero2_fp32_grads"],
        "ranks": [2, 4],
        "ep_size": [1, 2],
    }
)
FAST = (("zero2", 2), ("bf16", 2))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if (row["wrapper"], row["ranks"]) in FAST else pytest.mark.long)
        for row in ROWS
    ],
    ids=label,
)
def test_training_goes_on_in_other_groups(row: Row, tmp_path: Path) -> None:
    rounds = list(itertools.pairwise(ROUND))
    check(row["ranks"], tmp_path, row["wrapper"], row["ep_size"], rounds)


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_training_goes_on_in_groups_of_a_name(wrapper: str, tmp_path: Path) -> None:
    """Each conversion goes on from the one before, by name and without the model."""
    (saved, *_) = run_on_ranks(2, save_all, tmp_path, wrapper, 2, ["module"])
    (wanted, *_) = run_on_ranks(2, layouts_of_engines, wrapper, 2)
    before = tmp_path / "module"
    values = state_of(before, read_manifest(before / TAG / "moe_groups.json").layout)
    for new, (name, cap) in SPLITS.items():
        made = tmp_path / f"module-{new}"
        regroup_checkpoint(before, made, name, max_group_size=cap)
        layout = read_manifest(made / TAG / "moe_groups.json").layout
        assert layout.fingerprint() == wanted[new].fingerprint(), new
        assert same(state_of(made, layout), values)
        before = made
    resumed = run_on_ranks(
        2, resume_all, tmp_path, wrapper, 2, [("module", new) for new in ("expert", "stock")]
    )
    for history in resumed[0].values():
        assert history["loss"] == saved["module"]["loss"]


def layouts_of_engines(wrapper: str, ep_size: int) -> dict[str, Layout | None]:
    """What real engines have with each split."""
    found = {}
    for split in SPLITS:
        engine = engine_for(wrapper, split, ep_size)
        found[split] = gather_layout(engine)
        engine.destroy()
    return found


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_a_checkpoint_is_converted_while_it_is_loaded(wrapper: str, tmp_path: Path) -> None:
    saved = run_on_ranks(2, save_all, tmp_path, wrapper, 2, ["stock", "module"])
    (tmp_path / "stock" / TAG / "moe_groups.json").unlink()  # as of a run without moe-groups
    before = sorted(tmp_path.rglob("*"))
    for old, new in (("stock", "expert"), ("module", "capped")):
        resumed = run_on_ranks(2, resume_auto, tmp_path, wrapper, 2, old, new)
        for rank in range(2):
            assert resumed[rank]["loss"] == saved[rank][old]["loss"]
            assert resumed[rank]["lr"] == saved[rank][old]["lr"]
    assert sorted(tmp_path.rglob("*")) == before


def save_on_two(directory: Path, wrapper: str) -> None:
    save_all(directory, wrapper, 2, ["module"])


def resume_on_four(directory: Path, wrapper: str) -> tuple[str, History, int]:
    engine = engine_for(wrapper, "expert", 2, lr_scheduler=scheduler)
    try:
        engine.load_checkpoint(str(directory / "module"))
    except Exception as error:
        target = getattr(error, "target", None)
        message = str(error)
    else:
        raise AssertionError("a checkpoint of two ranks was loaded on four")
    protect_checkpoints(engine, regroup="auto")
    engine.load_checkpoint(str(directory / "module"))
    first = [float(group["lr"]) for group in engine.optimizer.param_groups]
    engine.save_checkpoint(str(directory / "again"), tag=TAG)
    assert target is not None
    return message, {"target": [], "lr": first}, len(target)


@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "bf16"])
def test_the_number_of_data_parallel_ranks_changes(wrapper: str, tmp_path: Path) -> None:
    run_on_ranks(2, save_on_two, tmp_path, wrapper)
    message, *_ = run_on_ranks(4, resume_on_four, tmp_path, wrapper)[0]
    assert "saved by 2 data-parallel ranks, the run has 4" in message
    (target,) = (tmp_path / "module").glob("moe_groups_*.json")
    two = read_manifest(tmp_path / "module" / TAG / "moe_groups.json").layout
    four = read_manifest(target).layout
    regroup_checkpoint(tmp_path / "module", tmp_path / "four", target)
    values = state_of(tmp_path / "module", two)
    assert same(state_of(tmp_path / "four", four), values)
    assert same(state_of(tmp_path / "again", four), values)
    regroup_checkpoint(tmp_path / "four", tmp_path / "back", tmp_path / "module")
    assert same(optimizers(tmp_path / "back"), optimizers(tmp_path / "module"))
