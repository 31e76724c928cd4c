"""Sizes under tensor parallelism: which dimension of a projection is cut, and to what size."""

import re
from collections.abc import Iterable

import torch

_REPLICATED = re.compile(r"(.*_)?(router|gate)|.*_a_proj(_.*)?|.*_a")
_ROW = re.compile(
    r".*(o_proj|out_proj|output_proj|output_linear|down_proj|down|dense|c_proj|fc2|wo|w2)"
    r"|.*4h_to_h"
)


def is_replicated(path: str) -> bool:
    """Is the linear layer at ``path`` uncut: a router, or a projection to a latent?"""
    return any(_REPLICATED.fullmatch(part) for part in path.split("."))


def is_row_parallel(name: str) -> bool:
    """Are the inputs of a projection of this name cut, so that its bias stays uncut?"""
    return bool(_ROW.fullmatch(name))


def slice_projection(name: str, params: Iterable[torch.Tensor], ranks: int) -> None:
    """Cut the weight of a projection and, if its outputs are cut, the bias."""
    row = is_row_parallel(name)
    for param in params:
        if param.dim() > 1:
            shrink(param, 1 if row else 0, ranks)
        elif not row:
            shrink(param, 0, ranks)


def shrink(param: torch.Tensor, dim: int, ranks: int) -> None:
    """Keep the largest of ``ranks`` slices of a dimension; ``param`` stays the same object."""
    shape = list(param.shape)
    shape[dim] = -(-shape[dim] // ranks)
    param.data = param.data.new_empty(shape)
