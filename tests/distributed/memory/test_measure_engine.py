"""Measured memory of real engine steps agrees with the formula, and with another measurement."""

import gc
import time
from typing import Any

import pytest
import torch

from moe_groups import MoE
from moe_groups.memory.measure import measure_iteration_memory, measure_step_memory
from tests.support.models import TinyMoE
from tests.support.ranks import run_on_ranks
from tests.support.step_peak import step_peak_bytes
from tests.support.training import batches, config, groups_by, initialize

SLACK = 200
"""Bytes of norms, flags and step counts, which the formula leaves out."""

FACTORS = {"loop": 12, "foreach": 8, "fused": 6}
"""T in bytes for each element of the largest partition, with bf16 gradients."""

BUCKET = 20_000
"""Bytes of the bucket that ZeRO reduces gradients in, during backward."""

Figures = tuple[int, int, int]


def forward(engine: Any, step: int) -> torch.Tensor:
    ((x, y),) = batches(1, step)
    dtype = next(engine.module.parameters()).dtype
    loss: torch.Tensor = engine(x.to(dtype), y.to(dtype))
    return loss


def backward(engine: Any, loss: torch.Tensor) -> None:
    engine.backward(loss)
    time.sleep(0.05)  # threads of gloo let go of what they reduced a moment later


def step_figures(engine: Any, step: int) -> Figures:
    backward(engine, forward(engine, step))
    with measure_step_memory() as memory:
        engine.step()
    return memory.transient, memory.held, memory.kept


def phase_peaks(engine: Any, step: int) -> tuple[int, int]:
    """Peaks of backward and step above the memory before the iteration."""
    with measure_iteration_memory() as memory:
        with memory.phase("forward"):
            loss = forward(engine, step)
        with memory.phase("backward"):
            backward(engine, loss)
        del loss
        with memory.phase("step"):
            engine.step()
    peaks = {use.name: use.peak - memory.before for use in memory.phases}
    assert memory.peak - memory.before == max(peaks.values())
    assert abs(memory.after - memory.before) < SLACK
    return peaks["backward"], peaks["step"]


def example_peak(engine: Any, step: int) -> int:
    """T + R as tests/support/step_peak.py measures it."""
    loss = forward(engine, step)
    return step_peak_bytes(lambda: engine.backward(loss), engine.step)


def touched_bytes(engine: Any) -> int:
    """Of each parameter that touches this rank's partitions, the whole gradient."""
    inside = engine.optimizer.params_in_partition
    return sum(param.numel() * param.element_size() for group in inside for param in group)


def partitions(engine: Any) -> list[int]:
    """Elements of each group's partition on one rank."""
    return [flat.numel() for flat in engine.optimizer.single_partition_of_fp32_groups]


def measure_zero(wrapper: str, kind: str) -> dict[str, Any]:
    model = TinyMoE(MoE, ep_size=2)
    optimizer = torch.optim.AdamW(
        groups_by("module")(model), lr=1e-2, foreach=kind == "foreach", fused=kind == "fused"
    )
    cfg = config(wrapper)
    cfg["zero_optimization"]["reduce_bucket_size"] = BUCKET // 2
    engine = initialize(model, optimizer, cfg)
    gc.unfreeze()  # what is frozen is found too, in ten times the time
    gc.collect()  # cycles with tensors of earlier runs would be released in a step
    return {
        "partitions": partitions(engine),
        "touched": touched_bytes(engine),
        "first": step_figures(engine, 0),
        "later": [step_figures(engine, step) for step in (1, 2)],
        "phases": [phase_peaks(engine, step) for step in (3, 4)],
        "example": example_peak(engine, 5),
    }


@pytest.mark.parametrize(
    ("wrapper", "kind"),
    [
        ("zero2", "loop"),
        pytest.param("zero2", "foreach", marks=pytest.mark.long),
        ("zero2", "fused"),
        pytest.param("zero1", "foreach", marks=pytest.mark.long),
    ],
)
def test_zero_step(wrapper: str, kind: str) -> None:
    for rank in run_on_ranks(2, measure_zero, wrapper, kind):
        elements, held = rank["partitions"], rank["touched"]
        expected = FACTORS[kind] * max(elements) + held
        transient, released, kept = rank["first"]
        # Each group's partition gets two fp32 moments in the first step; they stay.
        assert 0 <= kept - 8 * sum(elements) < SLACK
        assert transient + released > expected
        for transient, released, kept in rank["later"]:
            assert 0 <= kept < SLACK
            assert released >= held
            assert 0 <= transient + released - expected < SLACK
        # Where the threads of gloo were in time, the gradients are all.
        assert min(released for _, released, _ in rank["later"]) - held < SLACK
        assert 0 <= rank["example"] - expected < SLACK
        # What an iteration makes is released by its end, so its floor is the step's.
        assert 0 <= min(step for _, step in rank["phases"]) - expected < SLACK
        assert min(backward for backward, _ in rank["phases"]) > BUCKET


def test_fp32_gradients() -> None:
    """With fp32 accumulation just the partitions' gradients are held."""
    for rank in run_on_ranks(2, measure_zero, "zero2_fp32_grads", "fused"):
        released = min(released for _, released, _ in rank["later"])
        assert 0 <= released - 4 * sum(rank["partitions"]) < SLACK
