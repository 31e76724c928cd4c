"""Predict what ``engine.step()`` allocates and holds, for groups or a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch

from moe_groups._common.arguments import Count, checked
from moe_groups._common.text import show_bytes
from moe_groups._deepspeed.engines import known_engines
from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.inputs import made_groups
from moe_groups.memory.step_config import StepConfig, step_of
from moe_groups.tags import get_expert_tag, numel_of
from moe_groups.topology import sharing_ranks, world_size

if TYPE_CHECKING:
    from moe_groups.memory.group_layout import GroupOnRanks


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """One group's part.

    Attributes:
        name: the group's name.
        elements: of all its parameters, without padding.
        ranks: ranks that share it.
        partition: elements of one rank's partition, padding included.
        held: bytes of gradients that the worst rank holds for it when the step begins.
        peak: bytes above the floor while it is stepped, worst rank.
    """

    name: str
    elements: int
    ranks: int
    partition: int
    held: int
    peak: int


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What :func:`estimate_step_memory` returns; bytes, of the worst rank unless said.

    Attributes:
        transient: T, allocated on top of what is there when the step begins.
        held: R, gradients that are there when it begins and released by its end.
        step_peak: T + R, the peak above what stays.
        first_step_peak: the same in the first step, with the optimizer's state created in it.
        phase: what sets the peak.
        group: name of the group that sets it.
        worst_rank: in the data-parallel world, or of it times ``step.tensor_ranks``.
        least: step peak of the rank that needs least.
        resident: what stays between steps, by kind.
        host: the same on the host, if the optimizer is offloaded.
        groups: one row for each group, in order.
        step: how the model is stepped.
        data_parallel_size: ranks of the data-parallel world.
        rank_peaks: step peak of each of these ranks.
    """

    transient: int
    held: int
    step_peak: int
    first_step_peak: int
    phase: str
    group: str
    worst_rank: int
    least: int
    resident: dict[str, int]
    host: dict[str, int]
    groups: list[GroupMemory]
    step: StepConfig
    data_parallel_size: int
    rank_peaks: list[int] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        rest = ", ".join(f"{kind} {show_bytes(size)}" for kind, size in self.resident.items())
        lines = [
            f"step peak T + R   {show_bytes(self.step_peak):>10}   on the worst of "
            f"{len(self.rank_peaks)} ranks (rank {self.worst_rank}; the least needs "
            f"{show_bytes(self.least)})",
            f"  T, transient    {show_bytes(self.transient):>10}   set by: {self.phase}"
            + (f", {self.group}" if self.group else ""),
            f"  R, gradients    {show_bytes(self.held):>10}   held when the step begins",
            f"first step        {show_bytes(self.first_step_peak):>10}   creates optimizer state",
            f"resident          {show_bytes(sum(self.resident.values())):>10}   {rest}",
        ]
        if self.host:
            host = ", ".join(f"{kind} {show_bytes(size)}" for kind, size in self.host.items())
            lines.append(f"on the host       {show_bytes(sum(self.host.values())):>10}   {host}")
        return "\n".join([f"{len(self.groups)} groups, {self.step.label}", *lines])


SizedGroup: TypeAlias = tuple[str, tuple[int, ...], str | None]
"""Name of a group, elements of each of its parameters, and its parallel group."""


@runtime_checkable
class Planned(Protocol):
    """Groups that were planned for a number of ranks, before any optimizer exists."""

    step: StepConfig
    data_parallel_size: int

    def sized(self) -> list[SizedGroup]:
        """The groups in their order."""
        ...


@checked
def estimate_step_memory(
    groups: Any, *, step: StepConfig | None = None, data_parallel_size: Count | None = None
) -> StepMemory:
    """Predict the memory of ``engine.step()`` on every rank, before any engine exists.

    Follows DeepSpeed 0.19.8 allocation by allocation
    (``deepspeed/runtime/zero/stage_1_and_2.py``, ``deepspeed/runtime/bf16_optimizer.py``);
    measured peaks differ by some hundred bytes of scalars.

    Args:
        groups: group dicts from :func:`create_moe_param_groups` or DeepSpeed's split, the
            optimizer over them (before ``deepspeed.initialize``), or a
            :class:`ParamGroupPlan`.
        step: wrapper, optimizer and dtypes; None: that of the plan, or of the engine that has
            the parameters, else ZeRO-2, foreach.
        data_parallel_size: ranks that share dense parameters; None: the plan's, or the
            world size of ``torch.distributed``.

    Raises:
        InvalidArgumentError: not groups, the model or its engine is of ZeRO-3, or the number of
            ranks is not known or does not fit the expert-parallel size.

    Example:
        >>> print(estimate_step_memory(groups, data_parallel_size=64))   # doctest: +SKIP
        34 groups, ZeRO-2, foreach, bf16 gradients
        step peak T + R     7.27 GiB   on the worst of 64 ranks ...
    """
    if isinstance(groups, Planned):
        step = step or groups.step
        world = data_parallel_size or groups.data_parallel_size
        named = groups.sized()
    else:
        _check_before_engine(groups)
        made = made_groups(groups)
        step = step_of([param for _, own in made for param in own], step)
        named = _read(made)
        world = data_parallel_world(data_parallel_size)
    return estimate(named, step or StepConfig(), world)


def data_parallel_world(size: int | None) -> int:
    """``size``, or the world size of ``torch.distributed``.

    Raises:
        InvalidArgumentError: neither is known.
    """
    if size is not None:
        return size
    known = world_size()
    if known is not None:
        return known
    raise InvalidArgumentError(
        "the number of ranks is not known yet: pass data_parallel_size, or call "
        "deepspeed.init_distributed() first."
    )


def _check_before_engine(groups: Any) -> None:
    """Refuse an engine and its optimizers, whose groups hold partitions and not parameters."""
    for engine in known_engines():
        if any(groups is part for part in (engine, engine.optimizer, engine.basic_optimizer)):
            StepConfig.from_engine(engine)  # which refuses what has no known cost, as ZeRO-3
            raise InvalidArgumentError(
                "groups: the engine has partitioned them: give those that its optimizer was made "
                "of; without step they are estimated as the engine steps them."
            )


def _read(groups: list[tuple[Mapping[str, Any], list[torch.Tensor]]]) -> list[SizedGroup]:
    """Name, sizes and parallel group of each group with something trainable."""
    found = []
    for index, (group, members) in enumerate(groups):
        params = [param for param in members if param.requires_grad and numel_of(param)]
        name = str(group.get("name") or f"group {index}")
        if params:
            tag = get_expert_tag(params[0], name)
            sizes = tuple(map(numel_of, params))
            found.append((name, sizes, tag.parallel_group if tag else None))
    return found


def estimate(named: Sequence[SizedGroup], step: StepConfig, world: int) -> StepMemory:
    """The estimate for groups given as name, sizes and parallel group."""
    from moe_groups.memory.step_cost import PHASES, step_cost

    if not named:
        raise InvalidArgumentError("there are no groups with trainable parameters to estimate.")
    tiles = [
        on_ranks(sizes, parallel_group, world, tensor_ranks=step.tensor_ranks)
        for _, sizes, parallel_group in named
    ]
    if step.offloads:
        return _offloaded(named, tiles, step, world)
    cost = step_cost(tiles, step.settings)
    worst = int(cost.peak.argmax())
    group = int(cost.group[worst])
    rows = [
        GroupMemory(name, sum(tile.sizes), tile.ranks, tile.layout.partition, held, peak)
        for (name, *_), tile, held, peak in zip(
            named, tiles, _held(tiles, step), cost.group_peaks, strict=True
        )
    ]
    return StepMemory(
        transient=int(cost.transient[worst]),
        held=int(cost.held[worst]),
        step_peak=int(cost.peak[worst]),
        first_step_peak=int(step_cost(tiles, step.settings, first=True).peak.max()),
        phase=PHASES[int(cost.phase[worst])],
        group=named[group][0] if group >= 0 else "",
        worst_rank=worst,
        least=int(cost.peak.min()),
        resident=_resident(tiles, step),
        host={},
        groups=rows,
        step=step,
        data_parallel_size=world,
        rank_peaks=cost.peak.tolist(),
    )


def on_ranks(
    sizes: tuple[int, ...],
    parallel_group: str | None,
    world: int,
    count: int = 1,
    tensor_ranks: int = 1,
) -> "GroupOnRanks":
    """The group with its partitions; experts of ``ep_size_N`` have world / N of them.

    DeepSpeed gives neighbouring ranks different experts (``deepspeed/utils/groups.py``), so
    rank r owns partition r // N. If uncut experts are distributed over ``tensor_ranks`` too,
    r counts world x tensor_ranks ranks, and rank r owns the dense partition of its DP rank.

    Raises:
        InvalidArgumentError: the expert-parallel size does not divide the world.
    """
    import numpy as np

    from moe_groups.memory.group_layout import GroupOnRanks

    ranks, everyone = sharing_ranks(parallel_group, world, tensor_ranks), world * tensor_ranks
    return GroupOnRanks(sizes, np.arange(everyone) // (everyone // ranks), ranks, count)


def _held(tiles: Sequence["GroupOnRanks"], step: StepConfig) -> list[int]:
    """Bytes of gradients of each group on the rank that holds the most."""
    settings = step.settings
    if settings.wrapper == "bf16_optimizer":
        low = settings.weight_bytes if settings.keeps_low_precision else 0
        return [low * sum(tile.sizes) for tile in tiles]
    if settings.compact:
        return [settings.grad_bytes * tile.layout.partition for tile in tiles]
    return [
        settings.grad_bytes * int((tile.layout.touched + tile.layout.padding).max())
        for tile in tiles
    ]


def _resident(tiles: Sequence["GroupOnRanks"], step: StepConfig) -> dict[str, int]:
    """Bytes that stay between steps on each rank."""
    from moe_groups.memory.step_cost import MASTER

    settings = step.settings
    whole = sum(tile.ranks * tile.layout.partition for tile in tiles)
    partitions = sum(tile.layout.partition for tile in tiles)
    found = {"weights": settings.weight_bytes * whole}
    if settings.wrapper == "bf16_optimizer":
        found["fp32 gradients"] = MASTER * whole
    if not step.offloads:
        found["master weights"] = settings.master_bytes * partitions
        found["optimizer state"] = settings.state_bytes * partitions
    return found


def _offloaded(
    named: Sequence[SizedGroup],
    tiles: Sequence["GroupOnRanks"],
    step: StepConfig,
    world: int,
) -> StepMemory:
    """With the optimizer on the host, bf16 gradients leave the device in the backward pass.

    Gradients that accumulate in fp32 stay on the device as exact partitions, each until its
    group has stepped (``copy_grads_in_partition``, ``_release_preflattened_grad_buffers``).

    Not counted, because no argument determines it: with ``gradient_accumulation_steps``
    above 1 ZeRO-2 keeps on the host the bf16 gradients of all parameters that reach into a
    partition; ZeRO-1 with fp32 accumulation keeps its reduce bucket through the step.
    """
    from moe_groups.memory.step_cost import MASTER

    partitions = sum(tile.layout.partition for tile in tiles)
    largest = step.weight_bytes * max(max(tile.sizes) for tile in tiles)
    resident = _resident(tiles, step) | {"offload buffer": largest}
    host = {
        "master weights": MASTER * partitions,
        "gradients": MASTER * partitions,
        "optimizer state": step.settings.state_bytes * partitions,
        "weights to copy back": step.weight_bytes * partitions,
        "offload buffer": largest,
    }
    stays = MASTER if step.grad_accum_dtype == "fp32" else 0
    held = stays * partitions
    rows = [
        GroupMemory(name, sum(tile.sizes), tile.ranks, size, stays * size, held)
        for (name, *_), tile in zip(named, tiles, strict=True)
        for size in [tile.layout.partition]
    ]
    return StepMemory(
        transient=0,
        held=held,
        step_peak=held,
        first_step_peak=held,
        phase="offloaded",
        group="",
        worst_rank=0,
        least=held,
        resident=resident,
        host=host,
        groups=rows,
        step=step,
        data_parallel_size=world,
        rank_peaks=[held] * (world * step.tensor_ranks),
    )
