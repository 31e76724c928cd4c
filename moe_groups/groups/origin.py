"""What a run's groups were made from, so that a checkpoint can be grouped anew without the model.

``create_moe_param_groups`` remembers here what it grouped. When the engine writes a checkpoint,
its groups are looked up, and what they were made from goes into ``moe_groups.json``. Nothing is
kept in the group dicts, which DeepSpeed saves and compares; and nothing keeps a model alive.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeAlias, cast

import torch

from moe_groups._common.arguments import SplitBy
from moe_groups.groups.keys import NO_EXPERT, Families, Key, PlannedGroup, Table
from moe_groups.groups.names import given_name
from moe_groups.groups.rules import Variant
from moe_groups.tags import get_expert_tag, is_expert_parameter, layers_around, numel_of


class OriginRow(NamedTuple):
    """What decides the group of one parameter.

    Attributes:
        name: qualified name on the ranks that have the parameter.
        parallel_group: ``ep_size_<N>``; None for a dense parameter.
        layer: label of the MoE layer; None where no tag says it, and for a dense parameter unless
            an override names it inside of a layer.
        number: of the expert on its rank; None where one tensor holds all experts.
        variant: the caller's group, and the rules that apply.
        dtype: when the parameter was grouped; the engine may cast it afterwards.
    """

    name: str
    parallel_group: str | None
    layer: str | None
    number: int | None
    variant: Variant
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Origin:
    """What the groups of one rank were made from.

    Attributes:
        rows: the parameters that are stepped, in the order in which they were given.
        names: of the caller's groups; None for one without a name.
        frozen_experts: expert parameters were frozen. DeepSpeed's split counts their elements.
    """

    rows: tuple[OriginRow, ...]
    names: tuple[str | None, ...]
    frozen_experts: bool = False

    def table(self, split_by: SplitBy, sizes: Mapping[str, int]) -> Table:
        """The table of which ``read_table`` makes the same plans for the model itself.

        Args:
            sizes: elements of each parameter, by name.
        """
        by_layer, by_expert = split_by != "parallel_group", split_by == "expert"
        families: dict[Key, dict[int, list[int]]] = {}
        for index, (_, parallel_group, layer, number, variant, dtype) in enumerate(self.rows):
            key = Key(parallel_group, layer if by_layer else None, variant, dtype)
            expert = number if by_expert and number is not None else NO_EXPERT
            families.setdefault(key, {}).setdefault(expert, []).append(index)
        return Table([sizes[row.name] for row in self.rows], cast(Families, families))

    @property
    def sources(self) -> list[dict[str, str | None]]:
        """The caller's groups, with nothing but their names."""
        return [{"name": name} for name in self.names]


class _Made(NamedTuple):
    """Groups that were made.

    Attributes:
        plan: the groups, whose rows are parameters in the order in which they were given.
        params: ``id`` of each parameter of the groups, in their order.
        names: of the caller's groups.
        frozen_experts: see :class:`Origin`.
        planned: for the memory of a step.
    """

    plan: list[PlannedGroup]
    params: list[int]
    names: list[str | None]
    frozen_experts: bool
    planned: bool


_Named: TypeAlias = Sequence[tuple[str, Sequence[torch.Tensor]]]
_Groups: TypeAlias = tuple[int, tuple[tuple[str, int], ...]]
"""``id`` of the first parameter, and name and number of parameters of each group."""

_made: OrderedDict[_Groups, _Made] = OrderedDict()
_LABELS = "expert_group_name", "expert_label_found"
_MOST = 16
"""Calls that are remembered, the last ones."""


def remember_groups(
    plan: list[PlannedGroup],
    params: Sequence[torch.Tensor],
    sources: Sequence[Mapping[str, object]],
    planned: bool,
) -> None:
    """Keep what groups were made from.

    Parameters are known by ``id``: torch does not swap a tensor that has weak references
    (``torch.utils.swap_tensors``), and a group keeps its parameters alive.

    Args:
        plan: the groups.
        params: all parameters in the order in which they were given; the plan's rows.
        sources: the caller's groups, for their names.
        planned: the groups were planned for the memory of a step.
    """
    ids = list(map(id, map(params.__getitem__, chain.from_iterable(rows for *_, rows in plan))))
    frozen = False
    if len(ids) < len(params):
        grouped = set(ids)
        left_out = (param for param in params if id(param) not in grouped)
        frozen = any(is_expert_parameter(param) and numel_of(param) > 0 for param in left_out)
    names = [given_name(source.get("name")) for source in sources]
    _keep(_Made(plan, ids, names, frozen, planned))


def _keep(made: _Made) -> None:
    groups = made.params[0], tuple((name, len(own)) for name, _, _, own in made.plan)
    _made[groups] = made
    _made.move_to_end(groups)
    while len(_made) > _MOST:
        _made.popitem(last=False)


def follow_replacement(
    params: Sequence[torch.Tensor], sources: Mapping[int, Sequence[torch.Tensor]]
) -> bool:
    """Remember groups anew whose parameters were replaced, as if they were made afterwards.

    The new parameters get the labels of those that they were made of.

    Args:
        params: of the model, in its order, after the replacement.
        sources: the parameters that a new one was made of, by its ``id``.

    Returns:
        Whether there were such groups.
    """
    old = {id(source) for each in sources.values() for source in each}
    followed = False
    for groups, made in list(_made.items()):
        if old.isdisjoint(made.params):
            continue
        followed = True
        del _made[groups]
        lengths = [len(rows) for *_, rows in made.plan]
        indices = chain.from_iterable([index] * length for index, length in enumerate(lengths))
        group_of = dict(zip(made.params, indices, strict=True))
        rows: list[list[int]] = [[] for _ in made.plan]
        for row, param in enumerate(params):
            first = next(iter(sources.get(id(param), ())), param)
            if id(first) in group_of:
                rows[group_of[id(first)]].append(row)
        plan: list[PlannedGroup] = [
            (*group[:3], own) for group, own in zip(made.plan, rows, strict=True)
        ]
        _keep(_Made(plan, [id(params[row]) for own in rows for row in own], *made[2:]))
    for param in params if followed else ():
        for source in sources.get(id(param), ()):
            labels = {key: source.__dict__[key] for key in _LABELS if key in source.__dict__}
            param.__dict__.update(labels)
    return followed


def were_planned(groups: _Named) -> bool:
    """Were an optimizer's groups planned for the memory of a step?"""
    made = _made_of(groups)
    return made is not None and made.planned


def _made_of(groups: _Named) -> _Made | None:
    """None for groups that were not made in this process, or were changed afterwards."""
    params = [param for _, own in groups for param in own]
    shape = tuple((name, len(own)) for name, own in groups)
    made = _made.get((id(params[0]), shape)) if params else None
    return made if made is None or made.params == list(map(id, params)) else None


def origin_of(groups: _Named, name_of: Callable[[torch.Tensor], str]) -> Origin | None:
    """What an optimizer's groups were made from; None where it is not known.

    That is so for groups that ``create_moe_param_groups`` did not make in this process, for
    groups that were changed afterwards, and where two parameters have one name.

    Args:
        groups: name and parameters of each, in the order of the optimizer.
        name_of: the qualified name of a parameter.
    """
    made = _made_of(groups)
    if made is None:
        return None
    params = [param for _, own in groups for param in own]
    found: dict[int, OriginRow] = {}
    keyed = ((row, key) for _, key, _, rows in made.plan for row in rows)
    for (row, key), param in zip(keyed, params, strict=True):
        name = name_of(param)
        tag = get_expert_tag(param, name)
        layer, number = (tag.layer, tag.expert_number) if tag else (None, None)
        group, _, variant, dtype, _ = key
        found[row] = OriginRow(name, group, layer, number, variant, dtype)
    if len({row.name for row in found.values()}) < len(found):
        return None
    rows = [found[row] for row in sorted(found)]
    labels = [row.layer for row in rows]
    wanted = [bool(row.variant.overrides) for row in rows]
    if any(wanted):
        around = layers_around([row.name for row in rows], labels, wanted)
        rows = [
            row._replace(layer=row.layer or layer) for row, layer in zip(rows, around, strict=True)
        ]
    return Origin(tuple(rows), tuple(made.names), made.frozen_experts)
