"""The size caps that the caller asked for, in elements of a group."""

from typing import TYPE_CHECKING

from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.grouping import largest_group
from moe_groups.topology import sharing_ranks, world_size

if TYPE_CHECKING:
    from moe_groups.groups.keys import Key


DEEPSPEED_MAX_GROUP_SIZE = 178956971
"""Default cap of DeepSpeed's split, in elements (``deepspeed/moe/utils.py``)."""


class Caps:
    """``max_group_size`` and ``max_group_bytes`` of :func:`create_moe_param_groups`.

    Raises:
        InvalidArgumentError: a cap in bytes while the number of ranks is not known.
    """

    def __init__(
        self,
        size: int | float | None,
        nbytes: int | float | None,
        world: int | None,
        tensor_ranks: int = 1,
    ) -> None:
        self.tensor_ranks = tensor_ranks
        self.size, self.nbytes, self.world = _whole(size), _whole(nbytes), world
        if self.nbytes is not None and self.world is None:
            self.world = world_size()
            if self.world is None:
                raise InvalidArgumentError(
                    "max_group_bytes counts the bytes on one rank, but the number of ranks is not "
                    "known yet: call deepspeed.init_distributed() first or pass "
                    "data_parallel_size."
                )

    def of(self, key: "Key") -> int | None:
        """The cap of groups with this key, in elements."""
        if self.nbytes is None:
            return self.size
        assert self.world is not None
        ranks = sharing_ranks(key.parallel_group, self.world, self.tensor_ranks)
        most = max(1, largest_group(self.nbytes, key.dtype.itemsize, ranks))
        return most if self.size is None else min(most, self.size)


def _whole(cap: int | float | None) -> int | None:
    return None if cap is None or cap == float("inf") else int(cap)
