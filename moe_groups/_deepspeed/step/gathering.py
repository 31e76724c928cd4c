"""Gather the stepped weights of many groups with few collectives."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from moe_groups._deepspeed.step.tiles import slices


class Piece(NamedTuple):
    """A slice of one group's partitions: the same elements of each."""

    group: int
    start: int
    end: int


def bucket_bytes(
    tile_bytes: int, released_bytes: int, partitions: Sequence[tuple[int, int]]
) -> int:
    """What a bucket may take: up to four tiles, if the step has released as much before."""
    released = released_bytes * sum(size for _, size in partitions)
    return max(tile_bytes, min(released, 4 * tile_bytes))


def buckets(
    partitions: Sequence[tuple[int, int]], ranks: int, bytes_: int, most_bytes: int, copies: bool
) -> Iterator[list[Piece]]:
    """Cut and collect what the same ranks share into buckets.

    Args:
        partitions: index of each group, and elements of its partition.
        ranks: that share them.
        bytes_: of an element.
        most_bytes: of what a bucket takes: the part that a rank sends, the parts that it
            receives, and a copy of them if the backend makes one.
        copies: it does, as gloo; others receive a larger group into its weights, uncut.
    """
    most = max(1, most_bytes // (bytes_ * (1 + (2 if copies else 1) * ranks)))
    bucket: list[Piece] = []
    room = most
    for index, size in partitions:
        for start, end in slices(size, most if copies else max(size, most)):
            if end - start > room and bucket:
                yield bucket
                bucket, room = [], most
            bucket.append(Piece(index, start, end))
            room -= end - start
    if bucket:
        yield bucket


class Gathering:
    """Gathers partitions in buckets of several groups that the same ranks share.

    The number of collectives follows from the size of the weights, not from the number of groups.

    Args:
        flats: the weights of each group, one partition after another.
        owners: the process group that shares each.
        tile_bytes: of the lean step.
        released_bytes: for an element of a partition, released before weights are gathered.
    """

    def __init__(
        self,
        flats: Sequence[torch.Tensor],
        owners: Sequence[Any],
        tile_bytes: int,
        released_bytes: int,
    ) -> None:
        self.flats, self.owners = flats, owners
        backend = str(torch.distributed.get_backend_config(owners[0]))
        self.copies = flats[0].is_cpu and "gloo" in backend
        # By ranks: with ep_size 1 experts have a process group of their own with the same ranks.
        sharing: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[int, int]]] = {}
        for index, (flat, owner) in enumerate(zip(flats, owners, strict=True)):
            ranks = tuple(torch.distributed.get_process_group_ranks(owner))
            if len(ranks) > 1:
                partition = index, flat.numel() // len(ranks)
                sharing.setdefault((ranks, flat.dtype), []).append(partition)
        self.buckets: list[list[Piece]] = []
        for (ranks, dtype), partitions in sharing.items():
            # From these groups alone: ranks that share them may differ in others.
            most = bucket_bytes(tile_bytes, released_bytes, partitions)
            self.buckets += buckets(partitions, len(ranks), dtype.itemsize, most, self.copies)

    @torch.no_grad()
    def run(self) -> None:
        """Receive the partitions of the other ranks; all ranks call it together."""
        buffers: dict[torch.dtype, torch.Tensor] = {}
        for bucket in self.buckets:
            flat, owner = self.flats[bucket[0].group], self.owners[bucket[0].group]
            ranks = torch.distributed.get_world_size(owner)
            if len(bucket) == 1 and not self.copies:
                own = flat.view(ranks, -1)[torch.distributed.get_rank(owner)]
                all_gather(flat, own, owner)
                continue
            if flat.dtype not in buffers:
                buffers[flat.dtype] = flat.new_empty(self._buffer_size(flat.dtype))
            self._gather(bucket, ranks, buffers[flat.dtype])

    def _buffer_size(self, dtype: torch.dtype) -> int:
        """Elements of a buffer for each of the buckets in turn."""
        return max(
            buffer_size(bucket, torch.distributed.get_world_size(self.owners[bucket[0].group]))
            for bucket in self.buckets
            if self.flats[bucket[0].group].dtype == dtype and (len(bucket) > 1 or self.copies)
        )

    def _gather(self, bucket: list[Piece], ranks: int, buffer: torch.Tensor) -> None:
        owner = self.owners[bucket[0].group]
        rank = torch.distributed.get_rank(owner)
        views = [self.flats[piece.group].view(ranks, -1) for piece in bucket]
        parts = [view[:, p.start : p.end] for view, p in zip(views, bucket, strict=True)]
        sizes = [part.shape[1] for part in parts]
        received, own = buffer[: ranks * sum(sizes)], parts[0][rank]
        if len(parts) > 1:
            own = buffer[ranks * sum(sizes) :][: sum(sizes)]
            torch.cat([part[rank] for part in parts], out=own)
        all_gather(received, own, owner)
        for part, others in zip(parts, received.view(ranks, -1).split(sizes, 1), strict=True):
            part.copy_(others)


def buffer_size(bucket: list[Piece], ranks: int) -> int:
    """Elements of what a bucket sends, if it is collected from several groups, and receives."""
    return (ranks + (len(bucket) > 1)) * sum(piece.end - piece.start for piece in bucket)


def all_gather(received: torch.Tensor, own: torch.Tensor, owner: Any) -> None:
    from deepspeed import comm

    comm.all_gather_into_tensor(received, own, group=owner)
