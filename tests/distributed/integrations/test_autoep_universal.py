"""AutoEP resumed with another expert-parallel size, through DeepSpeed's universal checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from moe_groups import create_moe_param_groups, set_group_options, tag_experts, verify
from moe_groups.checkpoints.manifest import FILE_NAME, read_manifest
from moe_groups.errors import CheckpointMismatchError, CheckpointWarning
from moe_groups.integrations.autoep import autoep_optimizer
from tests.support.autoep_models import make_model
from tests.support.autoep_runs import EPS, RATES, batches, deepspeed_config, full_weights
from tests.support.checkpoints.guard_runs import (
    error_of,
    falling,
    options_of,
    to_universal,
    universal_state,
)
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import initialize, largest_difference

pytest.importorskip("deepspeed.module_inject.auto_ep_layer", reason="AutoEP came with 0.19.2")

BEFORE, AFTER = 2, 2
TOLERANCE = 1e-6
"""Of weights and losses: experts on other ranks sum gradients in another order.

That changes a gradient of at most 0.1 by less than 8 roundings, 1e-7, and AdamW, whose ``eps`` is
1e-4, a weight by less than the rate, 1e-3, times 1e-7 / 1e-4, in each of two steps.
"""


def started(
    kind: str, wrapper: str, ep_size: int, betas: tuple[float, float] = (0.9, 0.99), **other: Any
) -> Any:
    """An engine in groups by layer, the last of which has options of its own.

    Args:
        ep_size: 0: without AutoEP.
        other: ``scheduled``, ``sub_group``, ``split_by``, and ``universal``: what it loads.
    """
    cfg = deepspeed_config(wrapper, ep_size)
    cfg["zero_optimization"]["sub_group_size"] = other.get("sub_group", 10**9)
    cfg["checkpoint"] = {"load_universal": other.get("universal", False)}
    model = make_model(kind)
    grouping: Any = {
        "split_by": other.get("split_by", "module"),
        "weight_decay": 0.1,
        "overrides": [("*.layers.1.mlp.experts*", {"lr": 3e-4, "weight_decay": 0.3})]
        * ("split_by" not in other),
    }

    def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=RATES["AdamW"], betas=betas, eps=EPS)

    schedule = {"lr_scheduler": falling} if other.get("scheduled") else {}
    if ep_size:
        return initialize(model, autoep_optimizer(model, adamw, **grouping), cfg, **schedule)
    del cfg["expert_parallel"]
    tag_experts(model, "*.experts")
    groups = create_moe_param_groups(model, **grouping)
    return initialize(model, adamw(groups), cfg, **schedule)


def trained(engine: Any, steps: int, first: int = 0) -> torch.Tensor:
    """The losses of ``steps`` steps."""
    losses = []
    for batch in [*batches(distributed.get_rank(), first + steps)][first:]:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def state_of(engine: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and steps of all parameters, whole, by their files."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        engine.save_checkpoint(str(folder / "saved"), tag="t")
    to_universal(folder)
    return universal_state(folder)


def steps_of(engine: Any) -> set[float]:
    return {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}


def resumed(
    folder: Path, kind: str, wrapper: str, sizes: tuple[int, int], **other: Any
) -> list[str]:
    """Resume, and go on as the run that never changed; the names of the groups."""
    old, new = sizes
    first = started(kind, wrapper, old, **other)
    with torch.no_grad():
        for name, buffer in first.module.named_buffers():
            if name.endswith("e_score_correction_bias"):  # far above the scores: it routes
                buffer.copy_(torch.arange(len(buffer)).flip(0))
    set_group_options(first, "*.layers.1.mlp.experts.*", lr_multiplier=0.5)
    trained(first, BEFORE)
    saved, options = state_of(first, folder / "first"), options_of(first)
    losses = trained(first, AFTER, BEFORE)
    went_on = state_of(first, folder / "went on")
    forget_process_groups()

    other = other | {"sub_group": 3 * other.get("sub_group", 1), "universal": True}
    engine = started(kind, wrapper, new, betas=(0.5, 0.5), **other)
    names = [group["name"] for group in engine.optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        engine.load_checkpoint(str(folder / "first" / "universal"))
    assert [group["name"] for group in engine.optimizer.param_groups] == names
    assert [{**own, "name": 0} for own in options_of(engine)] == [
        {**own, "name": 0} for own in options
    ]
    verify(engine)
    now = state_of(engine, folder / "resumed")
    assert now.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], now[name])] == []
    manifest = read_manifest(folder / "resumed" / "saved" / "t" / FILE_NAME)
    assert {group.name for group in manifest.layout.groups} == set(names)

    assert (trained(engine, AFTER, BEFORE) - losses).abs().max() < TOLERANCE
    assert steps_of(engine) == {BEFORE + AFTER}
    after = state_of(engine, folder / "after")
    off = {name: (after[name] - went_on[name]).abs().max() for name in after if "fp32" in name}
    assert max(off.values()) < TOLERANCE, off
    return names


CASES = [
    ("deepseek", "zero2", (2, 1), {"scheduled": True}),
    ("mixtral", "zero3", (1, 2), {"sub_group": 600}),
    ("qwen3", "zero1", (1, 2), {"scheduled": True}),
    ("mixtral", "zero2", (1, 2), {}),
    ("deepseek", "zero3", (2, 1), {"scheduled": True}),
    ("qwen3", "zero3", (2, 2), {"sub_group": 600, "scheduled": True}),
    ("mixtral", "zero3", (0, 0), {"sub_group": 600, "scheduled": True}),
    ("mixtral", "zero1", (2, 4), {"scheduled": True}),
    ("qwen3", "zero3", (4, 2), {}),
]


@pytest.mark.parametrize(
    ("kind", "wrapper", "sizes", "other"),
    [
        pytest.param(*case, marks=() if index < 2 else pytest.mark.long)
        for index, case in enumerate(CASES)
    ],
)
def test_another_size_goes_on_as_the_old_one(
    kind: str, wrapper: str, sizes: tuple[int, int], other: dict[str, Any], tmp_path: Path
) -> None:
    ranks = max(2, *sizes)
    for names in run_on_ranks(ranks, resumed, tmp_path, kind, wrapper, sizes, **other):
        experts = [name for name in names if name.startswith(f"ep_size_{sizes[1] or 1}_")]
        assert len(names) > len(experts) >= 1


def saved_on_some_ranks(folder: Path, wrapper: str, ep_size: int) -> None:
    engine = started("mixtral", wrapper, ep_size, scheduled=True)
    trained(engine, BEFORE)
    state_of(engine, folder / "first")


def loaded_on_others(folder: Path, wrapper: str, ep_size: int) -> None:
    engine = started("mixtral", wrapper, ep_size, scheduled=True, universal=True)
    engine.load_checkpoint(str(folder / "first" / "universal"))
    verify(engine)
    now, saved = state_of(engine, folder / "resumed"), universal_state(folder / "first")
    assert now.keys() == saved.keys()
    assert [name for name in saved if not torch.equal(saved[name], now[name])] == []
    trained(engine, AFTER, BEFORE)
    assert steps_of(engine) == {BEFORE + AFTER}


@pytest.mark.long
@pytest.mark.parametrize("wrapper", ["zero2", "zero3"])
def test_another_number_of_ranks(wrapper: str, tmp_path: Path) -> None:
    run_on_ranks(4, saved_on_some_ranks, tmp_path, wrapper, 4)
    run_on_ranks(2, loaded_on_others, tmp_path, wrapper, 1)


def into_more_groups(folder: Path) -> None:
    """ZeRO-3 finds the state of all groups; they keep the options of the run."""
    first = started("mixtral", "zero3", 2, split_by="parallel_group")
    trained(first, BEFORE)
    saved = state_of(first, folder / "first")
    forget_process_groups()
    engine = started("mixtral", "zero3", 1, betas=(0.5, 0.5), universal=True)
    options = options_of(engine)
    assert len(options) > len(options_of(first))
    with pytest.warns(CheckpointWarning, match="groups keep the options"):
        engine.load_checkpoint(str(folder / "first" / "universal"))
    assert options_of(engine) == options
    now = state_of(engine, folder / "resumed")
    assert [name for name in saved if not torch.equal(saved[name], now[name])] == []
    trained(engine, AFTER, BEFORE)
    assert steps_of(engine) == {BEFORE + AFTER}


@pytest.mark.long
def test_zero3_loads_fewer_groups(tmp_path: Path) -> None:
    run_on_ranks(2, into_more_groups, tmp_path)


def refused(folder: Path, saved_by: str, run_by: str) -> str:
    """The refusal, after which all is as before; weights alone can be loaded by the same stage."""
    first = started("mixtral", saved_by, 2)
    trained(first, 1)
    if run_by == saved_by:
        set_group_options(first, "*.layers.1.mlp.experts.*", frozen=True)
    trained(first, 1, 1)
    state_of(first, folder)
    saved = full_weights(first)
    forget_process_groups()

    engine = started("mixtral", run_by, 2, betas=(0.5, 0.5), universal=True)
    before, options = full_weights(engine), options_of(engine)
    error = error_of(engine, folder / "universal")
    assert isinstance(error, CheckpointMismatchError)
    assert largest_difference(full_weights(engine), before) == 0
    assert engine.global_steps == 0
    if run_by == saved_by:
        engine.load_checkpoint(str(folder / "universal"), load_optimizer_states=False)
        assert largest_difference(full_weights(engine), saved) == 0
    assert options_of(engine) == options
    return str(error)


@pytest.mark.parametrize(
    ("saved_by", "run_by", "said"),
    [
        ("zero3", "zero3", "groups that were stepped 1 and 2 times"),
        pytest.param("zero2", "zero3", "was saved under ZeRO-1 or ZeRO-2", marks=pytest.mark.long),
        pytest.param("zero3", "zero2", "was saved under ZeRO-3, and", marks=pytest.mark.long),
    ],
)
def test_what_deepspeed_would_load_wrongly_is_refused(
    saved_by: str, run_by: str, said: str, tmp_path: Path
) -> None:
    for error in run_on_ranks(2, refused, tmp_path, saved_by, run_by):
        assert said in error
        assert "Nothing was loaded." in error
