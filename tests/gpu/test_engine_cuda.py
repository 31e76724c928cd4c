"""The core and the step's predicted memory on a GPU: one rank, NCCL.

``tests/gpu/run.sh`` sets ``MOE_GROUPS_TRY_GPU_TESTS`` where there is no GPU: then they run on the
CPU, so that only what CUDA itself does is new when they first run on a GPU.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_groups import StepConfig
from tests.distributed.test_core import go_through
from tests.support.ranks import RankPool
from tests.support.step_runs import Case, Run, Shape, run_all
from tests.support.training import WRAPPERS

CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not CUDA and "MOE_GROUPS_TRY_GPU_TESTS" not in os.environ, reason="needs a GPU"
    ),
]

BLOCK = 512
"""Bytes to which CUDA's allocator rounds; of blocks under 1 MiB, as all are here, each."""
SHAPE = Shape(dense=(9_000, 4_001), expert=(6_000, 6_000, 6_000), ep_size=1)
PARAMETERS = 2 + SHAPE.layers * (1 + SHAPE.local * 3)  # a layer has a gate


@pytest.fixture(scope="module")
def pools() -> Iterator[list[RankPool]]:
    made: list[RankPool] = []
    yield made
    for pool in made:
        if pool.alive:
            pool.close()


@pytest.fixture
def rank(pools: list[RankPool]) -> RankPool:
    """A world of one, in a process of its own, which a test that fails ends."""
    if not (pools and pools[-1].alive):
        pools.append(RankPool(1, {"DS_ACCELERATOR": "cuda" if CUDA else "cpu"}))
    return pools[-1]


@pytest.mark.parametrize(
    ("wrapper", "split"),
    [
        ("fp32", "module"),
        ("zero1", "expert"),
        ("zero2", "parallel_group"),
        ("zero2", "module"),
        ("bf16", "expert"),
    ],
)
def test_core(wrapper: str, split: str, rank: RankPool, tmp_path: Path) -> None:
    groups = {"parallel_group": 2, "module": 3, "expert": 9}[split]
    wanted = {"wrapper": WRAPPERS[wrapper], "groups": groups}
    assert rank.run(go_through, wrapper, split, tmp_path) == [wanted]


@pytest.mark.parametrize("optimizer", ["for-loop", "foreach", "fused"])
def test_step_memory(optimizer: str, rank: RankPool) -> None:
    """Prediction and measurement differ by what the allocator rounds, and by scalars."""
    steps = [
        StepConfig(optimizer=optimizer),  # type: ignore[arg-type]
        StepConfig(optimizer=optimizer, compact_gradients=True),  # type: ignore[arg-type]
        StepConfig(optimizer=optimizer, zero_stage=1, grad_accum_dtype="fp32"),  # type: ignore[arg-type]
    ]
    cases = [Case(step, "module", None, SHAPE) for step in steps]
    runs: list[Run] = rank.run(run_all, cases)[0]
    for run in runs:
        # A gradient, a few temporaries and a norm of each parameter; for each group as much again.
        away = run.later[-1].step_peak - run.expected.step_peak
        assert 0 <= away <= 8 * BLOCK * (PARAMETERS + run.group_count)
