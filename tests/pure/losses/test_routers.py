"""Routers of transformers' blocks, in the forms of its releases, and those that cannot be read."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from moe_groups.errors import InvalidArgumentError
from moe_groups.losses.routers import find_routers, summed_entropy

LOGITS = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 4.0, 3.0, 0.0], [0.0, 0.0, 1.0, 2.0]])
CHOSEN = LOGITS.topk(2).indices
WEIGHTS = torch.full((3, 2), 0.5)
SCATTERED = torch.zeros_like(LOGITS).scatter(1, CHOSEN, 1.0)


class Router(nn.Module):
    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs, self.top_k, self.num_experts = outputs, 2, 4

    def forward(self, x: torch.Tensor) -> Any:
        return self.outputs


class Block(nn.Module):
    def __init__(self, outputs: Any, slot: str = "gate") -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.add_module(slot, Router(outputs))


class MixtralSparseMoeBlock(Block):
    """That of transformers 4, whose gate is a linear layer."""

    __module__ = "transformers.models.mixtral.modeling_mixtral"

    def __init__(self) -> None:
        super().__init__(LOGITS)
        self.top_k, self.num_experts = 2, 4
        for name in ("top_k", "num_experts"):
            delattr(self.gate, name)


@pytest.mark.parametrize(
    ("block", "has_logits"),
    [
        (Block((LOGITS, WEIGHTS, CHOSEN)), True),
        (Block((LOGITS, WEIGHTS, CHOSEN.int(), torch.ones(3))), True),
        (Block((CHOSEN, WEIGHTS)), False),  # DeepSeek in transformers 4
        (Block((SCATTERED, CHOSEN), "router"), False),  # GPT-OSS in transformers 4
        (Block((SCATTERED, LOGITS), "router"), True),  # Llama 4
        (MixtralSparseMoeBlock(), True),
    ],
)
def test_forms(block: Block, has_logits: bool) -> None:
    (router,) = find_routers(nn.ModuleDict({"mlp": block}))
    assert (router.label, router.experts, router.has_loss) == ("mlp", 4, False)
    found = router.read(router.module(torch.ones(1)))
    assert found.counts.tolist() == [1, 1, 3, 1]
    assert (found.logits is LOGITS) == has_logits


def test_numbers_that_mean_no_expert() -> None:
    chosen = torch.tensor([[0, 4], [-1, 3]])
    (router,) = find_routers(nn.ModuleDict({"mlp": Block((LOGITS[:2], WEIGHTS[:2], chosen))}))
    assert router.read(router.module(torch.ones(1))).counts.tolist() == [1, 0, 0, 1]


def test_what_cannot_be_read_is_refused() -> None:
    (router,) = find_routers(nn.ModuleDict({"mlp": Block((LOGITS, WEIGHTS, LOGITS))}))
    with pytest.raises(InvalidArgumentError, match=r"router of 'mlp' returns .*\(3, 2\).* 2 exp"):
        router.read(router.module(torch.ones(1)))


def test_other_blocks_are_not_found() -> None:
    class Own(MixtralSparseMoeBlock):
        __module__ = "mine"

    block = Own()
    plain = nn.ModuleDict({"experts": nn.ModuleList(), "gate": nn.Linear(2, 4)})
    assert find_routers(nn.ModuleDict({"a": block, "b": plain})) == []
    assert find_routers(Block((CHOSEN, WEIGHTS)), blocks=False) == []


def test_entropy() -> None:
    uniform, certain = torch.zeros(5, 2, 8), torch.tensor([[0.0, -math.inf]])
    assert summed_entropy(uniform)[0].item() == pytest.approx(10 * math.log(8), rel=1e-6)
    assert summed_entropy(uniform)[1] == 10
    assert summed_entropy(certain)[0].item() == 0.0
