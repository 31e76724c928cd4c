"""Read what the caller passes: a module, parameters, named parameters or group dicts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from moe_groups._common.arguments import check, shown
from moe_groups.errors import InvalidArgumentError, ParameterInputError
from moe_groups.experts.find import TaggedModel, find_experts
from moe_groups.groups.hyperparameters import check_hyperparameters
from moe_groups.groups.rules import describe_source
from moe_groups.tags import is_expert_parameter

ParamGroup: TypeAlias = dict[str, Any]
"""One dict of ``optimizer.param_groups``."""

ParamsInput: TypeAlias = (
    nn.Module
    | torch.Tensor
    | Mapping[str, Any]
    | Iterable[torch.Tensor]
    | Iterable[tuple[str, torch.Tensor]]
    | Iterable[Mapping[str, Any]]
)
"""What :func:`create_moe_param_groups` accepts."""


@dataclass(frozen=True, slots=True)
class GroupInput:
    """The input in one form: columns of equal length, one row for each parameter.

    Attributes:
        params: each parameter once, in the caller's order.
        names: their qualified names, "" where not known.
        sources: index of the caller's group of each.
        groups: the caller's groups without "params" (one empty dict where there were none).
        model: what was found in the model, if a module was passed.
    """

    params: list[torch.Tensor]
    names: list[str]
    sources: list[int]
    groups: list[ParamGroup]
    model: TaggedModel | None = None


def read_input(params: ParamsInput) -> GroupInput:
    """Bring ``params`` into one form; changes nothing.

    Raises:
        ParameterInputError: not one of the accepted forms, a group dict without "params",
            a set (it has no order), or a parameter in two groups.
    """
    if isinstance(params, nn.Module):
        model = find_experts(params)
        return GroupInput(model.params, model.names, [0] * len(model.params), [{}], model)
    if isinstance(params, Mapping):
        return _read_groups([params])
    if isinstance(params, torch.Tensor):
        params = [params]
    items = _ordered(params, "the parameters")
    if items and isinstance(items[0], Mapping):
        return _read_groups(items)
    tensors, names = _read_params(items, "the parameters")
    return _each_once(GroupInput(tensors, names, [0] * len(tensors), [{}]))


def _read_groups(groups: list[Any]) -> GroupInput:
    result = GroupInput([], [], [], [])
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise ParameterInputError(
                f"group {index} is a {type(group).__name__}, but the groups before it are "
                "dicts: pass either group dicts or parameters."
            )
        where = describe_source(index, group)
        check_hyperparameters(where, group)
        if "params" not in group:
            raise ParameterInputError(
                f'{where} has no "params", only {_some_keys(group)}: give the parameters of the '
                'group under "params", and named parameters as pairs: model.named_parameters().'
            )
        params = group["params"]
        items = [params] if isinstance(params, torch.Tensor) else _ordered(params, where)
        param_names = group.get("param_names")  # torch.optim's key beside plain "params"
        if param_names is not None and items and isinstance(items[0], torch.Tensor):
            if len(param_names) != len(items):
                raise ParameterInputError(
                    f'{where} has {len(items)} "params" but {len(param_names)} "param_names".'
                )
            items = list(zip(param_names, items, strict=True))
        tensors, names = _read_params(items, where)
        result.params.extend(tensors)
        result.names.extend(names)
        result.sources.extend([index] * len(tensors))
        result.groups.append({k: v for k, v in group.items() if k not in ("params", "param_names")})
    return _each_once(result)


def made_groups(groups: Any) -> list[tuple[Mapping[str, Any], list[torch.Tensor]]]:
    """Groups that were made, or those of an optimizer, with their parameters.

    Raises:
        InvalidArgumentError: not groups, or DeepSpeed has partitioned their parameters by now.
    """
    groups = getattr(groups, "param_groups", groups)
    found = []
    for index, group in enumerate(groups if isinstance(groups, list | tuple) else [groups]):
        if not isinstance(group, Mapping) or "params" not in group:
            raise InvalidArgumentError(
                f"groups: {shown(group)} is no group dict: give the groups, or the optimizer over "
                "them before deepspeed.initialize (create_moe_param_groups groups a model)."
            )
        where = describe_source(index, group)
        params = group["params"]
        check(f"{where}: params", params, Sequence[torch.Tensor])
        check_hyperparameters(where, group)
        if group.get("moe") and params and not any(map(is_expert_parameter, params)):
            raise InvalidArgumentError(
                f"{where} holds a partition that DeepSpeed made of its parameters: give the groups "
                "before deepspeed.initialize, or describe the engine."
            )
        found.append((group, list(params)))
    return found


def _some_keys(group: Mapping[str, Any]) -> str:
    keys = sorted(map(str, group))
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return f"the keys {keys[:4]}{more}"


def _ordered(params: Any, where: str) -> list[Any]:
    if isinstance(params, set | frozenset):
        raise ParameterInputError(
            f"{where} come as a set, which has another order in each run and on each rank: "
            "pass a list."
        )
    try:
        return list(params)
    except TypeError:
        raise ParameterInputError(
            f"{where}: expected a module, parameters, named parameters or group dicts, got "
            f"{type(params).__name__}."
        ) from None


def _read_params(items: list[Any], where: str) -> tuple[list[torch.Tensor], list[str]]:
    if all(issubclass(kind, torch.Tensor) for kind in set(map(type, items))):
        return items, [""] * len(items)
    plain = isinstance(items[0], torch.Tensor)
    for index, item in enumerate(items):
        if not (isinstance(item, torch.Tensor) if plain else _is_named(item)):
            wanted = "a parameter" if plain else "a (name, parameter) pair"
            if isinstance(item, nn.Module):
                wanted = "parameters; pass several modules as one: nn.ModuleList([...])"
            raise ParameterInputError(
                f"{where}: item {index} is a {type(item).__name__}, expected {wanted}."
            )
    return [param for _, param in items], [name for name, _ in items]


def _is_named(item: object) -> bool:
    return (
        isinstance(item, tuple | list)
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], torch.Tensor)
    )


def _each_once(given: GroupInput) -> GroupInput:
    """Drop repetitions of a (tied) parameter inside of a group; refuse it in two groups."""
    if len(set(map(id, given.params))) == len(given.params):
        return given
    kept = GroupInput([], [], [], given.groups)
    first: dict[int, int] = {}
    for param, name, source in zip(given.params, given.names, given.sources, strict=True):
        known = first.setdefault(id(param), len(kept.params))
        if known == len(kept.params):
            kept.params.append(param)
            kept.names.append(name)
            kept.sources.append(source)
        elif kept.sources[known] != source:
            both = [describe_source(i, given.groups[i]) for i in (kept.sources[known], source)]
            raise ParameterInputError(
                f"parameter {kept.names[known] or name or f'of shape {tuple(param.shape)}'} is in "
                f"two groups, {both[0]} and {both[1]}: leave it in one of them."
            )
    return kept
