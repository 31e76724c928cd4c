"""What a run's groups were made from, so that a checkpoint can be grouped anew without the model.

``create_moe_param_groups`` remembers here what it grouped. When the engine writes a checkpoint,
its groups are looked up, and what they were made from goes into ``moe_groups.json``. Nothing is
kept in the group dicts, which DeepSpeed saves and compares; and nothing keeps a model alive.
"""

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import torch
from torch.utils.weak import WeakIdKeyDictionary

from moe_groups._common.arguments import SplitBy
from moe_groups.groups.keys import NO_EXPERT, Families, Key, PlannedGroup, Table
from moe_groups.groups.names import given_name
from moe_groups.groups.rules import Variant
from moe_groups.tags import get_expert_tag, is_expert_parameter, numel_of


class OriginRow(NamedTuple):
    """What decides the group of one parameter.

    Attributes:
        name: qualified name on the ranks that have the parameter.
        parallel_group: ``ep_size_<N>``; None for a dense parameter.
        layer: label of the MoE layer; None for a dense parameter, and where no tag says it.
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
    """Groups that were made, and the parameters in the order in which they were given."""

    plan: list[PlannedGroup]
    params: list["weakref.ref[torch.Tensor]"]
    names: list[str | None]


_Shape: TypeAlias = tuple[tuple[str, int], ...]
"""Name and number of parameters of each group."""

_made: "WeakIdKeyDictionary" = WeakIdKeyDictionary()
"""The first parameter of groups that were made to these, by their shape."""


def remember_groups(
    plan: list[PlannedGroup],
    params: Sequence[torch.Tensor],
    sources: Sequence[Mapping[str, object]],
) -> None:
    """Keep what groups were made from for as long as their parameters live.

    Args:
        plan: the groups.
        params: all parameters in the order in which they were given; the plan's rows.
        sources: the caller's groups, for their names.
    """
    shape: _Shape = tuple((name, len(rows)) for name, _, _, rows in plan)
    names = [given_name(source.get("name")) for source in sources]
    first = params[plan[0][3][0]]
    _made.setdefault(first, {})[shape] = _Made(plan, list(map(weakref.ref, params)), names)


def origin_of(
    groups: Sequence[tuple[str, Sequence[torch.Tensor]]], name_of: Callable[[torch.Tensor], str]
) -> Origin | None:
    """What an optimizer's groups were made from; None where it is not known.

    That is so for groups that ``create_moe_param_groups`` did not make in this process, for
    groups that were changed afterwards, and where two parameters have one name.

    Args:
        groups: name and parameters of each, in the order of the optimizer.
        name_of: the qualified name of a parameter.
    """
    made = _find(groups)
    if made is None:
        return None
    keys = {row: key for _, key, _, rows in made.plan for row in rows}
    found: list[OriginRow] = []
    frozen_experts = False
    for row, reference in enumerate(made.params):
        param = reference()
        if param is not None and row in keys:
            name = name_of(param)
            tag = get_expert_tag(param, name)
            layer, number = (tag.layer, tag.expert_number) if tag else (None, None)
            group, _, variant, dtype, _ = keys[row]
            found.append(OriginRow(name, group, layer, number, variant, dtype))
        elif param is not None:
            frozen_experts |= is_expert_parameter(param) and numel_of(param) > 0
    if len({row.name for row in found}) < len(found):
        return None
    return Origin(tuple(found), tuple(made.names), frozen_experts)


def _find(groups: Sequence[tuple[str, Sequence[torch.Tensor]]]) -> _Made | None:
    """The last call that made exactly these groups."""
    shape: _Shape = tuple((name, len(params)) for name, params in groups)
    if not shape or not shape[0][1]:
        return None
    made: _Made | None = _made.get(groups[0][1][0], {}).get(shape)
    if made is None:
        return None
    planned = [made.params[row]() for _, _, _, rows in made.plan for row in rows]
    stepped = [param for _, params in groups for param in params]
    return made if all(map(operator.is_, planned, stepped)) else None
