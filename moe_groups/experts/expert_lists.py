"""Hand-made and fused experts: which parameters are theirs, and which expert of which list.

DeepSpeed knows them by ``allreduce = False`` alone; layer and number are read off the tree
of modules. Each function looks at a module a bounded number of times: models have tens of
thousands of them.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from moe_groups.experts.module_tree import ModuleNode, wrapper_slots
from moe_groups.tags import is_expert_parameter, shape_of

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Place(NamedTuple):
    """Where in the tree an expert of a list stands.

    Attributes:
        layer: path of its layer.
        path: of the expert.
        number: its number in the list.
        siblings: length of the list.
    """

    layer: str
    path: str
    number: int
    siblings: int


def find_flags(nodes: list[ModuleNode], known: Sequence[object]) -> dict[int, int]:
    """The rows of expert parameters, each with the row of the one whose attributes say so.

    That is the row itself, or for a PEFT adapter or copy the parameter that it adapts or
    copies; a copy has the name of its original.

    Args:
        nodes: the tree.
        known: for each row what has been found already; only where that is None it is looked at.
    """
    names, params, kinds = nodes[0].columns
    experts = {
        row: row
        for row, (param, found) in enumerate(zip(params, known, strict=True))
        if found is None and not param.__dict__.get("allreduce", True)
    }
    slots = {slot for kind in kinds for slot in wrapper_slots(kind)}
    if not (experts and slots):
        return experts
    originals = {names[row]: row for row in experts}
    row_of = {id(param): row for row, param in enumerate(params)}
    flags: dict[int, int] = {}
    for row, name in enumerate(names):
        if known[row] is None:
            adapted = _adapted(nodes, owner_of(nodes, row)) if "base_layer" in slots else None
            flag = experts.get(row, originals.get(name))
            if adapted is not None:
                flag = row_of[id(adapted)]
            if flag is not None:
                flags[row] = flag
    return flags


def owner_of(nodes: list[ModuleNode], row: int) -> int:
    """Index of the module that holds the parameter in this row."""
    return bisect_right(nodes, row, key=lambda node: node.row) - 1


def _adapted(nodes: list[ModuleNode], index: int) -> torch.Tensor | None:
    """An expert parameter that the PEFT adapter around ``nodes[index]`` adapts, if any."""
    slot = ""
    while index >= 0:
        node = nodes[index]
        if slot != "base_layer" and "base_layer" in wrapper_slots(type(node.module)):
            params = node.module._modules["base_layer"].parameters()  # type: ignore[union-attr]
            return next((p for p in params if is_expert_parameter(p)), None)
        index, slot = node.parent, node.slot
    return None


def find_places(nodes: list[ModuleNode], flags: Mapping[int, int]) -> list[Place | None]:
    """The place of each row that is below a list of experts.

    An expert may itself be made of lists, and lists of layers hold lists of experts. The
    innermost list with "expert" in its name wins, then the innermost ModuleList or
    ModuleDict whose children are all experts with the same tensors.
    """
    tagged = {row for row, flag in flags.items() if row == flag}
    named, unnamed = [], []
    for index in nodes[0].columns.modules(_CONTAINERS):
        node = nodes[index]
        if isinstance(node.module, nn.Sequential) and "expert" not in node.slot:
            continue
        children = _children(nodes, index)
        # an expert holds a parameter that is tagged, not just what PEFT added to one
        if any(tagged.isdisjoint(range(child.row, child.row_stop)) for child in children):
            continue
        if "expert" in node.slot:
            named.append((node, children))
        elif _are_experts(children, flags):
            unnamed.append((node, children))
    places: list[Place | None] = [None] * len(nodes[0].columns.params)
    for node, children in [*unnamed, *named]:  # later ones, which are further inside, win
        layer = layer_path(node.path)
        for number, child in enumerate(children):
            place = Place(layer, child.path, number, len(children))
            places[child.row : child.row_stop] = [place] * (child.row_stop - child.row)
    return places


def _children(nodes: list[ModuleNode], index: int) -> list[ModuleNode]:
    children, child = [], index + 1
    while child < nodes[index].stop:
        children.append(nodes[child])
        child = nodes[child].stop
    return children


def _are_experts(children: list[ModuleNode], flags: Mapping[int, int]) -> bool:
    """Do all modules hold only expert parameters, of the same shapes?"""
    signatures = set()
    for child in children:
        rows, (names, params, _) = range(child.row, child.row_stop), child.columns
        if not all(row in flags for row in rows):
            return False
        if any(len(shape_of(params[row])) == 3 for row in rows):
            return False  # a layer's fused experts, not one expert
        skip = len(child.path)
        signatures.add(tuple((names[row][skip:], shape_of(params[row])) for row in rows))
        if len(signatures) > 1:
            return False
    return bool(signatures)


def layer_path(path: str) -> str:
    """The layer's path: what is left without trailing ``experts`` components."""
    parts = path.split(".")
    while len(parts) > 1 and parts[-1] in ("experts", "deepspeed_experts"):
        parts.pop()
    return ".".join(parts)


def is_fused(owner: ModuleNode, param: torch.Tensor) -> bool:
    """Is ``param`` one tensor for all experts: 3-D itself, or beside one that is 3-D?"""
    beside = (p for _, p in owner.params if is_expert_parameter(p))
    return any(len(shape_of(p)) == 3 for p in (param, *beside))
