"""Describe param groups: read their sizes, places and hyperparameters into a table."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from moe_groups._deepspeed.engines import engine_data_parallel_group, is_engine, stepped_groups
from moe_groups._deepspeed.process_groups import expert_data_parallel_size, expert_parallel_rank
from moe_groups.errors import InvalidArgumentError
from moe_groups.group_table import GroupRow, GroupTable
from moe_groups.plan import padded_partition
from moe_groups.tags import (
    PARALLEL_GROUP,
    get_expert_tag,
    is_expert_parameter,
    numel_of,
    parallel_group_of,
)
from moe_groups.world import ep_size_of, world_size

_Pairs: TypeAlias = list[tuple[Mapping[str, Any], list[torch.Tensor]]]


def describe(
    groups: Any, *, max_rows: int = 60, data_parallel_size: int | None = None
) -> GroupTable:
    """A table of param groups: name, layer, expert, sizes, learning rate, weight decay.

    Args:
        groups: the result of :func:`create_moe_param_groups` or an optimizer over it, or
            after ``deepspeed.initialize`` the engine.
        max_rows: fold neighbouring groups when there are more than this.
        data_parallel_size: ranks that share dense parameters; None takes the engine's, or
            the world size of ``torch.distributed``, or 1.

    Returns:
        A table whose ``rows`` are data, shown by ``print`` and by notebooks.

    Raises:
        InvalidArgumentError: not groups, or groups that DeepSpeed has taken over.

    Example:
        >>> print(describe(groups))                                       # doctest: +SKIP
    """
    for name, value in (("max_rows", max_rows), ("data_parallel_size", data_parallel_size)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"{name}={value!r} must be at least 1.")
    if is_engine(groups):
        pairs: _Pairs = list(stepped_groups(groups))
        world = data_parallel_size or torch.distributed.get_world_size(
            engine_data_parallel_group(groups)
        )
    else:
        pairs = _read_pairs(getattr(groups, "param_groups", groups))
        world = data_parallel_size or world_size() or 1
    rows = [_row(i, group, params, world) for i, (group, params) in enumerate(pairs) if params]
    return GroupTable(rows, max_rows)


def _read_pairs(groups: Any) -> _Pairs:
    groups = [groups] if isinstance(groups, Mapping) else groups
    pairs: _Pairs = []
    for group in groups if isinstance(groups, list | tuple) else [groups]:
        if not isinstance(group, Mapping) or "params" not in group:
            raise InvalidArgumentError(
                f"describe takes group dicts, an optimizer or an engine, not {type(group).__name__}"
                ": group a model with create_moe_param_groups first."
            )
        params = list(group["params"])
        if group.get("moe") and params and not is_expert_parameter(params[0]):
            raise InvalidArgumentError(
                f"group {group.get('name')!r} holds a partition that DeepSpeed made of its "
                "parameters: after deepspeed.initialize, describe the engine."
            )
        pairs.append((group, params))
    return pairs


def _row(index: int, group: Mapping[str, Any], params: list[torch.Tensor], world: int) -> GroupRow:
    elements = sum(map(numel_of, params))
    moe = bool(group.get("moe"))
    ranks = world
    number = group.get("expert_number")
    tag = get_expert_tag(params[0]) if params else None
    name = tag.parallel_group if tag else parallel_group_of(str(group.get("name")))
    if moe and PARALLEL_GROUP.fullmatch(name):
        known = expert_data_parallel_size(name)
        ranks = known or max(1, world // ep_size_of(name))
        ep_rank = expert_parallel_rank(name)
        if number is not None and ep_rank is not None and tag is not None:
            number = tag.global_number(ep_rank)
    return GroupRow(
        name=str(group.get("name") or f"group {index}"),
        layer=group.get("expert_group_name"),
        expert=number,
        moe=moe,
        tensors=len(params),
        elements=elements,
        partition_bytes=padded_partition(elements, ranks)
        * max((param.dtype.itemsize for param in params), default=1),
        lr=_number(group.get("lr")),
        weight_decay=_number(group.get("weight_decay")),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
