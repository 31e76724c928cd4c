"""Gather the stepped weights of many groups with few collectives."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from moe_groups._deepspeed.tiles import slices


class Piece(NamedTuple):
    """A slice of one group's partitions: the same elements of each."""

    group: int
    start: int
    end: int


class Gathering:
    """Gathers partitions in buckets of several groups that the same ranks share.

    The number of collectives follows from the size of the weights, not from the number of groups.

    Args:
        flats: the weights of each group, one partition after another.
        owners: the process group that shares each.
        most_bytes: of the buffer into which a bucket is received.
    """

    def __init__(
        self, flats: Sequence[torch.Tensor], owners: Sequence[Any], most_bytes: int
    ) -> None:
        self.flats, self.owners = flats, owners
        sharing: dict[tuple[Any, torch.dtype], list[int]] = {}
        for index, (flat, owner) in enumerate(zip(flats, owners, strict=True)):
            if torch.distributed.get_world_size(owner) > 1:
                sharing.setdefault((owner, flat.dtype), []).append(index)
        self.buckets = [
            bucket for indices in sharing.values() for bucket in self._cut(indices, most_bytes)
        ]

    def _cut(self, indices: list[int], most_bytes: int) -> Iterator[list[Piece]]:
        first = self.flats[indices[0]]
        ranks = torch.distributed.get_world_size(self.owners[indices[0]])
        most = max(1, most_bytes // (ranks * first.element_size()))
        bucket: list[Piece] = []
        room = most
        for index in indices:
            size = self.flats[index].numel() // ranks
            # A backend of a device receives into the weights themselves; gloo copies.
            whole = size > most and not first.is_cpu
            for start, end in slices(size, size if whole else most):
                if end - start > room and bucket:
                    yield bucket
                    bucket, room = [], most
                bucket.append(Piece(index, start, end))
                room -= end - start
        if bucket:
            yield bucket

    @torch.no_grad()
    def run(self) -> None:
        """Receive the partitions of the other ranks; all ranks call it together."""
        for bucket in self.buckets:
            self._gather(bucket)

    def _gather(self, bucket: list[Piece]) -> None:
        from deepspeed import comm

        owner = self.owners[bucket[0].group]
        ranks = torch.distributed.get_world_size(owner)
        rank = torch.distributed.get_rank(owner)
        views = [self.flats[piece.group].view(ranks, -1) for piece in bucket]
        parts = [view[:, p.start : p.end] for view, p in zip(views, bucket, strict=True)]
        if len(parts) == 1 and parts[0].is_contiguous() and not parts[0].is_cpu:
            comm.all_gather_into_tensor(views[0].view(-1), parts[0][rank], group=owner)
            return
        own = torch.cat([part[rank] for part in parts]) if len(parts) > 1 else parts[0][rank]
        received = own.new_empty(ranks * own.numel())
        comm.all_gather_into_tensor(received, own, group=owner)
        sizes = [part.shape[1] for part in parts]
        for part, others in zip(parts, received.view(ranks, -1).split(sizes, 1), strict=True):
            part.copy_(others)
