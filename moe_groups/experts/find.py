"""Find the MoE layers of a model and say which expert each parameter belongs to.

Three kinds are known: DeepSpeed's ``MoE`` (ours included), hand-made experts (parameters
with ``allreduce = False`` and a ``group_name``), and fused experts (one tensor for all
experts of a layer, as in AutoEP and in Hugging Face's ``*Experts`` modules).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_groups._common.arguments import Count, checked
from moe_groups._deepspeed.layers import layer_experts, layer_parallel_group, moe_layer_types
from moe_groups.errors import InvalidArgumentError, TagError
from moe_groups.experts.expert_lists import (
    Place,
    find_flags,
    find_places,
    is_fused,
    layer_path,
    owner_of,
)
from moe_groups.experts.module_tree import ModuleNode, named_parameters, walk
from moe_groups.tags import (
    ExpertTag,
    addresses,
    attributes_of,
    check_label,
    check_number,
    get_expert_tag,
    label_from_path,
    new_layer_id,
    set_expert_tag,
)


class FoundExpert(NamedTuple):
    """An expert, or a layer's fused ones.

    Attributes:
        tag: that its parameters get.
        layer: path of its layer.
        path: what the names of its parameters begin with.
        labelled: the label in the tag is the layer's path.
    """

    tag: ExpertTag
    layer: str
    path: str
    labelled: bool


@dataclass(frozen=True, slots=True)
class TaggedModel:
    """A model's parameters with their names and tags, as found; nothing is written yet.

    Attributes:
        names: qualified names of the parameters in the model's order, each once.
        params: the parameters.
        experts: what each of them belongs to; None for dense parameters.
    """

    names: list[str]
    params: list[torch.Tensor]
    experts: list[FoundExpert | None]

    def tags(self) -> dict[int, ExpertTag]:
        """``id(parameter)`` of each expert parameter to its tag."""
        return {id(param): found.tag for found, param in self._found()}

    def name_of(self) -> dict[int, str]:
        """``id(parameter)`` to its qualified name."""
        return dict(zip(map(id, self.params), self.names, strict=True))

    def addresses(self, row: int, tag: ExpertTag | None) -> list[str]:
        """What patterns are compared with (:func:`moe_groups.tags.addresses`)."""
        name, found = self.names[row], self.experts[row]
        layer, path = (found.layer, found.path) if found else ("", "")
        return addresses(name, tag, layer, name[len(path) :].lstrip("."))

    def write(self) -> None:
        """Set the tags on the parameters."""
        layer_ids: dict[str | None, int] = {}
        last = None
        for found, param in self._found():
            if found is not last:
                last, (tag, *_, labelled) = found, found
                if tag.layer not in layer_ids:
                    layer_ids[tag.layer] = new_layer_id()
                attributes = attributes_of(tag)
                attributes["expert_layer_id"] = layer_ids[tag.layer]
                if labelled:
                    attributes["expert_label_found"] = tag.layer
            param.__dict__.update(attributes)

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """The tags are on the parameters inside, and afterwards unless there was an error."""
        with restored_on_error([param for _, param in self._found()]):
            self.write()
            yield

    def _found(self) -> Iterator[tuple[FoundExpert, torch.Tensor]]:
        for found, param in zip(self.experts, self.params, strict=True):
            if found is not None:
                yield found, param


@checked
def tag_experts(
    model: nn.Module, pattern: str | None = None, *, ep_size: Count | None = None
) -> dict[str, ExpertTag]:
    """Tag every expert parameter of ``model`` with its layer and expert number.

    For models that were not built with :class:`moe_groups.MoE`: DeepSpeed's own layers,
    hand-made experts, fused experts, and PEFT adapters inside of experts (which DeepSpeed
    would otherwise average over different experts). A layer without an
    ``expert_group_name`` gets its qualified module name as label; labels of hand-made
    experts are kept. It can be called again, for example after a change of the model.

    With a ``pattern``, all parameters below the modules that it matches become expert
    parameters first. This is for models without DeepSpeed's layers, as with FSDP2: call it after
    ``fully_shard``, which replaces the parameters.

    Args:
        model: the module, wrapped or not.
        pattern: glob pattern of qualified module names, as ``"*.experts"``. A list of
            experts (``nn.ModuleList``) is numbered; a tensor that holds all experts of a
            layer counts as fused.
        ep_size: with a pattern, the number of ranks over which a layer's experts are
            distributed; None is 1. The parallel group is called ``ep_size_<N>``.

    Returns:
        Qualified parameter name to tag, for each expert parameter of the model.

    Raises:
        TagError: two layers have one name, or an expert parameter has no usable
            ``group_name``.
        InvalidArgumentError: ``pattern`` matches nothing, or ``ep_size`` is not a positive
            integer or is given without a pattern. In each case nothing has been tagged.

    Example:
        >>> tags = tag_experts(model)                            # doctest: +SKIP
        >>> tags["blocks.1.ffn.experts.3.w1.weight"]             # doctest: +SKIP
        ExpertTag(parallel_group='ep_size_2', layer='blocks.1.ffn', expert_number=3, ...)
        >>> tag_experts(model, "layers.*.moe.experts", ep_size=8)    # doctest: +SKIP
    """
    if pattern is None:
        if ep_size is not None:
            raise InvalidArgumentError(
                f"tag_experts: ep_size={ep_size!r} needs a pattern. Without one, the group_name of "
                "each parameter gives its expert-parallel size."
            )
        return _written(find_experts(model))
    ep_size = ep_size or 1
    matched = _below(model, pattern)
    group = f"ep_size_{ep_size}"
    with restored_on_error(matched):
        for param in matched:
            set_expert_tag(param, ExpertTag(group))
        found = find_experts(model)
        tags = found.tags()
        own = (tags[id(param)] for param in matched)
        if other := next((tag for tag in own if tag.parallel_group != group), None):
            raise InvalidArgumentError(
                f"tag_experts: {pattern!r} matches experts of layer {other.layer!r}, which are in "
                f"{other.parallel_group!r} by their layer, and not in {group!r}: give its ep_size, "
                "or a pattern that leaves the layer out."
            )
        return _written(found)


@contextlib.contextmanager
def restored_on_error(params: Sequence[torch.Tensor]) -> Iterator[None]:
    """After an error inside, the parameters have the attributes of before."""
    before = [dict(param.__dict__) for param in params]
    try:
        yield
    except BaseException:
        for param, saved in zip(params, before, strict=True):
            param.__dict__.clear()
            param.__dict__.update(saved)
        raise


def _written(found: TaggedModel) -> dict[str, ExpertTag]:
    """Write the tags; they are returned by the names of the parameters."""
    found.write()
    named = zip(found.names, found.experts, strict=True)
    return {name: expert.tag for name, expert in named if expert is not None}


def _below(model: nn.Module, pattern: str) -> list[torch.Tensor]:
    """The parameters of all modules that the pattern matches, each once."""
    nodes = walk(model)
    found = {
        id(param): param
        for index, node in enumerate(nodes)
        if fnmatchcase(node.path, pattern)
        for _, param in named_parameters(nodes[index : node.stop])
    }
    if not found:
        near = [node.path for node in nodes if "expert" in node.slot][:3]
        raise InvalidArgumentError(
            f"tag_experts: no module with parameters matches {pattern!r}"
            + (f"; there are {', '.join(map(repr, near))}." if near else ".")
        )
    return list(found.values())


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
_MARKS = (
    "expert_number",
    "group_name",
    "expert_group_name",
    "num_local_experts",
    "expert_label_found",
    "fused_experts",
)
"""Attributes that parameters of one expert have in common; but for the first, of one layer."""


class _Finder:
    """One search through a model."""

    def __init__(self, nodes: list[ModuleNode]) -> None:
        self.nodes = nodes
        names, params, _ = nodes[0].columns
        self.found = TaggedModel(names, params, [None] * len(names))
        self.layer_paths: dict[str, str] = {}
        self.layers: dict[tuple[Any, ...], tuple[ExpertTag, bool]] = {}

    def tag_deepspeed_layers(self) -> None:
        stop = 0
        for index in self.nodes[0].columns.modules(moe_layer_types()):
            if index >= stop:  # else it is inside of the one before
                self._tag_layer(index)
                stop = self.nodes[index].stop

    def _tag_layer(self, index: int) -> None:
        """Tag everything below the experts of the DeepSpeed ``MoE`` at ``nodes[index]``."""
        layer = self.nodes[index]
        parallel_group = layer_parallel_group(layer.module)
        numbers = {id(e): n for n, e in enumerate(layer_experts(layer.module))}
        given = getattr(layer.module, "group_label", None)
        label = given or label_from_path(layer.path) or "moe"
        trainable = False
        for expert in self.nodes[index : layer.stop]:
            number = numbers.get(id(expert.module))
            if number is None:
                continue
            tag = ExpertTag(parallel_group, label, number, len(numbers))
            found = FoundExpert(tag, layer.path, expert.path, False)
            rows = slice(expert.row, expert.row_stop)
            self.found.experts[rows] = [found] * (expert.row_stop - expert.row)
            trainable = trainable or any(p.requires_grad for p in self.found.params[rows])
        if trainable:  # PEFT keeps a frozen original beside the copy that it trains
            self._claim(label, layer.path)

    def tag_hand_made_experts(self) -> None:
        params, experts = self.found.params, self.found.experts
        flags = find_flags(self.nodes, experts)
        if not flags:
            return
        places = find_places(self.nodes, flags)
        found, last = None, None
        known: tuple[Any, ...] = (None,)
        for row, flag in flags.items():
            place = places[flag]
            if place is None:
                experts[row] = self._alone(row, flag)
                continue
            marks = tuple(map(params[flag].__dict__.get, _MARKS))
            same = place is last and marks == known and type(marks[0]) is type(known[0])
            if not same:  # another expert than that of the row before; True is no 1
                found, last, known = self._expert(row, flag, place, marks), place, marks
            experts[row] = found

    def _expert(self, row: int, flag: int, place: Place, marks: tuple[Any, ...]) -> FoundExpert:
        """What ``row`` belongs to, as the place and the attributes of row ``flag`` say."""
        number, key = marks[0], (place.layer, *marks[1:])
        if key not in self.layers:
            self.layers[key] = self._layer(row, flag, place.layer, place.layer)
        tag, labelled = self.layers[key]
        count = tag.num_local_experts
        if number is None:
            number, count = place.number, place.siblings
        else:
            check_number(number, self.found.names[row])
        tag = ExpertTag(tag.parallel_group, tag.layer, number, count)
        return FoundExpert(tag, place.layer, place.path, labelled)

    def _alone(self, row: int, flag: int) -> FoundExpert:
        """The same for a parameter that is below no list of experts."""
        owner = self.nodes[owner_of(self.nodes, flag)]
        layer = layer_path(owner.path)
        tag, labelled = self._layer(row, flag, layer, _BY_HAND)
        fused = tag.expert_number is None and row == flag
        fused = fused and (tag.fused or is_fused(owner, self.found.params[flag]))
        return FoundExpert(tag._replace(fused=fused), layer, owner.path, labelled)

    def _layer(self, row: int, flag: int, path: str, by_hand: str) -> tuple[ExpertTag, bool]:
        """The parameter's tag with the label of its layer, and whether that is the path.

        Args:
            row: what is tagged.
            flag: the parameter that has the attributes.
            path: of the layer.
            by_hand: the path to which a label of the caller belongs.
        """
        param = self.found.params[flag]
        tag = get_expert_tag(param, self.found.names[row])
        assert tag is not None
        label, labelled = tag.layer, False
        if label is None or label == param.__dict__.get("expert_label_found"):
            label, labelled = label_from_path(path) or "experts", True
        claimed = path if labelled else by_hand
        if self.layer_paths.get(label) != claimed:
            self._claim(label, claimed)
        return tag._replace(layer=label), labelled

    def _claim(self, label: str, path: str) -> None:
        check_label(label)
        other = self.layer_paths.setdefault(label, path)
        if other != path:
            raise TagError(
                f"two MoE layers are called {label!r}: {other or '(the root)'!r} and "
                f"{path or '(the root)'!r}. Give each layer an expert_group_name of its own, "
                "or none to use its module name."
            )
