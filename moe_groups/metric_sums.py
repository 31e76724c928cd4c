"""Sums of squares over the pieces of what an optimizer steps, kept on the device."""

from collections.abc import Mapping
from typing import Any

import torch

from moe_groups.metric_rows import Row, Stepped

GRAD, PARAM, UPDATE, LR, ELEMENTS, COLUMNS = range(6)
"""Columns: squares of gradients, parameters and updates; lr x elements; elements."""


class SteppedPieces:
    """A tensor that is stepped, ready to be added up by rows.

    Args:
        stepped: the tensor, and what is where in it.
        index_of: row to its line of the sums.
        device: of the sums.
    """

    def __init__(self, stepped: Stepped, index_of: Mapping[Row, int], device: Any) -> None:
        self.tensor, pieces = stepped
        self._places = [(piece.start, piece.numel) for piece in pieces]
        self._rows = torch.tensor([index_of[piece.row] for piece in pieces], device=device)
        self._elements = torch.tensor(
            [piece.numel for piece in pieces], dtype=torch.float64, device=device
        )

    def add_squares(self, sums: torch.Tensor, column: int, values: torch.Tensor | None) -> None:
        """Add the squared norm of each piece of ``values``, which lie as in the tensor."""
        if values is None or not self._places:
            return
        flat = values.detach().reshape(-1)
        pieces = [flat.narrow(0, start, numel) for start, numel in self._places]
        norms = torch.stack(torch._foreach_norm(pieces, 2, torch.float32))
        squares = norms.to(sums.device, sums.dtype).square()
        sums[:, column].index_add_(0, self._rows, squares)

    def add_elements(self, sums: torch.Tensor, lr: float | torch.Tensor) -> None:
        """Count the elements, and add the learning rate of each."""
        if not self._places:
            return
        sums[:, ELEMENTS].index_add_(0, self._rows, self._elements)
        sums[:, LR].index_add_(0, self._rows, self._elements * lr)
