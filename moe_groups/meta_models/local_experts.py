"""Leave one rank's experts in a layer, in the form that it is planned for, and tag them."""

import re
from typing import Literal, TypeAlias

import torch
from torch import nn

from moe_groups.experts.module_tree import ModuleNode
from moe_groups.meta_models.expert_layers import EXPERTS, ExpertLayer
from moe_groups.tags import ExpertTag, set_expert_tag

ExpertForm: TypeAlias = Literal["list", "fused"]
"""One module for each expert, or one tensor for all of them."""


def keep_local_experts(layer: ExpertLayer, ep_size: int, form: ExpertForm) -> None:
    """Leave one rank's experts of ``ep_size`` ranks, and tag them; all ranks have the same sizes.

    Args:
        layer: with numbers of experts that ``ep_size`` divides.
    """
    local, group = layer.counts()[0] // ep_size, f"ep_size_{ep_size}"
    if form == "list":
        experts = _listed(layer, ep_size) if layer.fused else _kept(layer, local)
        for number, expert in enumerate(experts):
            for param in expert.parameters():
                set_expert_tag(param, ExpertTag(group, layer.path, number, local))
        return
    for param in _shortened(layer, ep_size) if layer.fused else _stacked(layer, local):
        set_expert_tag(param, ExpertTag(group, layer.path, None, local, fused=True))


def _kept(layer: ExpertLayer, local: int) -> list[nn.Module]:
    """Keep the first modules of the layer's list and remove the others."""
    (experts,) = layer.parts.values()
    kept, removed = layer.experts()[:local], layer.experts()[local:]
    for name, child in list(experts.named_children()):
        if any(child is one for one in removed):
            delattr(experts, name)
    return kept


def _listed(layer: ExpertLayer, ep_size: int) -> list[nn.Module]:
    """Replace the fused tensors by one module for each expert."""
    tensors = layer.tensors()
    inner = {name: param.shape[1:] for name, param in tensors.items()}
    held = {name: param.shape[0] // ep_size for name, param in tensors.items()}
    experts = nn.ModuleList(
        _module(
            {
                new: (shape, tensors[name])
                for name in tensors
                if number < held[name]
                for new, shape in _matrices(name, inner).items()
            }
        )
        for number in range(max(held.values()))
    )
    _remove(layer)
    left = layer.owner._modules.get(EXPERTS)  # what the experts have in common stays there
    if left is None:
        layer.owner.add_module(EXPERTS, experts)
    else:
        left.add_module("deepspeed_experts", experts)
    return list(experts)


def _remove(layer: ExpertLayer) -> None:
    """Remove the fused tensors, and the modules that have no other parameters."""
    tensors = {id(param) for param in layer.tensors().values()}
    for slot, part in layer.parts.items():
        for module in part.modules():
            for name, param in list(module._parameters.items()):
                if id(param) in tensors:
                    delattr(module, name)
        if not any(True for _ in part.parameters()):
            delattr(layer.owner, slot)


def _shortened(layer: ExpertLayer, ep_size: int) -> list[nn.Parameter]:
    """Shrink the fused tensors to the local experts."""
    params = layer.params()
    for param in params:
        shrink(param, 0, ep_size)
    return params


def _stacked(layer: ExpertLayer, local: int) -> list[nn.Parameter]:
    """Replace a list of experts by a module with fused tensors."""
    module = _module(
        {
            re.sub(r"\W", "_", name.removesuffix(".weight")): (torch.Size([local, *p.shape]), p)
            for name, p in layer.experts()[0].named_parameters()
        }
    )
    (slot,) = layer.parts
    delattr(layer.owner, slot)
    layer.owner.add_module(EXPERTS, module)
    return list(module.parameters())


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


_REPLICATED = re.compile(r"(.*_)?(router|gate)|.*_a_proj(_.*)?|.*_a")
_ROW = re.compile(
    r".*(o_proj|out_proj|output_proj|output_linear|down_proj|down|dense|c_proj|fc2|wo|w2)"
    r"|.*4h_to_h"
)
_POSITIONS = re.compile(r"pos|wpe|type")


def slice_dense(node: ModuleNode, ranks: int) -> None:
    """Cut the module's own parameters, if tensor parallelism cuts such a module.

    Every linear layer and the vocabulary of the embedding and the head are cut. Norms, routers,
    position embeddings, convolutions, DeepSeek's projections to a latent (``*_a_proj``) and
    vectors other than the biases of cut outputs are uncut on every rank. If a size is not
    divisible, the larger slice counts; key and value heads are cut even if a rank gets less than
    one head.
    """
    own = [param for _, param in node.params]
    if isinstance(node.module, nn.Embedding):
        for param in () if _POSITIONS.search(node.slot) else own:
            shrink(param, 0, ranks)
    elif _is_linear(node.module) and not _is_replicated(node.path):
        row = bool(_ROW.fullmatch(node.slot))  # its inputs are cut, and its bias is not
        for param in own:
            if param.dim() > 1:
                shrink(param, 1 if row else 0, ranks)
            elif not row:
                shrink(param, 0, ranks)


def _is_linear(module: nn.Module) -> bool:
    """Is it a linear layer? ``Conv1D`` is transformers' name for that of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_replicated(path: str) -> bool:
    """Is the linear layer at ``path`` uncut: a router, or a projection to a latent?"""
    return any(_REPLICATED.fullmatch(part) for part in path.split("."))


def shrink(param: torch.Tensor, dim: int, ranks: int) -> None:
    """Keep the largest of ``ranks`` slices of a dimension; ``param`` stays the same object."""
    shape = list(param.shape)
    shape[dim] = -(-shape[dim] // ranks)
    param.data = param.data.new_empty(shape)
