"""``attach_loss`` in plain torch: the gradients of a sum, once for each forward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_groups import attach_loss
from moe_groups.errors import InvalidArgumentError


class Gate(torch.nn.Module):
    """A linear layer with a loss of its own."""

    def __init__(self, scale: Any, sums: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale, self.sums = torch.nn.Linear(4, 4), scale, sums
        self.loss = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        loss = y.square().mean()
        if self.sums:
            self.loss = loss
            return y
        return attach_loss(y, 0.3 * loss, scale=self.scale)


def grads(
    sums: bool, run: Callable[..., torch.Tensor], scale: Any = 1.0, times: int = 1
) -> list[torch.Tensor]:
    layers = [Gate(scale, sums), Gate(scale, sums)]
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = x
    for layer in layers:
        y = run(layer, y)
    factor = scale() if callable(scale) else scale
    loss = y.sin().sum() + sum(0.3 * layer.loss for layer in layers)
    for turn in range(times):  # as often as a graph is walked
        (factor * (loss if turn == 0 else y.sin().sum())).backward(retain_graph=turn < times - 1)
    found = [p.grad for layer in layers for p in layer.parameters()]
    assert x.grad is not None
    return [x.grad, *(grad for grad in found if grad is not None)]


def plain(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = layer(x)
    return y


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "stored": plain,
    "recomputed": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "reentrant": lambda layer, x: checkpoint(layer, x, use_reentrant=True),
}


@pytest.mark.numeric
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1.0, 0.25, lambda: 128.0], ids=["1", "0.25", "function"])
def test_gradients_of_the_sum(way: str, scale: Any) -> None:
    for found, expected in zip(
        grads(False, WAYS[way], scale), grads(True, plain, scale), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_graph_that_is_walked_twice_counts_once() -> None:
    """As a pipeline engine does for each tensor that a stage sent."""
    for found, expected in zip(
        grads(False, plain, times=2), grads(True, plain, times=2), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_values_and_dtype_stay() -> None:
    hidden = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = hidden.float().sum()
    made = attach_loss(hidden, loss, scale=1.0)
    assert torch.equal(made, hidden)
    assert made.dtype == torch.bfloat16
    with torch.no_grad():
        assert attach_loss(hidden, loss, scale=1.0) is hidden
    assert attach_loss(hidden, torch.zeros(()), scale=1.0) is hidden  # nothing to learn from it


def test_hidden_states_of_frozen_layers() -> None:
    weight = torch.ones(3, requires_grad=True)
    attach_loss(torch.ones(3), weight.sum(), scale=2.0).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2, 2]


def test_a_loss_that_is_no_number() -> None:
    with pytest.raises(InvalidArgumentError, match=r"shape \(2,\)"):
        attach_loss(torch.ones(2), torch.ones(2, requires_grad=True))


def test_without_an_engine_the_scale_must_be_said() -> None:
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(InvalidArgumentError, match="no engine could run this backward pass"):
        attach_loss(torch.ones(3), weight.sum()).sum().backward()
