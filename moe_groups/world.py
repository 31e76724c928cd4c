"""How many ranks there are, and how many of them share a group."""

import torch

from moe_groups.errors import InvalidArgumentError


def world_size() -> int | None:
    """The world size of ``torch.distributed``; None before it is initialized."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return None


def ep_size_of(parallel_group: str | None) -> int:
    """The expert-parallel size N of ``ep_size_N``; 1 for dense groups."""
    return int(parallel_group.removeprefix("ep_size_")) if parallel_group else 1


def sharing_ranks(parallel_group: str | None, world: int, tensor_ranks: int = 1) -> int:
    """Ranks that share a parameter: the data-parallel world, for experts by their EP size.

    Args:
        parallel_group: of the parameter; None if it is dense.
        world: data-parallel ranks.
        tensor_ranks: tensor-parallel ranks that share out whole experts among them too, as
            DeepSpeed has it (``_create_expert_and_data_parallel``, ``deepspeed/utils/groups.py``).

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
