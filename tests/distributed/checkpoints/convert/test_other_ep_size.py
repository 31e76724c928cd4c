"""A run goes on with its experts on other ranks, as if it had never changed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_groups import protect_checkpoints, regroup_checkpoint
from moe_groups.checkpoints.manifest import read_manifest
from moe_groups.errors import CheckpointMismatchError
from tests.distributed.checkpoints.convert.test_regroup_training import (
    History,
    engine_for,
    rates,
    scheduler,
)
from tests.support.checkpoints.guard_runs import error_of
from tests.support.checkpoints.made_checkpoints import same, state_by_expert
from tests.support.ranks import run_on_ranks
from tests.support.training import CLIPPED_TOLERANCE, NORM_TOLERANCE, train

FP32 = {"bf16": {"enabled": False}, "data_types": {"grad_accum_dtype": "fp32"}}


def config_of(wrapper: str) -> dict[str, Any]:
    return {} if wrapper == "bf16" else FP32  # ZeRO steps fp32 weights too


def save(directory: Path, wrapper: str, split: str, ep_size: int) -> History:
    """The run that never changes."""
    engine = engine_for(wrapper, split, ep_size, lr_scheduler=scheduler, **config_of(wrapper))
    protect_checkpoints(engine)  # stock groups too
    train(engine, 2)
    engine.save_checkpoint(str(directory / "saved"))
    history = train(engine, 2, 2) | rates(engine)
    engine.save_checkpoint(str(directory / "whole"))
    engine.destroy()
    return history


def resume(directory: Path, wrapper: str, split: str, ep_size: int, source: str) -> History:
    """Load, save at once, and train on; offline conversion has made ``source`` already."""
    engine = engine_for(wrapper, split, ep_size, lr_scheduler=scheduler, **config_of(wrapper))
    if source == "saved":
        error = error_of(engine, directory / source)
        assert isinstance(error, CheckpointMismatchError), error
        assert "moe-groups regroup-checkpoint" in str(error)
    protect_checkpoints(engine, regroup="auto")
    path, _ = engine.load_checkpoint(str(directory / source))
    assert path is not None
    engine.save_checkpoint(str(directory / "loaded"))
    history = train(engine, 2, 2) | rates(engine)
    engine.save_checkpoint(str(directory / "resumed"))
    engine.destroy()
    return history


def state_in(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    tag = (directory / "latest").read_text()
    return state_by_expert(directory, read_manifest(directory / tag / "moe_groups.json").layout)


ROWS = [
    # wrapper, ranks, split and ep_size before and after, converted offline
    ("zero1", 2, ("module", 2), ("expert", 1), False),
    ("bf16", 2, ("stock", 1), ("module", 2), False),
    ("zero2", 4, ("module", 2), ("module", 4), True),
    ("zero1", 4, ("expert", 1), ("module", 4), True),
    ("bf16", 4, ("expert", 4), ("stock", 2), True),
    ("zero2", 2, ("capped", 2), ("stock", 1), False),
]
FAST = 2


@pytest.mark.parametrize(
    ("wrapper", "ranks", "old", "new", "offline"),
    [*ROWS[:FAST], *(pytest.param(*row, marks=pytest.mark.long) for row in ROWS[FAST:])],
)
def test_training_goes_on(
    wrapper: str,
    ranks: int,
    old: tuple[str, int],
    new: tuple[str, int],
    offline: bool,
    tmp_path: Path,
) -> None:
    whole = run_on_ranks(ranks, save, tmp_path, wrapper, *old)
    source = "saved"
    if offline:
        source, (split, ep_size) = "converted", new
        regroup_checkpoint(tmp_path / "saved", tmp_path / source, split, ep_size=ep_size)
    resumed = run_on_ranks(ranks, resume, tmp_path, wrapper, *new, source)
    assert same(state_in(tmp_path / "loaded"), state_in(tmp_path / "saved"))
    # The outputs of experts are rounded once more or less where tokens go another way.
    loss = 2**-8 if wrapper == "bf16" else NORM_TOLERANCE
    for one, other in zip(whole, resumed, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=loss)
        assert other["lr"] == one["lr"]
    if wrapper != "bf16":
        one, other = state_in(tmp_path / "whole"), state_in(tmp_path / "resumed")
        for name, state in one.items():
            torch.testing.assert_close(
                other[name]["fp32"], state["fp32"], rtol=0, atol=2 * CLIPPED_TOLERANCE
            )
