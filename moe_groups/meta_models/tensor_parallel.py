"""Sizes under tensor parallelism: which dimension of a module's parameters is cut, to what size."""

import re

import torch
from torch import nn

from moe_groups.experts.module_tree import ModuleNode

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
