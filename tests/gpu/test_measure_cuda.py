"""Measured memory on CUDA: known allocations, in the allocator's blocks of 512 bytes."""

import pytest
import torch

from moe_groups.memory.measure import MeasuredStep, measure_iteration_memory, measure_step_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def block(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def figures(memory: MeasuredStep) -> tuple[int, int, int]:
    return memory.transient, memory.held, memory.kept


def test_kept_and_released() -> None:
    old, new = [block(51200)], []
    with measure_step_memory() as memory:
        new.append(block(1024))
        old.clear()
        block(2048)
    assert figures(memory) == (1024, 51200, 1024)
    assert memory.after == torch.cuda.memory_allocated()


def test_address_that_is_given_away_again() -> None:
    old, new = [block(51200)], []
    with measure_step_memory() as memory:
        old.clear()
        new.append(block(51200))
    assert figures(memory) == (0, 51200, 51200)


def test_gradients_and_state_of_adamw() -> None:
    weight = torch.nn.Parameter(torch.ones(1 << 16, device="cuda"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    for kept in (2 * 4 * (1 << 16) + 512, 0):
        weight.sum().backward()
        with measure_step_memory("cuda") as memory:
            optimizer.step()
            optimizer.zero_grad()
        assert (memory.held, memory.kept) == (4 * (1 << 16), kept)


def test_phases() -> None:
    with measure_iteration_memory() as memory:
        with memory.phase("forward"):
            kept = block(1024)
        with memory.phase("backward"):
            block(4096)
        with memory.phase("step"):
            del kept
    assert [use.transient for use in memory.phases] == [1024, 4096, 0]
    assert [use.after - use.before for use in memory.phases] == [1024, 0, -1024]
    assert memory.peak_phase.name == "backward"
    assert memory.peak == memory.before + 5120
