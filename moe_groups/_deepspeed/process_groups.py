"""The process groups of experts, and the keys under which DeepSpeed looks them up."""

import sys
from collections.abc import Iterable

import torch

from moe_groups.tags import parallel_group_of

_DICTS = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)


def resolves(name: str) -> bool:
    """Does ``name`` lead to the process groups of its parallel group?"""
    from deepspeed.utils import groups

    base = parallel_group_of(name)
    return all(
        name in (known := getattr(groups, d)) and known[name] is known.get(base) for d in _DICTS
    )


def expert_data_parallel_size(parallel_group: str) -> int | None:
    """Ranks that share an expert parameter, or None while the group does not exist."""
    groups = sys.modules.get("deepspeed.utils.groups")
    ranks = groups and groups._EXPERT_DATA_PARALLEL_GROUP_RANKS.get(parallel_group)
    return len(ranks) if ranks else None


def expert_parallel_ranks(parallel_group: str) -> list[int]:
    """The ranks of this rank's EP group, in order; empty while the group does not exist."""
    groups = sys.modules.get("deepspeed.utils.groups")
    return list((groups and groups._EXPERT_PARALLEL_GROUP_RANKS.get(parallel_group)) or ())


def expert_parallel_rank(parallel_group: str) -> int | None:
    """This rank's EP rank, or None while the EP group does not exist."""
    ranks = expert_parallel_ranks(parallel_group)
    return ranks.index(torch.distributed.get_rank()) if ranks else None


def expert_place(parallel_group: str) -> tuple[int, bool] | None:
    """:func:`expert_parallel_rank`, and whether this is the first rank with the same experts."""
    ep_rank = expert_parallel_rank(parallel_group)
    if ep_rank is None:
        return None
    from deepspeed.utils import groups

    sharing = groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[parallel_group]
    return ep_rank, torch.distributed.get_rank() == min(sharing)


def tensor_parallel_size() -> int:
    """Ranks that share each dense layer, from the ``mpu`` that DeepSpeed was given."""
    groups = sys.modules.get("deepspeed.utils.groups")
    return 1 if groups is None else int(groups._get_model_parallel_world_size())


def register_names(names: Iterable[str]) -> None:
    """Make each name a key of the process groups that it starts with.

    Call it on all ranks with the same names in the same order. A name without process
    groups is not registered: DeepSpeed's own lookup raises then.
    """
    from deepspeed.utils import groups

    for name in names:
        base = parallel_group_of(name)
        if base == name:
            continue
        for known in (getattr(groups, d) for d in _DICTS):
            if base in known:
                known[name] = known[base]


def parallel_groups() -> list[str]:
    """The key ``ep_size_<N>`` of each EP group, in the order in which all ranks made them."""
    from deepspeed.utils import groups

    return [name for name in groups._EXPERT_PARALLEL_GROUP if parallel_group_of(name) == name]
