"""Find the MoE layers of a model and say which expert each parameter belongs to.

Three kinds are known: DeepSpeed's ``MoE`` (ours included), hand-made experts (parameters
with ``allreduce = False`` and a ``group_name``), and fused experts (one tensor for all
experts of a layer, as in AutoEP and in Hugging Face's ``*Experts`` modules).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from moe_groups import _deepspeed
from moe_groups.errors import TagError
from moe_groups.module_names import ModuleNode, named_parameters, walk, wrapper_slots
from moe_groups.tags import (
    ExpertTag,
    check_label,
    get_expert_tag,
    is_expert_parameter,
    label_from_path,
    set_expert_tag,
    shape_of,
)


@dataclass(frozen=True, slots=True)
class TaggedModel:
    """A model's parameters with their names and tags, as found; nothing is written yet.

    Attributes:
        names: ``(qualified name, parameter)`` in the model's order, each once.
        tags: ``id(parameter)`` of each expert parameter to its tag.
        inner: ``id(parameter)`` to its name inside the expert, as in ``w1.weight``.
    """

    names: list[tuple[str, torch.Tensor]]
    tags: dict[int, ExpertTag]
    inner: dict[int, str]

    def write(self) -> None:
        """Set the tags on the parameters."""
        for _, param in self.names:
            tag = self.tags.get(id(param))
            if tag is not None:
                set_expert_tag(param, tag)


def tag_experts(model: nn.Module) -> dict[str, ExpertTag]:
    """Tag every expert parameter of ``model`` with its layer and expert number.

    For models that were not built with :class:`moe_groups.MoE`: DeepSpeed's own layers,
    hand-made experts, fused experts, and adapters that PEFT added inside of experts
    (they are marked as expert parameters, else DeepSpeed would average them over
    different experts). A layer without an ``expert_group_name`` is labelled with its
    qualified module name; a label that a hand-made expert carries is kept. Safe to call
    again, as after a change of the model.

    Args:
        model: the module, wrapped or not.

    Returns:
        Qualified parameter name to tag, for each expert parameter.

    Raises:
        TagError: two layers with one name, or an expert parameter without a usable
            ``group_name``. Nothing has been tagged then.

    Example:
        >>> tags = tag_experts(model)                            # doctest: +SKIP
        >>> tags["blocks.1.ffn.experts.3.w1.weight"]             # doctest: +SKIP
        ExpertTag(parallel_group='ep_size_2', layer='blocks.1.ffn', expert_number=3, ...)
    """
    found = find_experts(model)
    found.write()
    return {name: found.tags[id(p)] for name, p in found.names if id(p) in found.tags}


def find_experts(model: nn.Module) -> TaggedModel:
    """Names and tags of all parameters of ``model``; changes nothing.

    Raises:
        TagError: as :func:`tag_experts`.
    """
    finder = _Finder(walk(model))
    finder.tag_deepspeed_layers()
    finder.tag_hand_made_experts()
    return finder.found


class _Finder:
    """One search. Containers are judged once, from the top, so that it stays linear."""

    def __init__(self, nodes: list[ModuleNode]) -> None:
        self.nodes = nodes
        self.found = TaggedModel(list(named_parameters(nodes)), {}, {})
        self.layer_paths: dict[str, str] = {}

    def tag_deepspeed_layers(self) -> None:
        index = 0
        while index < len(self.nodes):
            layer = self.nodes[index]
            if _deepspeed.is_moe_layer(layer.module):
                self._tag_layer(index)
                index = layer.stop
            else:
                index += 1

    def _tag_layer(self, index: int) -> None:
        """Tag everything below the experts of the DeepSpeed ``MoE`` at ``nodes[index]``."""
        layer = self.nodes[index]
        parallel_group = _deepspeed.layer_parallel_group(layer.module)
        numbers = {id(e): n for n, e in enumerate(_deepspeed.layer_experts(layer.module))}
        given = getattr(layer.module, "group_label", None)
        label = given or label_from_path(layer.path) or "moe"
        trainable = False
        for start in range(index, layer.stop):
            expert = self.nodes[start]
            number = numbers.get(id(expert.module))
            if number is None:
                continue
            tag = ExpertTag(parallel_group, label, number, len(numbers))
            for name, param in named_parameters(self.nodes[start : expert.stop]):
                self.found.tags[id(param)] = tag
                self.found.inner[id(param)] = name[len(expert.path) + 1 :]
                trainable = trainable or param.requires_grad
        if trainable:  # PEFT keeps a frozen original beside the copy that it trains
            self._claim(label, layer.path)

    def tag_hand_made_experts(self) -> None:
        places = self._places()
        for index, node in enumerate(self.nodes):
            for name, param in node.params:
                if id(param) in self.found.tags:
                    continue
                flagged = param if is_expert_parameter(param) else self._adapted(index)
                if flagged is not None:
                    place = places.get(id(param)) or _Place(_layer_path(node.path), node.path)
                    self._tag_hand_made(node, name, param, flagged, place)

    def _tag_hand_made(
        self,
        owner: ModuleNode,
        name: str,
        param: torch.Tensor,
        flagged: torch.Tensor,
        place: "_Place",
    ) -> None:
        tag = get_expert_tag(flagged, name)
        assert tag is not None
        number, count = tag.expert_number, tag.num_local_experts
        if number is None:
            number, count = place.number, place.count
        label = tag.layer or label_from_path(place.layer) or "experts"
        if self.layer_paths.get(label) != place.layer:
            self._claim(label, place.layer)
        fused = tag.fused or (number is None and _is_fused(owner, param))
        self.found.tags[id(param)] = ExpertTag(tag.parallel_group, label, number, count, fused)
        self.found.inner[id(param)] = name[len(place.inside) :].lstrip(".")

    def _adapted(self, index: int) -> torch.Tensor | None:
        """An expert parameter that the PEFT adapter around ``nodes[index]`` adapts, if any."""
        slot = ""
        while index >= 0:
            node = self.nodes[index]
            if slot != "base_layer" and "base_layer" in wrapper_slots(node.module):
                params = node.module._modules["base_layer"].parameters()  # type: ignore[union-attr]
                return next((p for p in params if is_expert_parameter(p)), None)
            index, slot = node.parent, node.slot
        return None

    def _claim(self, label: str, path: str) -> None:
        check_label(label)
        other = self.layer_paths.setdefault(label, path)
        if other != path:
            raise TagError(
                f"two MoE layers are called {label!r}: {other or '(the root)'!r} and "
                f"{path or '(the root)'!r}. Give each layer an expert_group_name of its own, "
                "or none to use its module name."
            )

    def _places(self) -> dict[int, "_Place"]:
        """Which expert of which list each parameter below a list of experts belongs to.

        An expert may itself be made of lists, and lists of layers hold lists of experts.
        The innermost list whose name speaks of experts wins, then the innermost ModuleList
        or ModuleDict whose children are all experts with the same tensors.
        """
        named, unnamed = [], []
        for index, node in enumerate(self.nodes):
            if not isinstance(node.module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                continue
            if "expert" in node.slot:
                if self._all_experts(index):
                    named.append(index)
            elif not isinstance(node.module, nn.Sequential) and self._same_experts(index):
                unnamed.append(index)
        places: dict[int, _Place] = {}
        for index in [*unnamed, *named]:  # later ones, which are further inside, win
            children = self._children(index)
            layer = _layer_path(self.nodes[index].path)
            for number, child in enumerate(children):
                place = _Place(layer, self.nodes[child].path, number, len(children))
                for _, param in self._params(child):
                    places[id(param)] = place
        return places

    def _children(self, index: int) -> list[int]:
        children, child = [], index + 1
        while child < self.nodes[index].stop:
            children.append(child)
            child = self.nodes[child].stop
        return children

    def _params(self, index: int) -> Iterator[tuple[str, torch.Tensor]]:
        return named_parameters(self.nodes[index : self.nodes[index].stop])

    def _all_experts(self, index: int) -> bool:
        """Does each child hold an expert parameter?"""
        return all(
            any(is_expert_parameter(param) for _, param in self._params(child))
            for child in self._children(index)
        )

    def _same_experts(self, index: int) -> bool:
        """Do all children hold nothing but expert parameters, in the same shapes?"""
        signatures = set()
        for child in self._children(index):
            params = list(self._params(child))
            if not params or not all(is_expert_parameter(param) for _, param in params):
                return False
            skip = len(self.nodes[child].path)
            signatures.add(tuple((name[skip:], shape_of(param)) for name, param in params))
            if len(signatures) > 1:
                return False
        return bool(signatures)


class _Place(NamedTuple):
    """The layer's path, the path that an expert's parameters start with, and its number."""

    layer: str
    inside: str
    number: int | None = None
    count: int | None = None


def _layer_path(path: str) -> str:
    """The layer's path: what is left without trailing ``experts`` components."""
    parts = path.split(".")
    while len(parts) > 1 and parts[-1] in ("experts", "deepspeed_experts"):
        parts.pop()
    return ".".join(parts)


def _is_fused(owner: ModuleNode, param: torch.Tensor) -> bool:
    """Is ``param`` one tensor for all experts: 3-D itself, or beside one that is 3-D?"""
    beside = (p for _, p in owner.params if is_expert_parameter(p))
    return any(len(shape_of(p)) == 3 for p in (param, *beside))
