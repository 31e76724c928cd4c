"""verify(engine) after a scheduler, a checkpoint or a user has changed the groups."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_groups import verify
from tests.distributed.engine.test_verify import (
    EP2,
    as_they_are,
    change_lr,
    found_by_verify,
    groups_with_options,
    named,
    problems_of,
)
from tests.support.ranks import run_on_ranks
from tests.support.training import start, train


def halve(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def with_scheduler(scheduler: dict[str, Any] | None) -> list[str]:
    """What verify finds after two steps with a DeepSpeed scheduler, or with torch's for None."""
    changes: dict[str, Any] = {} if scheduler is None else {"scheduler": scheduler}
    client = halve if scheduler is None else None
    engine = start("zero2", groups_with_options, model_options=EP2, lr_scheduler=client, **changes)
    train(engine, 2)
    now = [group["lr"] for group in engine.optimizer.param_groups]
    assert not {1e-2, 1e-4, 2e-2}.intersection(now), "the scheduler does nothing"
    return found_by_verify(engine)


def with_other_base_rate() -> list[str]:
    engine = start("zero2", groups_with_options, model_options=EP2, lr_scheduler=halve)
    named(engine.optimizer.param_groups, "dense.override.1")["initial_lr"] = 0.5
    return found_by_verify(engine)


def test_base_rate_of_a_scheduler_is_checked() -> None:
    for problems in run_on_ranks(2, with_other_base_rate):
        assert "'dense.override.1' steps inp.weight" in problems[0]
        assert "lr=0.5; given (in group 'dense.override.1') was lr=0.02" in problems[0]


def warmup(**params: Any) -> dict[str, Any]:
    return {"type": "WarmupLR", "params": {"warmup_num_steps": 10, **params}}


@pytest.mark.parametrize("scheduler", [warmup(), None], ids=["WarmupLR", "LambdaLR"])
def test_scheduler_that_keeps_the_rates(scheduler: dict[str, Any] | None) -> None:
    assert run_on_ranks(2, with_scheduler, scheduler) == [[], []]


def test_scheduler_with_one_rate_for_all_is_found() -> None:
    for problems in run_on_ranks(2, with_scheduler, warmup(warmup_max_lr=1e-2)):
        assert any("'dense.override.1' steps inp.weight" in line for line in problems)
        assert any("given (in group 'dense.override.1') was lr=0.02" in line for line in problems)


def test_scheduler_that_replaces_all_rates_is_found() -> None:
    swept = {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-3}}
    for problems in run_on_ranks(2, with_scheduler, swept):
        assert any("LRRangeTest replaced lr=" in line for line in problems)


def after_load(folder: Path) -> list[list[str]]:
    found = []
    for wrapper in ("zero1", "zero2", "bf16"):
        engine = start(wrapper, groups_with_options, model_options=EP2)
        train(engine, 1)
        engine.save_checkpoint(str(folder / wrapper))
        engine = start(wrapper, groups_with_options, model_options=EP2)
        engine.load_checkpoint(str(folder / wrapper))
        verify(engine)
        change_lr(engine)
        found.append(found_by_verify(engine))
    return found


def test_after_load_checkpoint(tmp_path: Path) -> None:
    for found in run_on_ranks(2, after_load, tmp_path):
        assert all("lr=0.5" in problems[0] for problems in found)


def step_twice(engine: Any) -> None:
    dense, *_, last = engine.optimizer.param_groups
    last["params"].append(dense["params"][0])


def test_parameter_in_two_groups() -> None:
    """DeepSpeed checks this when it starts; without a wrapper it can happen later."""
    for problems in run_on_ranks(2, problems_of, "fp32", as_they_are, step_twice):
        assert any("is stepped by 2 groups: dense" in problem for problem in problems)
