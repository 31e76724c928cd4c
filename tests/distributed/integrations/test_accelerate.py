"""Accelerate on two ranks: trained, saved and resumed as through DeepSpeed alone."""

from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from moe_groups import describe, protect_checkpoints, regroup_checkpoint, verify
from moe_groups._deepspeed.engines import wrapper_name
from moe_groups.checkpoints.manifest import FILE_NAME, read_manifest
from moe_groups.errors import CheckpointError, CheckpointMismatchError
from tests.support.hf_runs import (
    by_expert,
    prepare_with_accelerate,
    run_accelerate,
    train_plainly,
)
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import largest_difference, weights

NAMES = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "bf16": "BF16_Optimizer"}
BLOCKS = [(), ("optimizer",), ("scheduler",), ("optimizer", "scheduler")]
CASES = [("zero2", blocks) for blocks in BLOCKS] + [
    (wrapper, blocks) for wrapper in ("zero1", "bf16") for blocks in (BLOCKS[0], BLOCKS[3])
]


def train_both_ways(wrapper: str, blocks: tuple[str, ...]) -> tuple[float, list[str], list[str]]:
    run = prepare_with_accelerate(wrapper, blocks)
    run_accelerate(run, steps=4)
    engine = run[1]
    assert wrapper_name(engine) == NAMES[wrapper]
    verify(engine)
    trained, names = weights(engine), [row.name for row in describe(engine).rows]
    forget_process_groups()
    plain = train_plainly(wrapper, blocks, by_expert)
    plain_names = [row.name for row in describe(plain).rows]
    return largest_difference(trained, weights(plain)), names, plain_names


@pytest.mark.parametrize(("wrapper", "blocks"), CASES)
def test_trains_as_through_deepspeed(wrapper: str, blocks: tuple[str, ...]) -> None:
    for difference, names, plain_names in run_on_ranks(
        2, train_both_ways, wrapper, blocks, timeout=400
    ):
        assert difference == 0.0
        assert names == plain_names
        assert len(set(names)) == len(names) == 10  # dense and 4 experts, each with and without


def resume(folder: Path) -> tuple[list[float], float, bool]:
    """Without clipping, which divides by a norm whose sum is ordered by groups."""
    options: Any = {"wrapper": "zero2", "blocks": ("optimizer",), "clip": 0.0}
    run = prepare_with_accelerate(**options)
    run_accelerate(run, steps=2)
    run[0].save_state(str(folder))
    before = weights(run[1])
    run_accelerate(run, steps=2)
    wanted = weights(run[1])
    found = []
    for split_by in ("expert", "module"):
        forget_process_groups()
        run = prepare_with_accelerate(split_by=split_by, **options)
        if split_by == "module":
            with pytest.raises(CheckpointMismatchError, match="saved with other groups"):
                run[0].load_state(str(folder))
            protect_checkpoints(run[1], regroup="auto")
        run[0].load_state(str(folder))
        run_accelerate(run, steps=2)
        found.append(largest_difference(weights(run[1]), wanted))
    manifest = folder / "pytorch_model" / FILE_NAME
    return found, largest_difference(before, wanted), bool(read_manifest(manifest).layout.origins)


@pytest.mark.numeric
def test_resumes_from_a_saved_state(tmp_path: Path) -> None:
    for differences, moved, says_origins in run_on_ranks(2, resume, tmp_path, timeout=400):
        assert differences == [0.0] * 2
        assert moved > 0
        assert says_origins


def resume_with_a_scheduler_of_torch(folder: Path) -> list[set[float]]:
    """Accelerate loads it by itself, after the engine: only the command can convert it."""
    run = prepare_with_accelerate("zero2", ())
    run_accelerate(run, steps=2)
    run[0].save_state(str(folder / "a"))
    wanted = {group["lr"] for group in run[1].optimizer.param_groups}
    forget_process_groups()
    run = prepare_with_accelerate("zero2", (), split_by="module")
    protect_checkpoints(run[1], regroup="auto")
    with pytest.raises(CheckpointError, match=r"scheduler.bin has a value for each group"):
        run[0].load_state(str(folder / "a"))
    if distributed.get_rank() == 0:
        regroup_checkpoint(folder / "a", folder / "b", "module", trust=True)
    distributed.barrier()
    run[0].load_state(str(folder / "b"))
    loaded = {group["lr"] for group in run[1].optimizer.param_groups}
    run_accelerate(run, steps=1)
    return [wanted, loaded]


def test_a_scheduler_beside_the_checkpoint_is_not_loaded_by_position(tmp_path: Path) -> None:
    for wanted, loaded in run_on_ranks(2, resume_with_a_scheduler_of_torch, tmp_path):
        assert wanted == loaded
