"""Size, dtype, place and variant of each parameter: what the plan needs to know."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias, cast

import torch

from moe_groups._common.arguments import SplitBy
from moe_groups.errors import ParameterInputError, TagError
from moe_groups.groups.inputs import GroupInput
from moe_groups.groups.keys import NO_EXPERT, Families, Key, Rows, Table
from moe_groups.groups.rules import Rules, Variant
from moe_groups.tags import (
    addresses,
    check_label,
    check_number,
    get_expert_tag,
    layers_around,
    numel_of,
    shape_of,
)

Place: TypeAlias = tuple[Any, Any, Any, Any]
"""An expert's parallel group, layer, number and layer id, as found and not yet checked."""

_DENSE: Place = (None, None, None, None)
_NAME = (str, type(None))


def read_table(given: GroupInput, rules: Rules, split_by: SplitBy) -> Table:
    """The table of all parameters; the rows in its families are those to be stepped.

    Raises:
        ParameterInputError: nothing is trainable.
        TagError: an expert parameter has no layer name, or two layers have the same.
        OverrideError: a pattern matches nothing, or two set different values.
    """
    rules.check_options(given.groups)
    reader = _Reader(given, split_by)
    families = reader.read()
    _check_trainable(given, families)
    if rules.active:
        variants = _apply(rules, given, families)
        families = _split(families, "variant", variants)
        if split_by != "parallel_group" and any(variant.overrides for variant in variants):
            families = _by_layer(families, given, variants)
    elif len(given.groups) > 1:
        families = _split(families, "variant", [Variant(source) for source in given.sources])
    if any(hasattr(kind, "device_mesh") for kind in set(map(type, given.params))):
        meshes = [getattr(param, "device_mesh", None) for param in given.params]
        families = _split(families, "mesh", meshes)
    return Table(reader.sizes, families)


class _Reader:
    """Looks at each parameter once, and checks each distinct tag once."""

    def __init__(self, given: GroupInput, split_by: SplitBy) -> None:
        self.given = given
        self.by_layer, self.by_expert = split_by != "parallel_group", split_by == "expert"
        self.sizes: list[int] = []
        self.families: dict[Key, dict[int, list[int]]] = {}
        self.layers: dict[str, tuple[int, int]] = {}

    def read(self) -> Families:
        """Put the rows of one family and expert together; fills in the sizes on the way."""
        known: dict[Any, dict[int, list[int]]] = {}
        last: Any = None
        experts: dict[int, list[int]] = {}
        for row, (param, place) in enumerate(zip(self.given.params, self._places(), strict=True)):
            size = numel_of(param)
            self.sizes.append(size)
            if not size or not param.requires_grad:
                continue
            group, label, number, layer_id = place
            around = group, label, layer_id, param.dtype
            if around != last:
                if not (isinstance(group, _NAME) and isinstance(label, _NAME)):
                    self._check(row, label, layer_id)  # it may be unhashable
                last = around
                if around not in known:
                    known[around] = self._family(row, *around)
                experts = known[around]
            if number is None:
                number = NO_EXPERT
            elif type(number) is not int or number < 0:
                check_number(number, _row_name(self.given, row))
            experts.setdefault(number, []).append(row)
        return cast(Families, self.families)

    def _places(self) -> Iterator[Place]:
        """Where each parameter is, as the model or the parameter itself says."""
        if self.given.model is not None:
            last, place = None, _DENSE
            for expert in self.given.model.experts:
                if expert is not last:
                    last, place = expert, _DENSE
                    if expert is not None:
                        group, label, number, *_ = expert.tag
                        place = group, label, number if self.by_expert else None, None
                yield place
            return
        for param in self.given.params:
            get = param.__dict__.get
            if get("allreduce", True):
                yield _DENSE
            else:
                number = get("expert_number") if self.by_expert else None
                group, label = get("group_name") or "", get("expert_group_name")
                yield group, label, number, get("expert_layer_id")

    def _family(
        self, row: int, group: Any, label: Any, layer_id: Any, dtype: torch.dtype
    ) -> dict[int, list[int]]:
        """Where rows like ``row`` go, by expert number."""
        if group is not None and self.given.model is None:
            self._check(row, label, layer_id)
        key = Key(group, label if self.by_layer else None, Variant(0), dtype)
        return self.families.setdefault(key, {})

    def _check(self, row: int, label: Any, layer_id: Any) -> None:
        """Check an expert's tag, and that no two layers of ours have one label."""
        param, name = self.given.params[row], _row_name(self.given, row)
        get_expert_tag(param, name)  # raises where DeepSpeed's attributes are unusable
        if label is None:
            if self.by_layer:
                raise TagError(
                    f"{name}, an expert of shape {tuple(shape_of(param))}, does not know its "
                    "layer: pass the module instead of its parameters (also inside of an "
                    "optimizer=lambda params: ...), call tag_experts(module) before, or give the "
                    "layer an expert_group_name."
                )
            return
        check_label(label)
        if layer_id is None:
            return
        other_id, other = self.layers.setdefault(label, (layer_id, row))
        if other_id != layer_id:
            raise TagError(
                f"two MoE layers are called {label!r}: that of {_row_name(self.given, other)} "
                f"and that of {name}. Give each layer an expert_group_name of its own."
            )


def _by_layer(families: Families, given: GroupInput, variants: Sequence[Variant]) -> Families:
    """Dense parameters inside of MoE layers, as routers, by layer where an override names them.

    So a pattern of one layer selects whole groups, also of options that are set later.
    """
    labels: list[str | None] = [None] * len(given.params)
    for row in (row for key in families if key.parallel_group for row in _rows(families[key])):
        expert = given.model.experts[row] if given.model else None
        param = given.params[row]
        labels[row] = expert.tag.layer if expert else param.__dict__.get("expert_group_name")
    layers = layers_around(given.names, labels, [bool(each.overrides) for each in variants])
    dense = {key: rows for key, rows in families.items() if key.parallel_group is None}
    experts = {key: rows for key, rows in families.items() if key.parallel_group}
    return _split(dense, "layer", layers) | experts


def _rows(experts: dict[int, Rows]) -> Iterator[int]:
    return chain.from_iterable(experts.values())


def _split(families: Families, field: str, values: Sequence[Any]) -> Families:
    """The families with one part for each value that rows have of this field of the key."""
    parts: dict[Key, dict[int, list[int]]] = {}
    for key, experts in families.items():
        for number, rows in experts.items():
            for row in rows:
                part = parts.setdefault(key._replace(**{field: values[row]}), {})
                part.setdefault(number, []).append(row)
    return cast(Families, parts)


def _row_name(given: GroupInput, row: int) -> str:
    return given.names[row] or f"parameter {row} of the input"


def _check_trainable(given: GroupInput, families: Families) -> None:
    if not families:
        raise ParameterInputError(
            f"none of the {len(given.params)} parameters is trainable: set requires_grad on those "
            "that the optimizer should step."
        )


def _apply(rules: Rules, given: GroupInput, families: Families) -> list[Variant]:
    """The variant of each parameter."""
    found = [Variant(source) for source in given.sources]
    example: list[str] = []
    for row in sorted(chain.from_iterable(map(_rows, families.values()))):
        param, name, source = given.params[row], given.names[row], given.sources[row]
        if given.model is None:
            tag = get_expert_tag(param, name)
            names = addresses(name, tag, "", "")
        else:
            expert = given.model.experts[row]
            tag = expert.tag if expert else None
            names = given.model.addresses(row, tag)
        if tag is not None and not example:
            example = names
        found[row] = rules.variant(source, given.groups[source], name, param, names)
    rules.check_all_matched([*example, *list(filter(None, given.names))[:2]])
    return found
