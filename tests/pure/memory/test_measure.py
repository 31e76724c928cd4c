"""Measured memory is exact: known allocations, and what the gradients of a model hold."""

import gc
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch._subclasses import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from moe_groups.errors import InvalidArgumentError, MeasurementError, MoEGroupsError
from moe_groups.memory import recorders as memory_recorders
from moe_groups.memory.measure import (
    MeasuredStep,
    measure_iteration_memory,
    measure_step_memory,
)
from moe_groups.memory.recorders import CUDARecorder, replay


@pytest.fixture(autouse=True)
def _no_garbage_of_other_tests() -> None:
    """It may hold tensors, and a collection inside of a region would count as their release."""
    gc.collect()


def block(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


def measured(code: Callable[[], Any]) -> MeasuredStep:
    """``code`` measured; what it returns is released inside."""
    with measure_step_memory("cpu") as memory:
        code()
    return memory


def figures(memory: MeasuredStep) -> tuple[int, int, int]:
    return memory.transient, memory.held, memory.kept


def test_nothing() -> None:
    memory = measured(lambda: None)
    assert figures(memory) == (0, 0, 0)
    assert memory.before == memory.peak == memory.after


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(k, marks=pytest.mark.long) for k in range(1, 6))]
)
def test_garbage_that_is_collected_at_any_time(part: int) -> None:
    """In the region or after it, even while the measurement ends."""
    thresholds = gc.get_threshold()
    try:
        for wait in range(1 + part, 150, 6):
            gc.disable()
            cycle: list[Any] = [block(40)]
            cycle.append(cycle)
            with measure_step_memory("cpu") as memory:
                del cycle
                gc.set_threshold(gc.get_count()[0] + wait)
                gc.enable()
            gc.set_threshold(*thresholds)
            assert memory.kept == 0
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()


def test_made_and_dropped() -> None:
    assert figures(measured(lambda: block(1000))) == (1000, 0, 0)


def test_kept_and_released() -> None:
    old, new = [block(5000)], []
    with measure_step_memory() as memory:
        new.append(block(300))
        old.clear()
        block(4000)
    assert figures(memory) == (300, 5000, 300)
    assert memory.step_peak == 5300
    assert memory.after == memory.before - 4700
    with measure_step_memory() as memory:
        new.append(block(1))
        new.clear()
    assert figures(memory) == (1, 300, 0)


def test_release_in_the_middle_lowers_a_later_peak() -> None:
    old = [block(1000), block(2000)]
    with measure_step_memory() as memory:
        block(500)
        old.pop()
        block(2400)
        old.pop()
    assert figures(memory) == (500, 3000, 0)


def test_before_counts_each_storage_once() -> None:
    empty = measured(lambda: None).before
    base = block(1000)
    others = [
        base.view(10, 100),
        base[500:],
        base.detach(),
        block(0),
        torch.empty(9, device="meta"),
    ]
    assert measured(lambda: None).before - empty == 1000
    with measure_step_memory() as memory:
        del base
    assert figures(memory) == (0, 0, 0)
    with measure_step_memory() as memory:
        others.clear()
    assert figures(memory) == (0, 1000, 0)


def test_storage_is_what_counts_not_the_view() -> None:
    view = [block(1000)[:10]]
    with measure_step_memory() as memory:
        view.clear()
    assert figures(memory) == (0, 1000, 0)


def test_memory_that_is_not_the_allocators() -> None:
    """A storage that shares its memory with another one, or with numpy, frees nothing."""
    base = block(1000)
    tensors = [torch.from_numpy(base.numpy()), torch.from_numpy(np.ones(50))]
    assert tensors[0].untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    with measure_step_memory() as memory:
        tensors.clear()
    assert figures(memory) == (0, 0, 0)
    with measure_step_memory() as memory:
        del base
    assert figures(memory) == (0, 1000, 0)


def test_subclasses() -> None:
    class Odd(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise AssertionError

    with FakeTensorMode():
        fake = torch.empty(100)
    odd = [block(1000).as_subclass(Odd)]
    with measure_step_memory() as memory:
        odd.clear()
        del fake
    assert figures(memory) == (0, 1000, 0)


def test_resized_storage() -> None:
    tensor = block(1000)
    with measure_step_memory() as memory:
        tensor.resize_(4000)
    assert figures(memory) == (4000, 1000, 4000)
    with measure_step_memory() as memory:
        tensor.untyped_storage().resize_(0)
    assert figures(memory) == (0, 4000, 0)


def test_temporaries_inside_kernels() -> None:
    x = torch.ones(1000)
    assert figures(measured(lambda: torch.cat([x, x, x]))) == (12_000, 0, 0)
    assert figures(measured(lambda: torch._foreach_sqrt([x, x]))) == (8_000, 0, 0)
    assert figures(measured(lambda: x.bfloat16().neg())) == (2_000 + 2_000, 0, 0)
    # Not in Python's sight: a copy in the other dtype, and one to partition.
    assert figures(measured(lambda: x.sum(dtype=torch.float64))) == (8_000 + 8, 0, 0)
    assert figures(measured(lambda: x.median())) == (4_000 + 4, 0, 0)
    assert measured(lambda: x.sort()).transient > 4_000 + 8_000  # more than its results


def test_gradients_that_only_cpp_holds() -> None:
    weight = torch.ones(1000, requires_grad=True)
    weight.sum().backward()  # no Python object stands for weight.grad
    with measure_step_memory() as memory:
        weight.grad = None
    assert figures(memory) == (0, 4000, 0)


def test_sparse_gradients() -> None:
    table = torch.nn.Embedding(100, 8, sparse=True)
    table(torch.tensor([3, 7])).sum().backward()
    with measure_step_memory() as memory:
        table.weight.grad = None
    assert figures(memory) == (0, 2 * 8 * 4 + 2 * 8, 0)


def test_objects_that_gc_froze() -> None:
    def local() -> MeasuredStep:
        old = [block(700), {"deep": (block(60),)}]
        weight = torch.ones(1000, requires_grad=True)
        weight.sum().backward()
        alone = block(9)
        gc.freeze()
        with measure_step_memory() as memory:
            old.clear()
            del alone
            weight.grad = None
        return memory

    try:
        assert figures(local()) == (0, 4769, 0)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("foreach", [True, False])
def test_adamw(foreach: bool) -> None:
    """The gradients are R, the state is kept by the first step only, T is the temporaries."""
    sizes = [3000, 1000]
    params = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
    optimizer = torch.optim.AdamW(params, foreach=foreach)

    def iteration() -> MeasuredStep:
        sum(param.sum() for param in params).backward()  # type: ignore[union-attr]
        with measure_step_memory() as memory:
            optimizer.step()
            optimizer.zero_grad()
        return memory

    first, second = iteration(), iteration()
    assert first.held == second.held == 4 * sum(sizes)
    assert first.kept == 8 * sum(sizes) + 4 * len(params)  # with a step count in fp32 each
    assert second.kept == 0
    largest = sum(sizes) if foreach else max(sizes)
    assert 4 * largest <= second.transient <= 8 * largest + 100
    assert first.step_peak >= second.step_peak


def test_parts_add_up() -> None:
    """Powers of two, so that a wrong figure says which block it is about."""
    old = [block(2**n) for n in range(8)]
    new = []
    with measure_step_memory() as memory:
        for n in (1, 5, 6):
            old[n] = block(0)
            new.append(block(2 ** (n + 10)))
        new.pop()
    assert memory.held == 2 + 32 + 64
    assert memory.kept == 2**11 + 2**15
    assert memory.transient == 2**11 + 2**15 + 2**16 - 2 - 32 - 64


def in_thread(code: Callable[[], Any]) -> None:
    thread = threading.Thread(target=code)
    thread.start()
    thread.join()


def test_other_threads() -> None:
    """Their blocks count too, and it does not matter which thread releases one."""
    kept: list[torch.Tensor] = []
    with measure_step_memory() as memory:
        in_thread(lambda: kept.append(block(1000)))
    assert figures(memory) == (1000, 0, 1000)
    with measure_step_memory() as memory:
        kept.append(block(300))
        in_thread(kept.pop)
        block(400)
        kept.clear()  # made there, released here
    assert figures(memory) == (400, 1000, 0)
    kept.append(block(500))
    with measure_step_memory() as memory:
        in_thread(kept.clear)
    assert figures(memory) == (0, 500, 0)


def test_nothing_is_left_behind() -> None:
    """The allocator's table of sizes is as it was, or a later profiler would read old sizes."""
    old = [block(1000) for _ in range(3)]
    with measure_step_memory() as memory:
        old.append(block(2000))
    assert memory.kept == 2000
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        old.clear()
        block(70)
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    assert [e.nbytes() for e in events if e.name() == "[memory]"] == [70, -70]


def test_figures_are_known_after_the_block() -> None:
    with measure_step_memory() as memory, pytest.raises(MeasurementError, match="after the with"):
        _ = memory.transient
    assert isinstance(memory.transient, int)
    assert pickle.loads(pickle.dumps(memory)).step_peak == memory.step_peak
    assert not hasattr(memory, "reserved")


def fail() -> None:
    raise ZeroDivisionError


def test_error_in_the_block() -> None:
    with pytest.raises(ZeroDivisionError), measure_step_memory() as memory:
        fail()
    assert not torch._C._autograd._profiler_enabled()
    with pytest.raises(MeasurementError, match="without an error"):
        _ = memory.held
    with pytest.raises(ZeroDivisionError), measure_iteration_memory() as iteration:  # noqa: SIM117
        with iteration.phase("forward"):
            fail()
    assert figures(measured(lambda: block(10))) == (10, 0, 0)


def test_nested() -> None:
    with measure_step_memory() as outer:
        with pytest.raises(MeasurementError, match="inside another"), measure_step_memory():
            pass
        block(1000)
    assert outer.transient == 1000


def test_inside_a_profiler() -> None:
    with (
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        pytest.raises(MeasurementError, match="profiler is running"),
        measure_step_memory("cpu"),
    ):
        pass
    assert profiler.events() is not None
    assert figures(measured(lambda: block(10))) == (10, 0, 0)


def test_profiler_of_another_thread() -> None:
    running, measured_it = threading.Event(), threading.Event()

    def other() -> None:
        with profile(activities=[ProfilerActivity.CPU]):
            running.set()
            measured_it.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    running.wait(60)
    try:
        with pytest.raises(MeasurementError), measure_step_memory("cpu"):
            pass
    finally:
        measured_it.set()
        thread.join()


def test_profiler_inside() -> None:
    with (
        pytest.raises(MeasurementError, match="ran inside"),
        measure_step_memory("cpu"),
        profile(activities=[ProfilerActivity.CPU]),
    ):
        pass
    assert figures(measured(lambda: block(10))) == (10, 0, 0)


@pytest.mark.parametrize("device", ["meta", "nothing", "cuda:99"])
def test_device_that_cannot_be_measured(device: str) -> None:
    with pytest.raises(InvalidArgumentError, match=device), measure_step_memory(device):
        pass
    assert issubclass(MeasurementError, MoEGroupsError)


def test_str_names_the_figures() -> None:
    old = [block(5000)]
    with measure_step_memory() as memory:
        new = block(3000)
        old.clear()
    text = str(memory)
    assert "T + R = 8,000 bytes (transient T 3,000, held R 5,000)" in text
    assert f"kept {new.numel():,}" in text


def test_phases() -> None:
    with measure_iteration_memory("cpu") as memory:
        a = block(1000)
        with memory.phase("forward") as forward:
            b = block(200)
            block(30)
        with memory.phase("backward"):
            block(4000)
            del a
        with memory.phase("step"):
            del b
            block(100)
    between, *phases = memory.phases
    assert between.after == between.before + 1000
    assert [use.name for use in phases] == ["forward", "backward", "step"]
    assert phases[0] is forward
    assert [use.transient for use in phases] == [230, 4000, 0]
    assert [use.after - use.before for use in phases] == [200, -1000, -200]
    assert memory.peak_phase.name == "backward"
    assert memory.peak == memory.before + 5200
    assert memory.after == memory.before
    rows = str(memory).splitlines()[2:]
    assert ["<- peak" in row for row in rows] == [False, False, True, False]
    for earlier, later in zip(memory.phases, memory.phases[1:], strict=False):
        assert earlier.after == later.before


def test_iteration_without_phases() -> None:
    with measure_iteration_memory() as memory:
        kept = block(10)
    assert memory.peak - memory.before == kept.numel()
    with measure_iteration_memory() as memory:
        pass
    assert memory.peak == memory.before == memory.after
    assert str(memory)


def test_phases_out_of_turn() -> None:
    with measure_iteration_memory() as memory, memory.phase("forward"):
        with pytest.raises(MeasurementError, match=r"'step' begins inside phase 'forward'"):
            memory.phase("step").__enter__()
        with pytest.raises(MeasurementError, match="after the with block"):
            _ = memory.peak
    with pytest.raises(MeasurementError, match="after the iteration"):
        memory.phase("step").__enter__()


def test_phases_repeat() -> None:
    with measure_iteration_memory() as memory:
        for size in (10, 300, 20):
            with memory.phase("forward"):
                block(size)
    assert [use.transient for use in memory.phases] == [10, 300, 20]
    assert memory.peak_phase is memory.phases[1]


class CachingAllocator:
    """Stands for CUDA's: CPU storages, and which of them it counts as allocated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: list[torch.UntypedStorage] = []
        self.blocks: dict[int, int] = {}
        self.peak = 0
        monkeypatch.setattr(memory_recorders, "live_storages", lambda _: list(self.known))
        for name, stand_in in {
            "memory_allocated": lambda _: sum(self.blocks.values()),
            "max_memory_allocated": lambda _: max(self.peak, sum(self.blocks.values())),
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", 0),
            "memory_snapshot": self.snapshot,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def snapshot(self) -> list[dict[str, Any]]:
        blocks = [
            {"address": address, "size": size, "state": "active_allocated"}
            for address, size in self.blocks.items()
        ]
        blocks.append({"address": 1, "size": 512, "state": "inactive"})
        return [{"device": 0, "blocks": blocks}, {"device": 1, "blocks": blocks[:1]}]


def test_cuda_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is released if it is gone, and if another one has its address now."""
    cuda = CachingAllocator(monkeypatch)
    cuda.known = [block(size).untyped_storage() for size in (500, 1000, 2000)]
    stays, moved, released = (storage.data_ptr() for storage in cuda.known)
    cuda.blocks = {stays: 512, moved: 1024, released: 2048, 7: 4096}
    recorder = CUDARecorder(torch.device("cuda", 0))
    recorder.start()
    del cuda.known[1:]
    cuda.peak = 9000
    del cuda.blocks[released], cuda.blocks[7]
    recorder.mark()
    cuda.blocks[8] = 512
    recorder.mark()
    first, second = recorder.stop().segments
    assert (first.begin, first.peak, first.end) == (7680, 9000, 1536)
    assert (second.begin, second.peak, second.end) == (1536, 2048, 2048)
    assert recorder.stop().released == 1024 + 2048 + 4096


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 100)), max_size=40))
def test_replay_is_plain_bookkeeping(actions: list[tuple[bool, int, int]]) -> None:
    """Against sets of blocks that are there at each moment; half of the actions come before."""
    events, moments, total = list[tuple[int, int, int]](), [dict[int, tuple[int, int]]()], 1000
    half = len(actions) // 2
    for time, (free, slot, size) in enumerate(actions):
        now = dict(moments[-1])
        if free:
            if slot in now:
                size = now.pop(slot)[1]
                total -= size
                events.append((slot, -size, total))
        elif slot not in now:
            now[slot] = time, size
            total += size
            events.append((slot, size, total))
        moments.append(now)
        if time == half:
            begin, first = len(moments) - 1, len(events)
    if not actions:
        return
    at = events[first - 1][2] if first else 1000
    marks = [[(99, 1, level + 1), (99, -1, level)] for level in (at, total)]
    (segment,), freed, left = replay([*events[:first], *marks[0], *events[first:], *marks[1]], 99)
    assert set(left) == set(moments[-1])
    totals = [sum(size for _, size in now.values()) for now in moments[begin:]]
    assert segment == (totals[0], max(totals), totals[-1])
    assert freed == {slot for slot, was in moments[begin].items() if moments[-1].get(slot) != was}
