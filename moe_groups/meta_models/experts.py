"""Find the experts of a whole model in Hugging Face's forms.

The experts of a layer are fused tensors (``gate_up_proj`` of shape
``(experts, 2 * inner, hidden)``) or, in older versions, a list of modules.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from moe_groups.errors import InvalidArgumentError, ParameterInputError
from moe_groups.experts.expert_lists import layer_path
from moe_groups.experts.module_tree import ModuleNode, named_parameters
from moe_groups.meta_models.slices import is_row_parallel, shrink
from moe_groups.tags import ExpertTag, label_from_path, set_expert_tag

EXPERTS = "experts"
_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer of a whole model.

    Attributes:
        path: the layer's path.
        owner: the module that has ``parts`` as children.
        parts: the children with experts, by their names: one list of expert modules, or
            modules with tensors of all experts.
        fused: the parts have tensors of all experts.
    """

    path: str
    owner: nn.Module
    parts: dict[str, nn.Module]
    fused: bool

    def params(self) -> list[nn.Parameter]:
        return [param for part in self.parts.values() for param in part.parameters()]

    def experts(self) -> list[dict[str, nn.Parameter]]:
        """Parameters of each expert by name; fused experts are one entry."""
        if self.fused:
            prefixes = {slot: "" if len(self.parts) == 1 else f"{slot}." for slot in self.parts}
            named = (
                (prefixes[slot] + name, param)
                for slot, part in self.parts.items()
                for name, param in part.named_parameters()
            )
            return [dict(named)]
        (children,) = self.parts.values()
        found = (dict(child.named_parameters()) for child in children.children())
        return [params for params in found if params]  # a list may also have an activation

    def count(self) -> int:
        """Number of experts.

        Raises:
            ParameterInputError: the tensors or experts of the layer differ.
        """
        experts = self.experts()
        if self.fused:
            counts = {name: param.shape[0] for name, param in experts[0].items()}
            if len(set(counts.values())) > 1:
                raise ParameterInputError(
                    f"the tensors of {self.path!r} hold different numbers of experts: {counts}."
                )
            return next(iter(counts.values()))
        shapes = [{name: param.shape for name, param in expert.items()} for expert in experts]
        if any(shape != shapes[0] for shape in shapes):
            raise ParameterInputError(f"the experts of {self.path!r} differ in their parameters.")
        return len(experts)


def find_expert_layers(nodes: list[ModuleNode]) -> list[ExpertLayer]:
    """All layers with experts, in the model's order; shared experts count as dense.

    Raises:
        ParameterInputError: a module of experts has neither of the known forms.
    """
    fused: dict[int, dict[str, nn.Module]] = {}
    layers: list[tuple[int, ExpertLayer]] = []
    for index, node in _candidates(nodes):
        if isinstance(node.module, _LISTS):
            owner = nodes[node.parent].module
            layer = ExpertLayer(_label(node.path), owner, {node.slot: node.module}, fused=False)
            layers.append((index, layer))
        else:
            _check_fused(node)
            fused.setdefault(node.parent, {})[node.slot] = node.module
    for parent, parts in fused.items():
        path = _label(f"{nodes[parent].path}.{EXPERTS}".lstrip("."))
        layers.append((parent, ExpertLayer(path, nodes[parent].module, parts, fused=True)))
    return [layer for _, layer in sorted(layers, key=lambda found: found[0])]


def _label(path: str) -> str:
    return label_from_path(layer_path(path))


def _candidates(nodes: list[ModuleNode]) -> Iterator[tuple[int, ModuleNode]]:
    """Lists of experts, and modules of experts that have matrices of their own."""
    stop = 1  # the root has no owner
    for index, node in enumerate(nodes):
        name = f"{node.slot} {type(node.module).__name__}".lower()
        if index < stop or "expert" not in name:
            continue
        if "shared" in name:
            stop = node.stop
        elif isinstance(node.module, _LISTS) and "expert" in node.slot:
            stop = node.stop
            if any(True for _ in named_parameters(nodes[index:stop])):
                yield index, node
        elif not isinstance(node.module, nn.Linear) and any(p.dim() > 1 for _, p in node.params):
            yield index, node


def _check_fused(node: ModuleNode) -> None:
    """Refuse experts in 2-D matrices, as in DBRX: the rows of each expert are not known."""
    if not any(param.dim() == 3 for _, param in node.params):
        shapes = {name.rpartition(".")[2]: tuple(param.shape) for name, param in node.params}
        raise ParameterInputError(
            f"{node.path!r} ({type(node.module).__name__}) holds experts in a form that is not "
            f"known: {shapes}. Known are tensors of shape (experts, ..., ...) and lists of modules."
        )


class ExpertForm(NamedTuple):
    """The form that one rank's experts should have.

    Attributes:
        ep_size: ranks over which the experts are distributed.
        kind: "list": one module for each expert; "fused": one tensor for all of them.
        tp_size: ranks over which the tensors of one expert are cut.
    """

    ep_size: int
    kind: Literal["list", "fused"]
    tp_size: int


def keep_local_experts(layer: ExpertLayer, form: ExpertForm) -> None:
    """Leave one rank's experts in the layer, in the given form, and tag them.

    Raises:
        InvalidArgumentError: ``ep_size`` does not divide the experts.
        ParameterInputError: the layer's experts differ.
    """
    count = layer.count()
    if count % form.ep_size:
        raise InvalidArgumentError(
            f"ep_size={form.ep_size} does not divide the {count} experts of {layer.path!r}."
        )
    local = count // form.ep_size
    if form.kind == "list":
        experts = _listed(layer, local) if layer.fused else _kept(layer, local)
        for number, expert in enumerate(experts):
            _finish(expert, ExpertTag(f"ep_size_{form.ep_size}", layer.path, number, local), form)
        return
    tag = ExpertTag(f"ep_size_{form.ep_size}", layer.path, None, local, fused=True)
    for module in _shortened(layer, local) if layer.fused else [_stacked(layer, local)]:
        _finish(module, tag, form)


def _kept(layer: ExpertLayer, local: int) -> list[nn.Module]:
    """Keep the first modules of the layer's list and remove the others."""
    (experts,) = layer.parts.values()
    named = [(name, child) for name, child in experts.named_children() if list(child.parameters())]
    for name, _ in named[local:]:
        delattr(experts, name)
    return [child for _, child in named[:local]]


def _listed(layer: ExpertLayer, local: int) -> list[nn.Module]:
    """Replace the fused tensors by one module for each expert."""
    (tensors,) = layer.experts()
    inner = {name: param.shape[1:] for name, param in tensors.items()}
    matrices = {
        new: (shape, tensors[name])
        for name in tensors
        for new, shape in _matrices(name, inner).items()
    }
    experts = nn.ModuleList(_module(matrices) for _ in range(local))
    for slot in layer.parts:
        delattr(layer.owner, slot)
    layer.owner.add_module(EXPERTS, experts)
    return list(experts)


def _shortened(layer: ExpertLayer, local: int) -> list[nn.Module]:
    """Shrink the modules of fused experts to the local ones."""
    count = layer.count()
    for param in layer.params():
        shrink(param, 0, count // local)
    return list(layer.parts.values())


def _stacked(layer: ExpertLayer, local: int) -> nn.Module:
    """Replace a list of experts by a module with fused tensors."""
    first = layer.experts()[0]
    tensors = {
        re.sub(r"\W", "_", name.removesuffix(".weight")): (torch.Size([local, *p.shape]), p)
        for name, p in first.items()
    }
    module = _module(tensors)
    (slot,) = layer.parts
    delattr(layer.owner, slot)
    layer.owner.add_module(EXPERTS, module)
    return module


def _module(params: dict[str, tuple[torch.Size, nn.Parameter]]) -> nn.Module:
    """A module with new parameters: dotted name to shape, and parameter for dtype and device."""
    root = nn.Module()
    for name, (shape, like) in params.items():
        path, _, leaf = name.rpartition(".")
        owner = root
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        param = nn.Parameter(like.data.new_empty(shape), requires_grad=like.requires_grad)
        owner.register_parameter(leaf, param)
    return root


def _matrices(name: str, inner: dict[str, torch.Size]) -> dict[str, torch.Size]:
    """Names and shapes of one expert's part of a fused tensor in a module of its own."""
    stem, leaf = (name[:-5], "bias") if name.endswith("_bias") else (name, "weight")
    new = name if "." in name else f"{stem}.{leaf}"
    if "gate_up" not in name:
        return {new: inner[name]}
    half = list(inner[name])
    dim = _gate_up_dim(inner[name], inner.get(name.replace("gate_up", "down")))
    half[dim] //= 2
    return {new.replace("gate_up", part): torch.Size(half) for part in ("gate", "up")}


def _gate_up_dim(shape: torch.Size, down: torch.Size | None) -> int:
    """The dimension in which gate and up are joined: half of it gives the sizes of ``down``."""
    for dim in range(len(shape)):
        half = [*shape]
        half[dim] //= 2
        if down is not None and sorted(half) == sorted(down):
            return dim
    return 0


def _finish(module: nn.Module, tag: ExpertTag, form: ExpertForm) -> None:
    """Tag the module's parameters, and cut them for expert tensor parallelism."""
    for name, param in module.named_parameters():
        if form.tp_size > 1:
            _slice_expert(name, param, form.tp_size, first=int(tag.fused))
        set_expert_tag(param, tag)


def _slice_expert(name: str, param: nn.Parameter, ranks: int, first: int) -> None:
    """Cut one dimension from ``first`` on; biases after a sum over ranks stay uncut."""
    stem = name.removesuffix(".weight").removesuffix("bias").rstrip("._").rpartition(".")[2]
    dims = range(first, param.dim())
    if len(dims) == 1 and is_row_parallel(stem):
        return
    dim = next((dim for dim in dims if param.shape[dim] % ranks == 0), first)
    shrink(param, dim, ranks)
