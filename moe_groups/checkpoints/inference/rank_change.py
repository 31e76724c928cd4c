"""Which ranks share the groups when a checkpoint goes to another number of data-parallel ranks."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeAlias

from moe_groups.checkpoints.layout import FlatGroup, Layout, Rank
from moe_groups.errors import CheckpointError
from moe_groups.topology import ep_size_of, sharing_ranks

_Experts: TypeAlias = frozenset[tuple[str, int | None]]


class RankChange:
    """From the ranks of a checkpoint to those of another data-parallel world.

    Ranks that share experts are every ep_size-th one, or neighbours where the saved ones are:
    ``use_data_before_expert_parallelism``, seen where the checkpoint has two ranks with the
    same experts (``deepspeed/utils/groups.py``).

    Args:
        source: layout of the checkpoint.
        size: data-parallel ranks of the new run.
    """

    def __init__(self, source: Layout, size: int) -> None:
        self.source, self.size = source, size
        self.neighbours = any(
            ep_size_of(group.parallel_group) > 1 and group.ranks[:2] == (first, first + 1)
            for group in source.groups
            for first in group.ranks[:1]
        )

    def ranks(self) -> Iterator[tuple[Rank, Rank]]:
        """Each new rank, and a saved rank that has its experts.

        Raises:
            InvalidArgumentError: an expert-parallel size does not divide the new world.
            CheckpointError: no saved rank has the experts that a new one needs.
        """
        for model in self.source.model_ranks:
            saved: dict[_Experts, Rank] = {}
            for rank in sorted(rank for rank in self.source.order if rank.model == model):
                saved.setdefault(_experts(self.source.of(rank)), rank)
            parallel_groups = sorted({name for experts in saved for name, _ in experts})
            for data in range(self.size):
                wanted = frozenset((name, self._ep_rank(name, data)) for name in parallel_groups)
                if wanted not in saved:
                    raise CheckpointError(
                        f"data-parallel rank {data} of {self.size} (model-parallel rank {model}) "
                        f"needs the experts of {_listed(wanted)}, and no rank of the checkpoint "
                        "has these: its files or its manifest are not complete."
                    )
                yield Rank(model, data), saved[wanted]

    def shared(self, group: FlatGroup) -> FlatGroup:
        """The group, with the new ranks that share it."""
        return replace(group, ranks=tuple(self._sharing(group)))

    def _ep_rank(self, parallel_group: str, data: int) -> int:
        share = sharing_ranks(parallel_group, self.size)
        return data // share if self.neighbours else data % ep_size_of(parallel_group)

    def _sharing(self, group: FlatGroup) -> range:
        if group.parallel_group is None:
            return range(self.size)
        assert group.ep_rank is not None
        share = sharing_ranks(group.parallel_group, self.size)
        if self.neighbours:
            return range(group.ep_rank * share, (group.ep_rank + 1) * share)
        return range(group.ep_rank, self.size, ep_size_of(group.parallel_group))


def _experts(groups: Iterable[FlatGroup]) -> _Experts:
    return frozenset((g.parallel_group, g.ep_rank) for g in groups if g.parallel_group)


def _listed(experts: _Experts) -> str:
    return ", ".join(f"{name} rank {ep_rank}" for name, ep_rank in sorted(experts, key=str))
