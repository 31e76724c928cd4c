"""The cost model against a simulation that allocates and frees on each rank by itself."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moe_groups.memory.group_layout import GroupOnRanks, layout
from moe_groups.memory.step_cost import TEMPORARIES, StepSettings, step_cost


class Memory:
    """Named buffers, and the most that was there at once."""

    def __init__(self) -> None:
        self.buffers: dict[Any, int] = {}
        self.peak = 0

    def make(self, name: Any, size: int) -> None:
        self.buffers[name] = size
        self.peak = max(self.peak, self.now)

    def drop(self, name: Any) -> None:
        self.buffers.pop(name, None)

    @property
    def now(self) -> int:
        return sum(self.buffers.values())


def owners(sizes: tuple[int, ...], ranks: int) -> tuple[int, list[list[int | None]]]:
    """Elements of a partition, and for each partition the parameter of each of its elements."""
    elements: list[int | None] = [i for i, size in enumerate(sizes) for _ in range(size)]
    while len(elements) % (2 * ranks):
        elements.append(None)
    size = len(elements) // ranks
    return size, [elements[rank * size : (rank + 1) * size] for rank in range(ranks)]


def release(memory: Memory, index: int, users: set[int]) -> None:
    """The gradients of a group; those that are views of one buffer, when no group uses it."""
    memory.drop(("grad", index))
    memory.drop(("pad", index))
    if not users:
        for name in [name for name in memory.buffers if name[0] == "whole"]:
            memory.drop(name)


def simulate(
    groups: list[tuple[tuple[int, ...], int, int]], step: StepSettings, first: bool
) -> tuple[int, int]:
    """R and T + R of one rank; groups are sizes, ranks and the partition of this rank.

    T + R does not count the state that the first step creates as a floor.
    """
    memory = Memory()
    mine = [(sizes, *owners(sizes, ranks), own) for sizes, ranks, own in groups]
    users: set[int] = set()
    if step.wrapper == "bf16_optimizer":
        if step.keeps_low_precision:
            memory.make("low", step.weight_bytes * sum(sum(sizes) for sizes, *_ in mine))
    else:
        for index, (sizes, size, parts, own) in enumerate(mine):
            touching = {owner for owner in parts[own] if owner is not None}
            padding = sum(owner is None for owner in parts[own])
            if step.compact:
                memory.make(("grad", index), step.grad_bytes * size)
                continue
            memory.make(("pad", index), step.grad_bytes * padding)
            for owner in touching:
                memory.make(("whole", index, owner), step.grad_bytes * sizes[owner])
                users.add(index)
    held = memory.now
    for _, _, parts, own in mine if step.wrapper == "zero" else []:
        for piece in set(parts[own]) - {None}:
            memory.make("norm", 8 * parts[own].count(piece))
            memory.drop("norm")
    for index, (_, size, parts, own) in enumerate(mine):
        if step.wrapper == "zero":
            converts = step.grad_bytes != step.master_bytes
            flattens = not step.compact and len(set(parts[own])) > 1
            if flattens:
                memory.make("flat", step.grad_bytes * size)
            if converts:
                memory.make("converted", step.master_bytes * size)
                memory.drop("flat")
            users.discard(index)
            if converts or flattens:
                release(memory, index, users)
        if first:
            memory.make(("state", index), 2 * step.master_bytes * size)
        memory.make("temporaries", step.temporaries * step.master_bytes * size)
        memory.drop("temporaries")
        memory.drop("converted")
        memory.drop("flat")
        if step.wrapper == "zero":
            release(memory, index, users)
    for _, size, parts, _ in mine if step.gather_copies else []:
        if len(parts) > 1:
            memory.make("gather", step.weight_bytes * size * len(parts))
            memory.drop("gather")
    return held, memory.peak


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, list[tuple[tuple[int, ...], int]]]:
    """A world size, and groups as sizes and expert-parallel size (1 for dense)."""
    world = draw(st.sampled_from([1, 2, 4, 6, 8]))
    sizes = st.lists(st.integers(1, 30), min_size=1, max_size=6).map(tuple)
    parallel = st.sampled_from([n for n in (1, 2, 4) if world % n == 0])
    return world, draw(st.lists(st.tuples(sizes, parallel), min_size=1, max_size=5))


SETTINGS = st.builds(
    StepSettings,
    wrapper=st.sampled_from(["zero", "bf16_optimizer"]),
    temporaries=st.sampled_from(list(TEMPORARIES.values())),
    grad_bytes=st.sampled_from([2, 4]),
    compact=st.booleans(),
    keeps_low_precision=st.booleans(),
    master_bytes=st.sampled_from([2, 4]),
    gather_copies=st.booleans(),
)


@given(worlds(), SETTINGS, st.booleans())
@settings(max_examples=300)
def test_every_rank_costs_what_the_simulation_says(
    case: tuple[int, list[tuple[tuple[int, ...], int]]], step: StepSettings, first: bool
) -> None:
    world, groups = case
    ranks = np.arange(world)
    cost = step_cost(
        [GroupOnRanks(sizes, ranks // ep, world // ep) for sizes, ep in groups], step, first
    )
    for rank in range(world):
        own = [(sizes, world // ep, rank // ep) for sizes, ep in groups]
        held, peak = simulate(own, step, first)
        assert (cost.held[rank], cost.peak[rank]) == (held, peak)
        assert cost.transient[rank] == peak - held


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 4))),
    SETTINGS,
)
def test_groups_with_a_count_cost_as_much_as_one_by_one(
    counted: list[tuple[list[int], int]], step: StepSettings
) -> None:
    ranks = np.arange(4)
    groups = [GroupOnRanks((7, 3), ranks, 4)]
    groups += [GroupOnRanks(tuple(sizes), ranks, 4, count) for sizes, count in counted]
    single = [replace(group, count=1) for group in groups for _ in range(group.count)]
    together, one_by_one = step_cost(groups, step), step_cost(single, step)
    assert together.peak.tolist() == one_by_one.peak.tolist()
    assert together.held.tolist() == one_by_one.held.tolist()


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 20_000), min_size=1, max_size=4), st.integers(1, 4)),
        min_size=1,
        max_size=6,
    ),
    SETTINGS,
    st.integers(1, 4),
)
def test_lean_step_takes_no_more_than_the_tile(
    counted: list[tuple[list[int], int]], step: StepSettings, tiles: int
) -> None:
    """Whatever the groups are; and equal groups together cost what they cost one by one."""
    tile = 12 * 1024 * tiles
    zero = step.wrapper == "zero"
    lean = replace(step, tile_bytes=tile, compact=zero, keeps_low_precision=False)
    ranks = np.arange(4)
    groups = [GroupOnRanks(tuple(sizes), ranks, 4, count) for sizes, count in counted]
    cost = step_cost(groups, lean)
    elements = sum(group.count * group.layout.partition for group in groups)
    assert cost.held.tolist() == [lean.grad_bytes * elements if zero else 0] * 4
    assert cost.transient.max() <= tile
    single = [replace(group, count=1) for group in groups for _ in range(group.count)]
    for first in (False, True):
        one_by_one = step_cost(single, lean, first)
        if not first:
            assert one_by_one.peak.tolist() == cost.peak.tolist()
        state = lean.state_bytes * (elements + tile // 12)
        assert one_by_one.transient.max() <= tile + (state if first else 0)


def test_layout_by_hand() -> None:
    """Sizes 6 + 3 on 2 ranks: 12 elements with padding, 6 each; the second has 3 of padding."""
    found = layout((6, 3), 2)
    assert found.partition == 6
    assert found.touched.tolist() == [6, 3]
    assert found.padding.tolist() == [0, 3]
    assert found.tensors.tolist() == [1, 2]
    assert found.largest_slice.tolist() == [6, 3]


@pytest.mark.parametrize(
    ("temporaries", "bytes_per_element"), [("for-loop", 12), ("foreach", 8), ("fused", 6)]
)
def test_one_big_group_costs_what_the_design_measured(
    temporaries: str, bytes_per_element: int
) -> None:
    """12, 8 and 6 P on top of R for all groups but the last."""
    group = GroupOnRanks((40, 40), np.arange(1), 1)
    step = StepSettings(temporaries=TEMPORARIES[temporaries])
    cost = step_cost([group, group], step)
    assert cost.group_peaks[0] - cost.held[0] == bytes_per_element * 80
