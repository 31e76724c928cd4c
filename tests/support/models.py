"""Small models that the tests share; module-level, so that ranks can import them."""

from typing import Any

import torch
from torch import nn

HIDDEN = 16


class FFN(nn.Module):
    """An expert with a bias and a matrix of different sizes."""

    def __init__(self, hidden: int = HIDDEN, inner: int = 24) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.nn.functional.silu(self.up(x)))
        return out


class MoEBlock(nn.Module):
    def __init__(self, layer: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = layer(HIDDEN, FFN(), **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, aux, _ = self.moe(self.norm(x))
        return x + out, aux


class TinyMoE(nn.Module):
    """A dense layer, ``layers`` MoE blocks, a dense layer; regression on ``tanh`` targets."""

    def __init__(
        self, layer: type[nn.Module], layers: int = 2, num_experts: int = 4, **options: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(HIDDEN, HIDDEN)
        options = {"k": 1, "min_capacity": 0, "drop_tokens": False, "use_rts": False} | options
        self.blocks = nn.ModuleList(
            MoEBlock(layer, num_experts=num_experts, **options) for _ in range(layers)
        )
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        total = 0.0
        for block in self.blocks:
            h, aux = block(h)
            total = total + aux
        return torch.nn.functional.mse_loss(self.out(h).float(), y.float()) + 0.01 * total
