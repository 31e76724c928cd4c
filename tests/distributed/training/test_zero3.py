"""ZeRO-3 steps one group in several pieces: verify and describe put them together again."""

from typing import Any

import deepspeed
import torch
from torch import nn

from moe_groups import create_moe_param_groups, describe, is_norm_or_bias, verify
from tests.support.ranks import run_on_ranks
from tests.support.training import config


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
