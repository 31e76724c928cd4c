"""Sums of squares over the pieces of what an optimizer steps, one line for each row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_groups.metrics.rows import Row, Stepped

GRAD, PARAM, UPDATE, LR, ELEMENTS, COLUMNS = range(6)
"""Columns: squares of gradients, parameters and updates; lr x elements; elements."""


class SteppedPieces:
    """A tensor that is stepped, ready to be cut into its pieces.

    Args:
        stepped: the tensor, and what is where in it.
        index_of: row to its line of the sums.
    """

    def __init__(self, stepped: Stepped, index_of: Mapping[Row, int]) -> None:
        self.tensor, pieces = stepped
        self.starts = [piece.start for piece in pieces]
        self.numels = [piece.numel for piece in pieces]
        self.lines = [index_of[piece.row] for piece in pieces]

    def norms(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """L2 norm of each piece of ``values``, which lie as in the tensor."""
        flat = values.detach().reshape(-1)
        pieces = [flat.narrow(0, *place) for place in zip(self.starts, self.numels, strict=True)]
        return torch._foreach_norm(pieces, 2, torch.float32) if pieces else ()


class StepSums:
    """Norms that the hooks of one step take; they stay on their device until they are summed."""

    def __init__(self) -> None:
        self._norms: dict[int, list[torch.Tensor]] = {}
        self._values: dict[int, list[float]] = {}
        self._lines: dict[int, list[int]] = {}

    def add_norms(self, column: int, part: SteppedPieces, values: torch.Tensor | None) -> None:
        """Add the squared norm of each piece of ``values``; nothing if there are none."""
        if values is not None:
            self._norms.setdefault(column, []).extend(part.norms(values))
            self._lines.setdefault(column, []).extend(part.lines)

    def add_elements(self, part: SteppedPieces, lr: Any) -> None:
        """Count the elements, and the learning rate of each."""
        for column, factor in ((LR, float(lr)), (ELEMENTS, 1.0)):
            self._values.setdefault(column, []).extend(factor * numel for numel in part.numels)
            self._lines.setdefault(column, []).extend(part.lines)

    def total(self, lines: int, device: Any) -> torch.Tensor:
        """Sums of this rank, of shape (lines, COLUMNS)."""
        sums = torch.zeros(lines, COLUMNS, dtype=torch.float64, device=device)
        found = {
            column: torch.tensor(values, dtype=torch.float64)
            for column, values in self._values.items()
        }
        found |= {
            column: torch.stack(norms).double().square()
            for column, norms in self._norms.items()
            if norms
        }
        for column, values in found.items():
            where = torch.tensor(self._lines[column], device=device)
            sums[:, column].index_add_(0, where, values.to(device, torch.float64))
        return sums
