"""Compute the process groups that DeepSpeed makes from the sizes alone."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_groups._common.arguments import Count, checked, shown
from moe_groups.errors import InvalidArgumentError


def world_size() -> int | None:
    """The world size of ``torch.distributed``; None before it is initialized."""
    torch = sys.modules.get("torch")  # not imported means not initialized
    if torch is None or not torch.distributed.is_available():
        return None
    return int(torch.distributed.get_world_size()) if torch.distributed.is_initialized() else None


def ep_size_of(parallel_group: str | None) -> int:
    """The expert-parallel size N of ``ep_size_N``; 1 for dense groups."""
    return int(parallel_group.removeprefix("ep_size_")) if parallel_group else 1


def sharing_ranks(parallel_group: str | None, world: int, tensor_ranks: int = 1) -> int:
    """Number of ranks that share a parameter: the DP size, for experts divided by the EP size.

    Args:
        parallel_group: the parameter's; None if it is dense.
        world: number of data-parallel ranks.
        tensor_ranks: tensor-parallel ranks over which DeepSpeed distributes uncut experts too
            (``_create_expert_and_data_parallel``, ``deepspeed/utils/groups.py``).

    Raises:
        InvalidArgumentError: the expert-parallel size does not divide the world.
    """
    if parallel_group is None:
        return world
    ep_size = ep_size_of(parallel_group)
    if world * tensor_ranks % ep_size:
        times = f" times {tensor_ranks} tensor-parallel ranks" if tensor_ranks > 1 else ""
        raise InvalidArgumentError(
            f"a data-parallel world of {world} ranks{times} cannot hold experts with "
            f"{parallel_group}: their number must be a multiple of {ep_size}."
        )
    return world * tensor_ranks // ep_size


GroupKind = Literal["data", "tensor", "pipeline", "expert", "expert_data"]


@checked
@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The groups of ranks that DeepSpeed makes for its own MoE layers, without process groups.

    Ranks are numbered as DeepSpeed's pipeline grid and Megatron number them: tensor-parallel
    ranks are neighbours, then come the data-parallel ones, and each pipeline stage is a block.
    For layers with different ``ep_size``, make one topology each. Sequence parallelism and AutoEP
    are not covered, because DeepSpeed makes their groups differently.

    Args:
        world_size: number of ranks.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline stages.
        ep_size: ``ep_size`` of the MoE layers: the number of ranks over which the experts of a
            layer are distributed.
        expert_tensor_parallelism: the layers' ``enable_expert_tensor_parallelism``: experts are
            cut over the tensor-parallel ranks too.
        use_data_before_expert_parallel: ``use_data_before_expert_parallelism`` of DeepSpeed's
            config: ranks with the same experts are neighbours.

    Raises:
        InvalidArgumentError: a size is no positive integer or does not divide the ranks.

    Example:
        >>> Topology(world_size=8, ep_size=2).groups("expert_data")
        [[0, 2, 4, 6], [1, 3, 5, 7]]
    """

    world_size: Count
    tp_size: Count = 1
    pp_size: Count = 1
    ep_size: Count = 1
    expert_tensor_parallelism: bool = False
    use_data_before_expert_parallel: bool = False

    def __post_init__(self) -> None:
        if self.world_size % (self.tp_size * self.pp_size):
            raise InvalidArgumentError(
                f"{self.world_size} ranks cannot be cut into tp_size={self.tp_size} times "
                f"pp_size={self.pp_size}: their number must be a multiple of "
                f"{self.tp_size * self.pp_size}."
            )
        if len(self._lines()[0]) % self.ep_size:
            raise InvalidArgumentError(self._why_not())

    @property
    def data_parallel_size(self) -> int:
        """Ranks that share each dense parameter."""
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that share each expert parameter and the partitions of its group."""
        return len(self._lines()[0]) // self.ep_size

    def stage(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return self._checked(rank) // (self.world_size // self.pp_size)

    def data_rank(self, rank: int) -> int:
        """The position of a rank in its data-parallel group."""
        return self._checked(rank) // self.tp_size % self.data_parallel_size

    def tensor_rank(self, rank: int) -> int:
        """The position of a rank in its tensor-parallel group."""
        return self._checked(rank) % self.tp_size

    def expert_rank(self, rank: int) -> int:
        """The EP rank of a rank: its position in its EP group, 0 to ``ep_size`` - 1.

        Of a layer with E experts, it has E / ep_size from ``expert_rank * E / ep_size`` on.
        """
        return self.group_of("expert", rank).index(rank)

    def group_of(self, kind: GroupKind, rank: int) -> list[int]:
        """The ranks, ascending, of the group of this kind that includes ``rank``.

        Raises:
            InvalidArgumentError: the kind is unknown, or the rank does not exist.
        """
        self._checked(rank)
        return next(ranks for ranks in self.groups(kind) if rank in ranks)

    def groups(self, kind: GroupKind) -> list[list[int]]:
        """All groups of one kind; every rank is in exactly one.

        * "data": the same dense parameters; their gradients are averaged over these ranks.
        * "tensor": slices of the same dense layers, and of the same experts if those are cut.
        * "pipeline": different layers for the same batch.
        * "expert": one set of a layer's experts, distributed over ranks that exchange tokens.
        * "expert_data": the same experts; their gradients are summed over these ranks.

        Returns:
            Lists of ranks, ascending, ordered by their first rank.

        Raises:
            InvalidArgumentError: the kind is unknown.
        """
        ranks = range(self.world_size)
        width = self.world_size // self.pp_size
        found: list[list[int]] = []
        if kind == "pipeline":
            found = [list(ranks[start::width]) for start in range(width)]
        elif kind == "tensor":
            found = _blocks(ranks, self.tp_size)
        elif kind == "data":
            found = [
                line for stage in _blocks(ranks, width) for line in _combs(stage, self.tp_size)
            ]
        else:
            # On each line the groups of one kind are neighbours; the other kind crosses them.
            neighbours = (kind == "expert") != self.use_data_before_expert_parallel
            size = self.ep_size if kind == "expert" else self.expert_data_parallel_size
            for line in self._lines():
                found += _blocks(line, size) if neighbours else _combs(line, len(line) // size)
        return sorted(found)

    def _lines(self) -> Sequence[Sequence[int]]:
        """Ranks over which experts are distributed: those of a stage, or of one tensor rank."""
        if self.expert_tensor_parallelism:
            return self.groups("data")
        return _blocks(range(self.world_size), self.world_size // self.pp_size)

    def _why_not(self) -> str:
        cut = f"world_size={self.world_size}, tp_size={self.tp_size}, pp_size={self.pp_size}"
        number = len(self._lines()[0])
        if self.expert_tensor_parallelism:
            among = f"the {number} data-parallel ranks ({cut}) over which each slice of an expert"
        else:
            among = f"the {number} ranks of a stage ({cut}) over which whole experts"
        return (
            f"ep_size={self.ep_size} does not divide {among} are distributed: use a divisor of "
            f"{number}."
        )

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise InvalidArgumentError(
                f"rank={shown(rank)} is none of the {self.world_size} ranks: use 0 to "
                f"{self.world_size - 1}."
            )
        return rank


def _blocks(ranks: Sequence[int], size: int) -> list[list[int]]:
    """Groups of ``size`` neighbouring ranks."""
    return [list(ranks[start : start + size]) for start in range(0, len(ranks), size)]


def _combs(ranks: Sequence[int], number: int) -> list[list[int]]:
    """Groups of every ``number``-th rank, one for each start."""
    return [list(ranks[start::number]) for start in range(number)]
