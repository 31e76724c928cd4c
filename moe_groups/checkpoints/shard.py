"""One rank's optimizer state in a checkpoint of ZeRO-1, ZeRO-2 or BF16_Optimizer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_groups.checkpoints.kept_state import keys_of
from moe_groups.checkpoints.layout import FlatGroup, Rank, fragments, lay_out, round_robin
from moe_groups.checkpoints.torch_file import read_torch_file, reading
from moe_groups.errors import CheckpointError
from moe_groups.tags import parallel_group_of
from moe_groups.topology import ep_size_of

STATE = "base_optimizer_state"
MASTER = "single_partition_of_fp32_groups"
PADDINGS = "group_paddings"
SLICES = "param_slice_mappings"
ALIGNMENT = "param_alignment_paddings"
COUNTS = "partition_count"
CONTENT = "optimizer_state_dict"
_STAGE = "zero_stage"
WRAPPERS = ("ZeRO-1", "ZeRO-2", "BF16_Optimizer")
"""Those whose files say what they hold, and can be converted."""


class Fragment(NamedTuple):
    """What of a parameter is in a partition: ``numel`` elements from ``start`` on."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Shard:
    """The file of one rank; its tensors are in the file until somebody looks at them.

    Attributes:
        path: the file.
        content: all of it.
    """

    path: Path
    content: dict[str, Any]

    @property
    def optimizer(self) -> dict[str, Any]:
        """What the wrapper's ``state_dict`` gave."""
        found: dict[str, Any] = self.content[CONTENT]
        return found

    @property
    def options(self) -> list[dict[str, Any]]:
        """The dict of each group."""
        found: list[dict[str, Any]] = self.optimizer[STATE]["param_groups"]
        return found

    def states(self, index: int) -> dict[str, Any]:
        """Optimizer state of a group, such as ``exp_avg``; empty before the first step."""
        (key,) = self.options[index]["params"]
        found: dict[str, Any] = self.optimizer[STATE]["state"].get(key, {})
        return found

    @property
    def lean(self) -> bool:
        """Are the master weights without padding, as ZeRO saves them and BF16_Optimizer not?"""
        return _STAGE in self.optimizer

    @property
    def wrapper(self) -> str:
        """Who saved it, in the words of the manifest."""
        return f"ZeRO-{int(self.optimizer[_STAGE])}" if self.lean else "BF16_Optimizer"

    def partition(self, index: int) -> int:
        """Elements of the rank's partition of a group, with padding."""
        saved = int(self.optimizer[MASTER][index].numel())
        return saved + (int(self.optimizer[PADDINGS][index]) if self.lean else 0)

    def fragments(self, index: int) -> list[Fragment]:
        """The parameters in the rank's partition of a group, by their place in it.

        They are elsewhere if the run reordered them: see :func:`stated_fragments`.
        """
        mapping: Mapping[str, Any] = self.optimizer[SLICES][index]
        found = (Fragment(name, at.start, at.numel) for name, at in mapping.items())
        return sorted(found, key=lambda fragment: fragment.start)

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks of the run that saved it."""
        return int(self.optimizer[COUNTS][0]) * ep_size_of(self.parallel_group(0))

    def sharing(self, index: int, rank: int) -> tuple[int, ...]:
        """Data-parallel ranks with a partition of this rank's group, as DeepSpeed arranges them.

        ``utils/groups.py``: every ep_size-th rank, or neighbours with
        ``use_data_before_expert_parallelism``.
        """
        ep_size, world = ep_size_of(self.parallel_group(index)), self.data_parallel_size
        if self.data_before_experts:
            share = world // ep_size
            first = rank // share * share
            return tuple(range(first, first + share))
        return tuple(range(rank % ep_size, world, ep_size))

    def holds(self, rank: Rank, groups: Sequence[FlatGroup]) -> bool:
        """Is here what these groups put into the rank's partitions?"""
        if len(self.optimizer[MASTER]) != len(groups):
            return False
        return all(
            self.partition(index) == group.partition
            and int(self.optimizer[COUNTS][index]) == len(group.ranks)
            and self.fragments(index) == stated_fragments(group, rank.data, self.reorders)
            for index, group in enumerate(groups)
        )

    @property
    def data_before_experts(self) -> bool:
        """Were ranks with the same experts neighbours?"""
        return bool(self._config.get("use_data_before_expert_parallelism", False))

    @property
    def reorders(self) -> bool:
        """Was it saved by a run with ``round_robin_gradients``?"""
        zero = self._config.get("zero_optimization")
        return self.lean and isinstance(zero, dict) and bool(zero.get("round_robin_gradients"))

    @property
    def _config(self) -> dict[str, Any]:
        config = self.content.get("ds_config")
        return config if isinstance(config, dict) else {}

    def parallel_group(self, index: int) -> str | None:
        """``ep_size_<N>`` for a group of experts."""
        options = self.options[index]
        return parallel_group_of(str(options["name"])) if options.get("moe") else None


def stated_fragments(group: FlatGroup, rank: int, reorders: bool) -> list[Fragment]:
    """What the file of a rank says of a group (``param_slice_mappings``).

    DeepSpeed makes that in the order of the optimizer's list, also where
    ``round_robin_gradients`` has brought the parameters into another one; only gaps between
    them, for ``parameter_alignment``, make it look.
    """
    if reorders and group.numel == sum(param.numel for param in group.params):
        order = round_robin(range(len(group.params)), len(group.ranks))
        listed = [param for _, param in sorted(zip(order, group.params, strict=True))]
        group = replace(group, params=lay_out(listed))
    return [Fragment(p.param.name, p.start, p.numel) for p in fragments(group, rank)]


def read_shard(path: Path, trust: bool = False, elastic: bool = False) -> Shard:
    """Read what the file says about its groups, and where its tensors are.

    Args:
        path: the file.
        trust: see :func:`read_torch_file`.
        elastic: may it be saved with ``elastic_checkpoint``? It has no :attr:`Shard.options`
            then, and no states of groups.

    Raises:
        CheckpointError: the file cannot be read, or does not say what lies where.
    """
    content = read_torch_file(path, trust)
    with reading(path):
        problem = _problem(content, elastic)
    if problem:
        raise CheckpointError(f"{path}: {problem}.")
    return Shard(path, content)


def _problem(content: Any, elastic: bool) -> str | None:
    if not isinstance(content, dict) or not isinstance(content.get(CONTENT), dict):
        return "no optimizer state of ZeRO-1, ZeRO-2 or BF16_Optimizer"
    optimizer = content[CONTENT]
    missing = [key for key in (STATE, MASTER, PADDINGS, COUNTS) if key not in optimizer]
    if missing:
        return f"no optimizer state of ZeRO-1, ZeRO-2 or BF16_Optimizer: it has no {missing[0]!r}"
    if SLICES not in optimizer:
        return (
            f"it does not say which parameters it holds (no {SLICES!r}; DeepSpeed writes that "
            "since 0.7.5)"
        )
    counts = {key: len(optimizer[key]) for key in (MASTER, PADDINGS, COUNTS, SLICES)}
    if isinstance(optimizer[STATE], dict):
        counts["param_groups"] = len(optimizer[STATE]["param_groups"])
    elif not elastic:
        return 'it was saved with "elastic_checkpoint": true, and does not say what its groups are'
    if len(set(counts.values())) > 1:
        return f"it disagrees with itself about the number of groups: {counts}"
    return None


def step_of_group(shard: Shard, index: int) -> float | None:
    """The steps that the optimizer counts for a group; None where it counts none."""
    counter = shard.states(index).get("step", shard.options[index].get("step"))
    if isinstance(counter, torch.Tensor) and counter.numel() == 1:
        counter = counter.item()
    return float(counter) if isinstance(counter, int | float) else None


def step_of_shard(shard: Shard) -> float | None:
    """The most steps that the optimizer counts for a group; None where nothing is counted."""
    if not isinstance(shard.optimizer[STATE], dict):  # "elastic_checkpoint"
        return None
    steps = (step_of_group(shard, index) for index in range(len(shard.options)))
    return max((step for step in steps if step is not None), default=None)


def state_keys(shard: Shard) -> tuple[str, ...] | None:
    """Names in the optimizer's state of all groups; None where there is none, or not by group."""
    state = shard.optimizer[STATE]
    return keys_of(state["state"].values()) if isinstance(state, dict) else None


def option_names(shard: Shard) -> frozenset[str] | None:
    """Names of the options of all groups; None where they are not known by group."""
    if not isinstance(shard.optimizer[STATE], dict):
        return None
    return frozenset(str(key) for options in shard.options for key in options)


class SameStep:
    """Compares shards, one after the other, with the first one that counts."""

    def __init__(self) -> None:
        self.first: tuple[Path, float] | None = None

    def check(self, shard: Shard) -> None:
        """Compare one more.

        Raises:
            CheckpointError: it was saved at another step.
        """
        step = step_of_shard(shard)
        if step is None:
            return
        self.first = self.first or (shard.path, step)
        if step != self.first[1]:
            raise CheckpointError(
                f"{shard.path} was saved after {step:g} steps, {self.first[0].name} after "
                f"{self.first[1]:g}: a save over an older checkpoint was not finished. Use another "
                "tag."
            )
