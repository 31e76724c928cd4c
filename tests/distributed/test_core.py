"""The core on two ranks: group, train, verify, save, load, inspect, regroup.

``make compatibility`` runs it with each release of what the library stands on. It imports nothing
that older releases lack, and says in words what a release cannot do.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_groups import inspect_checkpoint, protect_checkpoints, verify
from tests.support.ranks import run_on_ranks
from tests.support.training import (
    WRAPPERS,
    groups_by,
    largest_difference,
    start,
    train,
    weights,
)

SPLITS = ["parallel_group", "module", "expert"]


def engine_of(wrapper: str, split: str) -> Any:
    world = torch.distributed.get_world_size()
    return start(wrapper, groups_by(split), model_options={"ep_size": world})


def go_through(wrapper: str, split: str, folder: Path) -> dict[str, Any]:
    engine = engine_of(wrapper, split)
    found: dict[str, Any] = {"wrapper": type(engine.optimizer).__name__}
    found["groups"] = len(engine.optimizer.param_groups)
    losses = train(engine, 4)["loss"]
    verify(engine)
    assert losses[-1] < losses[0]
    engine.save_checkpoint(str(folder), tag="saved")
    saved, goes_on = weights(engine), train(engine, 1, first=4)["loss"]

    same = engine_of(wrapper, split)
    same.load_checkpoint(str(folder), tag="saved")
    assert largest_difference(weights(same), saved) == 0
    assert train(same, 1, first=4)["loss"] == goes_on
    if wrapper == "fp32":
        return found

    if torch.distributed.get_rank() == 0:
        assert inspect_checkpoint(folder, "saved", trust=True).problems == ()
    torch.distributed.barrier()
    other = engine_of(wrapper, SPLITS[SPLITS.index(split) - 1])
    protect_checkpoints(other, regroup="auto")
    other.load_checkpoint(str(folder), tag="saved")
    assert largest_difference(weights(other), saved) == 0
    # The norm sums in another order, and the scale that clips rounds with it.
    assert math.isclose(train(other, 1, first=4)["loss"][0], goes_on[0], rel_tol=2**-7)
    verify(other)
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("wrapper", ["fp32", "zero1", "zero2", "bf16"])
def test_core(wrapper: str, split: str, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"wrapper": WRAPPERS[wrapper]}
    wanted["groups"] = {"parallel_group": 2, "module": 3, "expert": 5}[split]
    assert run_on_ranks(2, go_through, wrapper, split, tmp_path) == [wanted] * 2
