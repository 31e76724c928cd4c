"""Models with different activation checkpointing of their MoE blocks, and one step of them."""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_groups import MoE, checkpoint_activations
from tests.support.models import HIDDEN, TinyMoE

Tensors = dict[str, torch.Tensor]
Way = Callable[..., Any]


def plain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` without checkpointing."""
    return function(*args, **kwargs)


def torchs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Use torch's checkpoint, which recomputes everything."""
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


WAYS: dict[str, Way] = {"plain": plain, "torch": torchs, "ours": checkpoint_activations}


class CheckpointedMoE(TinyMoE):
    """A TinyMoE that checkpoints each piece of ``per_piece`` blocks with ``way``."""

    def __init__(self, way: Way, per_piece: int = 1, **options: Any) -> None:
        super().__init__(MoE, **options)
        self.way, self.per_piece = way, per_piece

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        total = h.float().sum() * 0
        for first in range(0, len(self.blocks), self.per_piece):
            h, total = self.way(self.piece, first, h, total)
        loss: torch.Tensor = nn.functional.mse_loss(self.out(h).float(), y.float()) + 0.01 * total
        return loss

    def piece(
        self, first: int, h: torch.Tensor, total: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for index in range(first, first + self.per_piece):
            h, aux = self.blocks[index](h)
            total = total + aux
        return h, total


def initialized(model: nn.Module) -> nn.Module:
    """Make the process groups that ``deepspeed.initialize`` makes."""
    for module in model.modules():
        if isinstance(module, DeepSpeedMoE):
            module.set_deepspeed_parallelism()
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    x = torch.randn(3, 8, HIDDEN, generator=generator)
    return x, torch.tanh(x.flip(-1))


def step(model: nn.Module) -> Tensors:
    """Loss, all gradients, and the state of the random numbers after the backward pass."""
    torch.manual_seed(7)  # gates draw random numbers
    model.zero_grad()
    loss = model(*batch())
    loss.backward()
    return {"loss": loss.detach(), **gradients(model), "random": torch.get_rng_state()}


def gradients(model: nn.Module) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def communication(function: Callable[[], object]) -> tuple[int, int]:
    """Number of all-to-alls and all-reduces that run in ``function``."""
    ran: list[str] = []  # only names, because a Mock would keep the tensors of each call

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(torch.distributed, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            ran.append(name)
            return original(*args, **kwargs)

        return run

    names = ("all_to_all_single", "all_reduce")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.distributed, name, counted(name)))
        function()
    return ran.count(names[0]), ran.count(names[1])


def different(some: Tensors, others: Tensors) -> list[str]:
    assert list(some) == list(others)
    return [name for name in some if not torch.equal(some[name], others[name])]
