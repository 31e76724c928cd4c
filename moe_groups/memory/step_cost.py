"""What one optimizer step allocates and releases, from sizes alone: pure integers.

Follows ``DeepSpeedZeroOptimizer.step`` (``deepspeed/runtime/zero/stage_1_and_2.py``) and
``BF16_Optimizer.step`` (``deepspeed/runtime/bf16_optimizer.py``) allocation by
allocation. All ranks of a data-parallel world are computed at once, as numpy vectors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from moe_groups._deepspeed.step.gathering import bucket_bytes, buckets, buffer_size
from moe_groups._deepspeed.step.tiles import batches, elements_of
from moe_groups.memory.group_layout import GroupOnRanks, Ints

Wrapper: TypeAlias = Literal["zero", "bf16_optimizer"]

MASTER = 4
"""Bytes of an fp32 element."""
NORM = 8
"""Bytes of an element while its norm is taken: ZeRO's norms accumulate in fp64."""
TEMPORARIES = {"for-loop": 2, "foreach": 1, "fused": 0}
"""Copies of its partition that AdamW allocates beside its state (``torch/optim/adam.py``)."""
MOMENTS = 2
"""Tensors of AdamW's state, each in the dtype and size of the partition."""


@dataclass(frozen=True, slots=True)
class StepSettings:
    """What decides the cost of a step besides the groups.

    Attributes:
        wrapper: DeepSpeed's ZeRO-1/2 optimizer or ``BF16_Optimizer``.
        temporaries: copies of a partition that the optimizer allocates beside its state.
        weight_bytes: bytes of an element of the model's weights.
        grad_bytes: bytes of an element of the accumulated gradients.
        compact: gradients are kept as exact partitions of the groups
            (:func:`compact_gradients`, or fp32 accumulation, where DeepSpeed does so itself).
        keeps_low_precision: ``BF16_Optimizer`` without ``immediate_grad_update`` holds the
            bf16 gradients of all parameters until the step ends.
        gather_copies: the all-gather copies what it receives (gloo does, NCCL does not).
        master_bytes: bytes of an element of the master weights, and so of the gradients and
            moments that the optimizer works with.
        tile_bytes: of :func:`lean_step`; 0 without it.
    """

    wrapper: Wrapper = "zero"
    temporaries: int = TEMPORARIES["foreach"]
    weight_bytes: int = 2
    grad_bytes: int = 2
    compact: bool = False
    keeps_low_precision: bool = False
    gather_copies: bool = False
    master_bytes: int = MASTER
    tile_bytes: int = 0

    @property
    def tile(self) -> int:
        """Elements of a tile of :func:`lean_step`."""
        return elements_of(self.tile_bytes)

    @property
    def upcast_bytes(self) -> int:
        """Bytes per element of the copy of the gradients that has the master weights' dtype."""
        return 0 if self.grad_bytes == self.master_bytes else self.master_bytes

    @property
    def temporary_bytes(self) -> int:
        """Bytes per element that the optimizer allocates beside its state."""
        return self.temporaries * self.master_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes per element of optimizer state."""
        return MOMENTS * self.master_bytes


@dataclass(slots=True)
class StepCost:
    """The cost of a step on each rank, in bytes; vectors have an entry per rank.

    Attributes:
        held: R, gradients held when the step begins.
        peak: T + R, the peak above what remains afterwards without new state.
        phase: index into ``phases`` of what sets the peak.
        group: index of the group that sets it; -1 for none.
        group_peaks: the peak while each group is stepped, worst rank.
    """

    held: Ints
    peak: Ints
    phase: Ints
    group: Ints
    group_peaks: list[int] = field(default_factory=list)

    @property
    def transient(self) -> Ints:
        """T: what is allocated on top of the gradients held at the beginning."""
        return self.peak - self.held

    def raise_to(self, bytes_: Ints, phase: int, group: int) -> None:
        """Note that ``bytes_`` are allocated at the same time, above the floor."""
        higher = bytes_ > self.peak
        self.peak = np.where(higher, bytes_, self.peak)
        self.phase = np.where(higher, phase, self.phase)
        self.group = np.where(higher, group, self.group)


PHASES = ("gradients held", "norm", "flatten and upcast", "optimizer", "all-gather")
_HELD, _NORM, _UPCAST, _OPTIMIZER, _GATHER = range(len(PHASES))


def step_cost(
    groups: Sequence[GroupOnRanks], settings: StepSettings, first: bool = False
) -> StepCost:
    """The cost of one step over ``groups``, in their order.

    Args:
        first: the step that creates the optimizer's state; needs groups of count 1.
    """
    assert groups
    assert not first or all(group.count == 1 for group in groups)
    if settings.wrapper == "bf16_optimizer":
        return _bf16_optimizer(groups, settings, first)
    return (_lean_zero if settings.tile_bytes else _zero)(groups, settings, first)


def _begin(held: Ints) -> StepCost:
    nothing = np.zeros_like(held)
    return StepCost(held, held, nothing, nothing - 1)


def _zero(groups: Sequence[GroupOnRanks], settings: StepSettings, first: bool) -> StepCost:
    """ZeRO-1 and ZeRO-2: the norm of all, group after group, then the all-gather."""
    own, shared, last_user = _gradients(groups, settings)
    now = shared + sum(group.count * part for group, part in zip(groups, own, strict=True))
    cost = _begin(now)
    for index, group in enumerate(groups):
        slices = group.layout.largest_slice[group.partition_of]
        cost.raise_to(now + NORM * slices, _NORM, index)
    state, flat = 0, np.zeros_like(now)
    for index, group, copies, final in _in_turn(groups):
        partition = group.layout.partition
        upcast = settings.upcast_bytes * partition
        if not settings.compact:  # one tensor alone is not copied to be flattened
            several = group.layout.tensors[group.partition_of] > 1
            flat = np.where(several, settings.grad_bytes * partition, 0)
        before = now + flat + upcast + state
        cost.raise_to(before, _UPCAST, index)
        last = np.where((last_user == index) & final, shared, 0)
        state += settings.state_bytes * partition if first else 0
        copied = np.full_like(flat, upcast) if upcast else flat
        during = now + copied + settings.temporary_bytes * partition + state
        # Once a copy is made, the gradients are released.
        during = during - np.where(copied > 0, own[index] + last, 0)
        cost.raise_to(during, _OPTIMIZER, index)
        now = now - copies * own[index] - last
        cost.group_peaks.append(int(np.max(np.maximum(before, during))))
    _gather(cost, groups, settings, now + state)
    return cost


def _lean_zero(groups: Sequence[GroupOnRanks], settings: StepSettings, first: bool) -> StepCost:
    """ZeRO-1 and ZeRO-2 with :func:`lean_step`: batches of small groups, tiles of large ones."""
    ranks, tile = len(groups[0].partition_of), settings.tile
    single = [index for index, group in enumerate(groups) for _ in range(group.count)]
    sizes = [groups[index].layout.partition for index in single]
    now = np.full(ranks, settings.grad_bytes * sum(sizes), dtype=np.int64)
    cost = _begin(now)
    for index, group in enumerate(groups):
        cost.raise_to(now + NORM * min(group.layout.partition, tile), _NORM, index)
    state, upcast = 0, settings.upcast_bytes
    peaks = [0] * len(groups)
    for batch in batches(sizes, tile):
        copied, step = 0, now
        for place in batch:  # copies are made one by one, and gradients released
            working = min(sizes[place], tile)
            copied += upcast * working
            peaks[single[place]] = int((step + copied + state).max())
            cost.raise_to(step + copied + state, _UPCAST, single[place])
            if upcast and working == sizes[place]:
                step = step - settings.grad_bytes * sizes[place]
        for place in batch:
            working = min(sizes[place], tile)
            state += settings.state_bytes * sizes[place] if first else 0
            during = step + copied + settings.temporary_bytes * working + state
            if first:
                during = during + _fresh(sizes[place], working, settings)
            peaks[single[place]] = max(peaks[single[place]], int(during.max()))
            cost.raise_to(during, _OPTIMIZER, single[place])
        now = now - settings.grad_bytes * sum(sizes[place] for place in batch)
    cost.group_peaks = peaks
    _gather(cost, groups, settings, now + state)
    return cost


def _fresh(partition: int, tile: int, settings: StepSettings) -> int:
    """What the first step takes for the state of a tile, before it is part of the group's.

    The first tile's is there while that of the group is made, but no temporaries are then.
    """
    if tile == partition:
        return 0
    second = min(tile, partition - tile)
    idle = (settings.upcast_bytes + settings.temporary_bytes) * (tile - second)
    first = settings.state_bytes * tile - settings.temporary_bytes * tile
    return max(first, settings.state_bytes * second - idle)


def _in_turn(groups: Sequence[GroupOnRanks]) -> Iterator[tuple[int, GroupOnRanks, int, bool]]:
    """``(index, group, copies, whether the last is among them)``.

    Of equal groups all but the last are taken at once: the first of them needs the most, since
    each releases its gradients, and only the last may release what all groups share.
    """
    for index, group in enumerate(groups):
        if group.count > 1:
            yield index, group, group.count - 1, False
        yield index, group, 1, True


def _gradients(
    groups: Sequence[GroupOnRanks], settings: StepSettings
) -> tuple[list[Ints], Ints, Ints]:
    """Bytes that each group holds alone, bytes that all share, and the group that releases those.

    Without exact partitions the gradients of a rank are pieces of one buffer
    (``grads_in_partition``), which exists until the last group with a piece of it has stepped;
    only tensors of padding belong to one group.
    """
    ranks = len(groups[0].partition_of)
    own: list[Ints] = []
    touched = np.zeros(ranks, dtype=np.int64)
    last_user = np.full(ranks, -1)
    for index, group in enumerate(groups):
        if settings.compact:
            exact = settings.grad_bytes * group.layout.partition
            own.append(np.full(ranks, exact, dtype=np.int64))
            continue
        own.append(settings.grad_bytes * group.layout.padding[group.partition_of])
        mine = group.count * group.layout.touched[group.partition_of]
        touched = touched + mine
        last_user = np.where(mine > 0, index, last_user)
    return own, settings.grad_bytes * touched, last_user


def _bf16_optimizer(
    groups: Sequence[GroupOnRanks], settings: StepSettings, first: bool
) -> StepCost:
    """BF16_Optimizer: fp32 gradients stay, and the optimizer steps over all groups at once."""
    ranks = len(groups[0].partition_of)
    elements = sum(group.count * sum(group.sizes) for group in groups)
    low = settings.weight_bytes * elements if settings.keeps_low_precision else 0
    now = np.full(ranks, low, dtype=np.int64)
    cost = _begin(now)
    state = 0
    for index, group in enumerate(groups):
        partition = group.layout.partition
        state += settings.state_bytes * partition if first else 0
        working = min(partition, settings.tile) if settings.tile_bytes else partition
        during = now + settings.temporary_bytes * working + state
        if first:
            during = during + _fresh(partition, working, settings)
        cost.raise_to(during, _OPTIMIZER, index)
        cost.group_peaks.append(int(during.max()))
    _gather(cost, groups, settings, now + state)
    return cost


def _gather(
    cost: StepCost, groups: Sequence[GroupOnRanks], settings: StepSettings, now: Ints
) -> None:
    if settings.tile_bytes:
        _gather_in_buckets(cost, groups, settings, now)
    elif settings.gather_copies:
        for index, group in enumerate(groups):
            if group.ranks > 1:
                whole = settings.weight_bytes * group.ranks * group.layout.partition
                cost.raise_to(now + whole, _GATHER, index)


def _gather_in_buckets(
    cost: StepCost, groups: Sequence[GroupOnRanks], settings: StepSettings, now: Ints
) -> None:
    copies, bytes_ = settings.gather_copies, settings.weight_bytes
    sharing: dict[tuple[int, bytes], list[tuple[int, int]]] = {}
    for index, group in enumerate(groups):
        if group.ranks > 1:
            owner = group.ranks, group.partition_of.tobytes()
            partitions = [(index, group.layout.partition)] * group.count
            sharing.setdefault(owner, []).extend(partitions)
    released = settings.grad_bytes if settings.wrapper == "zero" else 0
    buffer = copied = 0
    for (ranks, _), partitions in sharing.items():
        most = bucket_bytes(settings.tile_bytes, released, partitions)
        for bucket in buckets(partitions, ranks, bytes_, most, copies):
            if len(bucket) > 1 or copies:
                buffer = max(buffer, bytes_ * buffer_size(bucket, ranks))
            if copies:
                elements = sum(piece.end - piece.start for piece in bucket)
                copied = max(copied, bytes_ * ranks * elements)
    cost.raise_to(now + buffer + copied, _GATHER, -1)
