"""Hand-made and fused experts: who is one, and which expert of which list it is.

DeepSpeed knows them by ``allreduce = False`` alone; layer and number are read off the tree
of modules. Each function looks at a module a bounded number of times: models have tens of
thousands of them.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from moe_groups.module_names import ModuleNode, named_parameters, wrapper_slots
from moe_groups.tags import is_expert_parameter, shape_of

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Place(NamedTuple):
    """Where in the tree an expert stands.

    Attributes:
        layer: path of its layer.
        inside: path that the names of its parameters begin with.
        number: its number in the list of experts; None without a list.
        siblings: length of the list.
    """

    layer: str
    inside: str
    number: int | None = None
    siblings: int | None = None


def find_flags(nodes: list[ModuleNode], known: Collection[int]) -> dict[int, torch.Tensor]:
    """For each expert parameter that is not ``known`` the one whose attributes say so.

    That is itself, or for what PEFT adds the parameter that it adapts or copies: a copy has
    the name of its original. Keys are ``id(parameter)``.
    """
    rest = [
        (index, name, param)
        for index, node in enumerate(nodes)
        for name, param in node.params
        if id(param) not in known
    ]
    originals = {name: param for _, name, param in rest if is_expert_parameter(param)}
    if not originals:
        return {}
    flags: dict[int, torch.Tensor] = {}
    adapters = any("base_layer" in wrapper_slots(node.module) for node in nodes)
    for index, name, param in rest:
        flagged = _adapted(nodes, index) if adapters else None
        if flagged is None:
            flagged = param if is_expert_parameter(param) else originals.get(name)
        if flagged is not None:
            flags[id(param)] = flagged
    return flags


def _adapted(nodes: list[ModuleNode], index: int) -> torch.Tensor | None:
    """An expert parameter that the PEFT adapter around ``nodes[index]`` adapts, if any."""
    slot = ""
    while index >= 0:
        node = nodes[index]
        if slot != "base_layer" and "base_layer" in wrapper_slots(node.module):
            params = node.module._modules["base_layer"].parameters()  # type: ignore[union-attr]
            return next((p for p in params if is_expert_parameter(p)), None)
        index, slot = node.parent, node.slot
    return None


def find_places(nodes: list[ModuleNode], flags: Mapping[int, torch.Tensor]) -> dict[int, Place]:
    """``id(parameter)`` to its place, for all parameters below a list of experts.

    An expert may itself be made of lists, and lists of layers hold lists of experts. The
    innermost list whose name speaks of experts wins, then the innermost ModuleList or
    ModuleDict whose children are all experts with the same tensors.
    """
    named, unnamed = [], []
    for index, node in enumerate(nodes if flags else []):
        if not isinstance(node.module, _CONTAINERS):
            continue
        if "expert" in node.slot:
            if _all_experts(nodes, index, flags):
                named.append(index)
        elif not isinstance(node.module, nn.Sequential) and _same_experts(nodes, index, flags):
            unnamed.append(index)
    places: dict[int, Place] = {}
    for index in [*unnamed, *named]:  # later ones, which are further inside, win
        children = _children(nodes, index)
        layer = layer_path(nodes[index].path)
        for number, child in enumerate(children):
            place = Place(layer, nodes[child].path, number, len(children))
            for _, param in _params(nodes, child):
                places[id(param)] = place
    return places


def _children(nodes: list[ModuleNode], index: int) -> list[int]:
    children, child = [], index + 1
    while child < nodes[index].stop:
        children.append(child)
        child = nodes[child].stop
    return children


def _params(nodes: list[ModuleNode], index: int) -> Iterator[tuple[str, torch.Tensor]]:
    return named_parameters(nodes[index : nodes[index].stop])


def _all_experts(nodes: list[ModuleNode], index: int, flags: Mapping[int, torch.Tensor]) -> bool:
    """Does each child hold an expert parameter (not just what PEFT added to one)?"""
    return all(
        any(flags.get(id(param)) is param for _, param in _params(nodes, child))
        for child in _children(nodes, index)
    )


def _same_experts(nodes: list[ModuleNode], index: int, flags: Mapping[int, torch.Tensor]) -> bool:
    """Do all children hold nothing but expert parameters, in the same shapes?"""
    if not _all_experts(nodes, index, flags):
        return False
    signatures = set()
    for child in _children(nodes, index):
        params = list(_params(nodes, child))
        if not all(id(param) in flags for _, param in params):
            return False
        if any(len(shape_of(param)) == 3 for _, param in params):
            return False  # a layer's fused experts, not one expert
        skip = len(nodes[child].path)
        signatures.add(tuple((name[skip:], shape_of(param)) for name, param in params))
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
