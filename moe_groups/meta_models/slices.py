"""Tensor parallelism by sizes: which dimension of a projection is divided, and into what."""

import re
from collections.abc import Iterable

import torch

_REPLICATED = re.compile(r"(.*_)?(router|gate)|.*_a_proj(_.*)?|.*_a")
_ROW = re.compile(
    r".*(o_proj|out_proj|output_proj|output_linear|down_proj|down|dense|c_proj|fc2|wo|w2)"
    r"|.*4h_to_h"
)


def is_replicated(path: str) -> bool:
    """Is the linear layer at ``path`` whole on every rank: a router, or a latent's projection?"""
    return any(_REPLICATED.fullmatch(part) for part in path.split("."))


def is_row_parallel(name: str) -> bool:
    """Does a projection of this name divide its inputs, so that its bias stays whole?"""
    return bool(_ROW.fullmatch(name))


def slice_projection(name: str, params: Iterable[torch.Tensor], ranks: int) -> None:
    """Divide the weight and, where its outputs are divided, the bias of a projection."""
    row = is_row_parallel(name)
    for param in params:
        if param.dim() > 1:
            shrink(param, 1 if row else 0, ranks)
        elif not row:
            shrink(param, 0, ranks)


def shrink(param: torch.Tensor, dim: int, ranks: int) -> None:
    """Keep the largest of ``ranks`` shares of a dimension; ``param`` stays the same object."""
    shape = list(param.shape)
    shape[dim] = -(-shape[dim] // ranks)
    param.data = param.data.new_empty(shape)
