"""How groups lie on the ranks that share them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_groups.groups.grouping import padded_partition

Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one group lies on the ranks that share it; vectors have an entry per partition.

    Attributes:
        partition: elements of a partition, padding included.
        touched: elements of all parameters that reach into the partition, in full size.
        padding: elements of the partition that belong to no parameter.
        tensors: gradients and padding tensors that make up the partition.
        largest_slice: elements of the largest piece of one parameter.
    """

    partition: int
    touched: Ints
    padding: Ints
    tensors: Ints
    largest_slice: Ints


@lru_cache(maxsize=4096)
def layout(sizes: tuple[int, ...], ranks: int) -> Layout:
    """The layout of parameters of these sizes (elements, in order) on ``ranks`` ranks."""
    partition = padded_partition(sum(sizes), ranks)
    ends = np.cumsum(np.array(sizes, dtype=np.int64))
    begins = np.concatenate([[0], ends[:-1]])
    left = np.arange(ranks, dtype=np.int64) * partition
    right = left + partition
    first = np.searchsorted(ends, left, side="right")
    behind = np.searchsorted(begins, right, side="left")
    some = behind > first
    touched = np.where(some, ends[np.maximum(behind - 1, 0)], 0) - np.where(
        some, begins[np.minimum(first, len(sizes) - 1)], 0
    )
    padding = np.clip(right - np.maximum(left, ends[-1]), 0, None)
    tensors = np.where(some, behind - first, 0) + (padding > 0)
    cuts = np.union1d(ends, np.minimum(right, ends[-1]))
    pieces = np.diff(cuts, prepend=0)
    largest = np.zeros(ranks, dtype=np.int64)
    np.maximum.at(largest, (cuts - pieces) // partition, pieces)
    return Layout(partition, touched, padding, tensors, largest)


@dataclass(frozen=True, slots=True)
class GroupOnRanks:
    """A group with its place in the data-parallel world.

    Attributes:
        sizes: elements of each parameter, in order.
        partition_of: the partition that each rank of the data-parallel world owns.
        ranks: number of partitions.
        count: number of neighbouring groups equal to this one.
    """

    sizes: tuple[int, ...]
    partition_of: Ints
    ranks: int
    count: int = 1

    @property
    def layout(self) -> Layout:
        return layout(self.sizes, self.ranks)
