"""ZeRO-3: groups that it steps in several pieces, and experts that get no token on a rank."""

from typing import Any

import deepspeed
import pytest
import torch
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint

from moe_groups import create_moe_param_groups, describe, is_norm_or_bias, tag_experts, verify
from tests.support.ranks import run_on_ranks
from tests.support.training import config, initialize


def describe_dense() -> list[tuple[str, int, int]]:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    groups = create_moe_param_groups(model, weight_decay=0.1, no_decay=is_norm_or_bias)
    cfg: dict[str, Any] = config("zero1")
    cfg["zero_optimization"] = {"stage": 3, "sub_group_size": 40}
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=cfg)
    verify(engine)
    return [(row.name, row.tensors, row.elements) for row in describe(engine).rows]


def test_groups_of_several_pieces() -> None:
    expected = [("dense", 4, 256), ("dense.no_decay", 4, 32)]
    assert run_on_ranks(2, describe_dense) == [expected, expected]


HIDDEN, EXPERTS = 8, 4


class Listed(nn.Module):
    """Experts that are modules of their own, as transformers had them before version 5.

    Args:
        name: of their list.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS)))

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero()[:, 0]
            expert = self.get_submodule(f"{self.name}.{number}")
            out = out.index_add(0, rows, expert(x[rows]))
        return out


class Model(nn.Module):
    """Two blocks between dense layers; the expert is a part of the data."""

    def __init__(self, name: str, recomputed: bool) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.blocks = nn.ModuleList(Listed(name) for _ in range(2))
        self.recomputed = recomputed

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            args = block, x, chosen
            x = x + (
                checkpoint(*args, use_reentrant=False) if self.recomputed else block(*args[1:])
            )
        out: torch.Tensor = self.last(x)
        return out.square().mean()


CHOSEN = [[[0, 1, 2, 3], [3, 2, 1, 0]], [[0, 0, 0, 0], [1, 1, 3, 3]], [[2, 1, 1, 1], [2, 2, 2, 2]]]
"""Of each step and rank; in the second step expert 2 gets no token on any rank."""


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2 * step + rank)
    return torch.randn(4, HIDDEN, generator=generator), torch.tensor(CHOSEN[step][rank])


def make(name: str, recomputed: bool, frozen: bool) -> Model:
    torch.manual_seed(0)
    model = Model(name, recomputed)
    model.blocks.requires_grad_(not frozen)
    return model


def train_listed(name: str, recomputed: bool, frozen: bool) -> float:
    """How far the weights are from those of one process."""
    model = make(name, recomputed, frozen)
    if not frozen:
        tag_experts(model, f"*.{name}")
    optimizer = torch.optim.SGD(create_moe_param_groups(model), lr=0.1)
    cfg = config("fp32", gradient_clipping=0.0) | {"zero_optimization": {"stage": 3}}
    cfg["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = initialize(model, optimizer, cfg)
    alone = make(name, recomputed, frozen)
    sgd = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    for step in range(len(CHOSEN)):
        engine.backward(engine(*batch(step, distributed.get_rank())))
        engine.step()
        (sum(alone(*batch(step, rank)) for rank in range(2)) / 2).backward()
        sgd.step()
        sgd.zero_grad()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize(
    ("name", "recomputed", "frozen"),
    [("ffns", False, False), ("experts", True, False), ("experts", False, True)],
)
def test_experts_without_a_token(name: str, recomputed: bool, frozen: bool) -> None:
    assert max(run_on_ranks(2, train_listed, name, recomputed, frozen, timeout=60)) <= 1e-6
