"""The process groups of experts, and the keys under which DeepSpeed looks them up."""

import sys
from collections.abc import Iterable
from typing import Any

import torch

from moe_groups.tags import parallel_group_of

_DICTS = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)
"""DeepSpeed's dictionaries by key; those of ranks exist since 0.17."""


def _known() -> list[dict[str, Any]]:
    from deepspeed.utils import groups

    return [getattr(groups, name) for name in _DICTS if hasattr(groups, name)]


def _ranks(dictionary: str, key: str) -> list[int]:
    """The ranks of a process group of experts, in order; empty while it does not exist."""
    groups = sys.modules.get("deepspeed.utils.groups")
    group = getattr(groups, dictionary, {}).get(key)
    return [] if group is None else torch.distributed.get_process_group_ranks(group)


def resolves(name: str) -> bool:
    """Does ``name`` lead to the process groups of its parallel group?"""
    base = parallel_group_of(name)
    return all(name in known and known[name] is known.get(base) for known in _known())


def expert_data_parallel_ranks(parallel_group: str) -> list[int]:
    """The ranks that share an expert parameter, in order; empty while the group does not exist."""
    return _ranks("_EXPERT_DATA_PARALLEL_GROUP", parallel_group)


def expert_parallel_ranks(parallel_group: str) -> list[int]:
    """The ranks of this rank's EP group, in order; empty while the group does not exist."""
    return _ranks("_EXPERT_PARALLEL_GROUP", parallel_group)


def expert_parallel_rank(parallel_group: str) -> int | None:
    """This rank's EP rank, or None while the EP group does not exist."""
    ranks = expert_parallel_ranks(parallel_group)
    return ranks.index(torch.distributed.get_rank()) if ranks else None


def expert_place(parallel_group: str) -> tuple[int, bool] | None:
    """:func:`expert_parallel_rank`, and whether this is the first rank with the same experts."""
    ep_rank = expert_parallel_rank(parallel_group)
    if ep_rank is None:
        return None
    return ep_rank, torch.distributed.get_rank() == min(expert_data_parallel_ranks(parallel_group))


def gather_from_ep_group(tensor: torch.Tensor, parallel_group: str) -> list[torch.Tensor]:
    """What the ranks of rank 0's EP group have, in their order, on rank 0; empty on the others.

    The ranks of that group call it together.
    """
    from deepspeed.utils import groups

    ranks = expert_parallel_ranks(parallel_group)
    if 0 not in ranks:
        return []
    first = torch.distributed.get_rank() == 0
    parts = [torch.empty_like(tensor).contiguous() for _ in ranks] if first else None
    group = groups._get_expert_parallel_group(parallel_group)
    torch.distributed.gather(tensor.contiguous(), parts, dst=0, group=group)
    return parts or []


def tensor_parallel_size() -> int:
    """Ranks that share each dense layer, from the ``mpu`` that DeepSpeed was given."""
    groups = sys.modules.get("deepspeed.utils.groups")
    return 1 if groups is None else int(groups._get_model_parallel_world_size())


def register_names(names: Iterable[str]) -> None:
    """Make each name a key of the process groups that it starts with.

    Call it on all ranks with the same names in the same order. A name without process
    groups is not registered: DeepSpeed's own lookup raises then.
    """
    for name in names:
        base = parallel_group_of(name)
        if base == name:
            continue
        for known in _known():
            if base in known:
                known[name] = known[base]


def parallel_groups() -> list[str]:
    """The key ``ep_size_<N>`` of each EP group, in the order in which all ranks made them."""
    from deepspeed.utils import groups

    return [name for name in groups._EXPERT_PARALLEL_GROUP if parallel_group_of(name) == name]
