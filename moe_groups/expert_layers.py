"""Find the MoE layers of a model and say which expert each parameter belongs to.

Three kinds are known: DeepSpeed's ``MoE`` (ours included), hand-made experts (parameters
with ``allreduce = False`` and a ``group_name``), and fused experts (one tensor for all
experts of a layer, as in AutoEP and in Hugging Face's ``*Experts`` modules).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moe_groups import _deepspeed
from moe_groups.errors import TagError
from moe_groups.hand_made import Place, find_flags, find_places, is_fused, layer_path
from moe_groups.module_names import ModuleNode, named_parameters, walk
from moe_groups.tags import (
    ExpertTag,
    check_label,
    get_expert_tag,
    label_from_path,
    new_layer_id,
    write_checked_tag,
)


@dataclass(frozen=True, slots=True)
class TaggedModel:
    """A model's parameters with their names and tags, as found; nothing is written yet.

    Attributes:
        names: ``(qualified name, parameter)`` in the model's order, each once.
        tags: ``id(parameter)`` of each expert parameter to its tag.
        inside: ``id(parameter)`` to the path of its layer and its name inside the expert,
            as in ``("blocks.1.moe", "w1.weight")``.
        labels: ``id(parameter)`` to its layer's label, where that is the module's path.
    """

    names: list[tuple[str, torch.Tensor]]
    tags: dict[int, ExpertTag]
    inside: dict[int, tuple[str, str]]
    labels: dict[int, str]

    def write(self) -> None:
        """Set the tags on the parameters."""
        layer_ids: dict[str | None, int] = {}
        for _, param in self.names:
            tag = self.tags.get(id(param))
            if tag is not None:
                write_checked_tag(param, tag)
                if tag.layer not in layer_ids:
                    layer_ids[tag.layer] = new_layer_id()
                param.expert_layer_id = layer_ids[tag.layer]  # type: ignore[attr-defined]
                if id(param) in self.labels:
                    param.expert_label_found = tag.layer  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """The tags are on the parameters inside, and afterwards unless there was an error."""
        experts = [param for _, param in self.names if id(param) in self.tags]
        before = [dict(param.__dict__) for param in experts]
        try:
            self.write()
            yield
        except BaseException:
            for param, attributes in zip(experts, before, strict=True):
                param.__dict__.clear()
                param.__dict__.update(attributes)
            raise


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


_BY_HAND = "(named by hand)"


class _Finder:
    """One search through a model."""

    def __init__(self, nodes: list[ModuleNode]) -> None:
        self.nodes = nodes
        self.found = TaggedModel(list(named_parameters(nodes)), {}, {}, {})
        self.layer_paths: dict[str, str] = {}

    def tag_deepspeed_layers(self) -> None:
        types = _deepspeed.moe_layer_types()
        index = 0
        while index < len(self.nodes):
            layer = self.nodes[index]
            if isinstance(layer.module, types):
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
                self.found.inside[id(param)] = layer.path, name[len(expert.path) + 1 :]
                trainable = trainable or param.requires_grad
        if trainable:  # PEFT keeps a frozen original beside the copy that it trains
            self._claim(label, layer.path)

    def tag_hand_made_experts(self) -> None:
        flags = find_flags(self.nodes, self.found.tags)
        if not flags:
            return
        places = find_places(self.nodes, flags)
        owners = {id(param): node for node in self.nodes for _, param in node.params}
        for name, param in self.found.names:
            flagged = flags.get(id(param))
            if flagged is not None:
                place = places.get(id(flagged))
                self._tag_hand_made(owners[id(flagged)], name, param, flagged, place)

    def _tag_hand_made(
        self,
        owner: ModuleNode,
        name: str,
        param: torch.Tensor,
        flagged: torch.Tensor,
        place: Place | None,
    ) -> None:
        """Tag ``param`` like ``flagged``, which belongs to ``owner``."""
        tag = get_expert_tag(flagged, name)
        assert tag is not None
        by_hand = tag.layer not in (None, vars(flagged).get("expert_label_found"))
        path = _BY_HAND if by_hand and place is None else ""
        if place is None:
            place = Place(layer_path(owner.path), owner.path)
        number, count = tag.expert_number, tag.num_local_experts
        if number is None:
            number, count = place.number, place.siblings
        label = tag.layer
        if label is None or not by_hand:
            label = label_from_path(place.layer) or "experts"
            self.found.labels[id(param)] = label
        path = path or place.layer
        if self.layer_paths.get(label) != path:
            self._claim(label, path)
        fused = number is None and param is flagged and (tag.fused or is_fused(owner, param))
        self.found.tags[id(param)] = ExpertTag(tag.parallel_group, label, number, count, fused)
        self.found.inside[id(param)] = place.layer, name[len(place.inside) :].lstrip(".")

    def _claim(self, label: str, path: str) -> None:
        check_label(label)
        other = self.layer_paths.setdefault(label, path)
        if other != path:
            raise TagError(
                f"two MoE layers are called {label!r}: {other or '(the root)'!r} and "
                f"{path or '(the root)'!r}. Give each layer an expert_group_name of its own, "
                "or none to use its module name."
            )
