"""Size, dtype, place and variant of each parameter: what the plan needs to know."""

from itertools import chain

from moe_groups.errors import ParameterInputError, TagError
from moe_groups.inputs import GroupInput
from moe_groups.plan import Place, Run, SplitBy, Table
from moe_groups.rules import Rules, Variant, addresses
from moe_groups.tags import (
    check_label,
    check_number,
    check_parallel_group,
    get_expert_tag,
    is_expert_parameter,
    shape_of,
)


def read_table(given: GroupInput, rules: Rules, split_by: SplitBy) -> Table:
    """The table of all parameters; the rows in its runs are those to be stepped.

    Raises:
        ParameterInputError: nothing is trainable, or all experts are frozen.
        TagError: an expert parameter has no layer name, or two layers have the same.
        OverrideError: a pattern matches nothing, or two set different values.
    """
    sizes, runs = _read_runs(given, split_by)
    _check_trainable(given, runs)
    if given.model is None:
        _check_tags(given, runs, split_by)
    variants, kinds = given.sources, [Variant(index) for index in range(len(given.groups))]
    if rules.active:
        variants, kinds = _apply(rules, given, runs)
    return Table(sizes, runs, variants, kinds)


def _read_runs(given: GroupInput, split_by: SplitBy) -> tuple[list[int], list[Run]]:
    """Size of each parameter, and runs of trainable ones with the same place and dtype.

    Looks at each parameter once: with tens of thousands of them, reading attributes of
    tensors is what grouping costs.
    """
    tags = None if given.model is None else given.model.tags
    by_expert = split_by == "expert"
    sizes: list[int] = []
    runs: list[Run] = []
    start, here, here_dtype, here_layer = 0, None, None, None
    place: Place | None
    layer: int | None = None
    for row, param in enumerate(given.params):
        attributes = param.__dict__
        size = attributes["ds_numel"] if "ds_numel" in attributes else param.numel()
        sizes.append(size)
        dtype = param.dtype if size and param.requires_grad else None
        if tags is not None:
            tag = tags.get(id(param))
            place = tag.place if tag else None
        elif attributes.get("allreduce", True):
            place = None
        else:
            get = attributes.get
            number = get("expert_number") if by_expert else None
            place = get("group_name", ""), get("expert_group_name"), number
            layer = get("expert_layer_id")
        if place != here or dtype is not here_dtype or layer != here_layer:
            if here_dtype is not None:
                runs.append((start, row, here, here_dtype))
            start, here, here_dtype, here_layer = row, place, dtype, layer
    if here_dtype is not None:
        runs.append((start, len(sizes), here, here_dtype))
    return sizes, runs


def _check_tags(given: GroupInput, runs: list[Run], split_by: SplitBy) -> None:
    """Check each distinct tag once, and that no two layers of ours have one label."""
    first: dict[tuple[str, str | None, int | None], int] = {}
    for start, _, place, _ in runs:
        if place is not None:
            group, label, number = place
            if type(group) is not str or (
                number is not None and (type(number) is not int or number < 0)
            ):
                check_parallel_group(group, _row_name(given, start))
                check_number(number, _row_name(given, start))
            where = group, label, given.params[start].__dict__.get("expert_layer_id")
            if where not in first:
                first[where] = start
    layers: dict[str, tuple[int, int]] = {}
    for (_, label, layer_id), row in first.items():
        param, name = given.params[row], _row_name(given, row)
        get_expert_tag(param, name)  # raises where DeepSpeed's attributes are unusable
        if label is None:
            if split_by != "parallel_group":
                raise TagError(
                    f"{name}, an expert of shape {tuple(shape_of(param))}, does not know its "
                    "layer: pass the module instead of its parameters (also inside of an "
                    "optimizer=lambda params: ...), call tag_experts(module) before, or give the "
                    "layer an expert_group_name."
                )
            continue
        check_label(label)
        if layer_id is not None and layers.setdefault(label, (layer_id, row))[0] != layer_id:
            raise TagError(
                f"two MoE layers are called {label!r}: that of "
                f"{_row_name(given, layers[label][1])} and that of {name}. Give each layer an "
                "expert_group_name of its own."
            )


def _row_name(given: GroupInput, row: int) -> str:
    return given.names[row] or f"parameter {row} of the input"


def _check_trainable(given: GroupInput, runs: list[Run]) -> None:
    if not runs:
        raise ParameterInputError(
            f"none of the {len(given.params)} parameters is trainable: set requires_grad on those "
            "that the optimizer shall step."
        )
    if any(place is not None for _, _, place, _ in runs):
        return
    tags = None if given.model is None else given.model.tags
    for row, param in enumerate(given.params):
        if is_expert_parameter(param) if tags is None else id(param) in tags:
            raise ParameterInputError(
                f"all expert parameters are frozen (the first is {_row_name(given, row)}), and "
                "DeepSpeed's ZeRO-1/2 and BF16_Optimizer refuse a model with MoE layers but no "
                "MoE group. Leave one expert parameter trainable; lr=0 and weight_decay=0 in "
                "overrides keep its value."
            )


def _apply(rules: Rules, given: GroupInput, runs: list[Run]) -> tuple[list[int], list[Variant]]:
    """The variant of each parameter, as an index into the sorted variants."""
    found = [Variant(source) for source in given.sources]
    example: list[str] = []
    for row in chain.from_iterable(range(start, stop) for start, stop, _, _ in runs):
        param, name, source = given.params[row], given.names[row], given.sources[row]
        if given.model is None:
            tag, inside = get_expert_tag(param, name), ("", "")
        else:
            tag = given.model.tags.get(id(param))
            inside = given.model.inside.get(id(param), ("", ""))
        names = addresses(name, tag, *inside)
        if tag is not None and not example:
            example = names
        found[row] = rules.variant(source, given.groups[source], name, param, names)
    rules.check_all_matched([*example, *list(filter(None, given.names))[:2]])
    kinds = sorted(set(found))
    index = {variant: number for number, variant in enumerate(kinds)}
    return [index[variant] for variant in found], kinds
