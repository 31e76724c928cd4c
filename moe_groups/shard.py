"""One rank's optimizer state in a checkpoint of ZeRO-1, ZeRO-2 or BF16_Optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_groups.errors import CheckpointError
from moe_groups.tags import parallel_group_of
from moe_groups.torch_file import read_skeleton
from moe_groups.world import ep_size_of

STATE = "base_optimizer_state"
MASTER = "single_partition_of_fp32_groups"
PADDINGS = "group_paddings"
SLICES = "param_slice_mappings"
ALIGNMENT = "param_alignment_paddings"
COUNTS = "partition_count"
CONTENT = "optimizer_state_dict"


class Fragment(NamedTuple):
    """What of a parameter is in a partition: ``numel`` elements from ``start`` on."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class Shard:
    """The file of one rank with fake tensors (:func:`read_skeleton`).

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

    def partition(self, index: int) -> int:
        """Elements of the rank's partition of a group, with padding."""
        saved = int(self.optimizer[MASTER][index].numel())
        # ZeRO saves its master weights without padding, BF16_Optimizer with it
        return saved + (int(self.optimizer[PADDINGS][index]) if ALIGNMENT in self.optimizer else 0)

    def fragments(self, index: int) -> list[Fragment]:
        """The parameters in the rank's partition of a group, by their place in it."""
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
        config = self.content.get("ds_config") or {}
        if config.get("use_data_before_expert_parallelism", False):
            share = world // ep_size
            first = rank // share * share
            return tuple(range(first, first + share))
        return tuple(range(rank % ep_size, world, ep_size))

    def parallel_group(self, index: int) -> str | None:
        """``ep_size_<N>`` for a group of experts."""
        options = self.options[index]
        return parallel_group_of(str(options["name"])) if options.get("moe") else None


def read_shard(path: Path) -> Shard:
    """Read what the file says about its groups, without the tensors.

    Raises:
        CheckpointError: the file cannot be read, or does not say what lies where.
    """
    content = read_skeleton(path)
    problem = _problem(content)
    if problem:
        raise CheckpointError(f"{path}: {problem}.")
    return Shard(path, content)


def _problem(content: Any) -> str | None:
    if not isinstance(content, dict) or not isinstance(content.get(CONTENT), dict):
        return "no optimizer state of ZeRO-1, ZeRO-2 or BF16_Optimizer"
    optimizer = content[CONTENT]
    missing = [key for key in (STATE, MASTER, PADDINGS, COUNTS) if key not in optimizer]
    if missing:
        return f"no optimizer state of ZeRO-1, ZeRO-2 or BF16_Optimizer: it has no {missing[0]!r}"
    if SLICES not in optimizer:
        return (
            f"it does not say which parameters it holds (no {SLICES!r}; DeepSpeed writes that since "
            "0.7.5)"
        )
    if not isinstance(optimizer[STATE], dict):
        return 'it was saved with "elastic_checkpoint": true, which is not supported'
    counts = {key: len(optimizer[key]) for key in (MASTER, PADDINGS, COUNTS, SLICES)}
    counts["param_groups"] = len(optimizer[STATE]["param_groups"])
    if len(set(counts.values())) > 1:
        return f"it disagrees with itself about the number of groups: {counts}"
    return None

