"""What a running engine shows: global expert numbers, rank order, start-up output, ZeRO-3."""

import contextlib
import io
from typing import Any

import deepspeed.runtime.bf16_optimizer
import pytest
import torch
from torch import nn

from moe_groups import MoE, create_moe_param_groups, describe, verify
from tests.support.models import HIDDEN, TinyMoE
from tests.support.ranks import run_on_ranks
from tests.support.training import (
    config,
    groups_by,
    initialize,
    largest_difference,
    make_groups,
    start,
    train,
    weights,
)

DATA_FIRST = "use_data_before_expert_parallelism"


def described(wrapper: str, data_first: bool) -> tuple[list[int | None], list[int], list[int]]:
    """Expert numbers, elements and partition bytes of the groups of one layer."""
    changes: dict[str, Any] = {DATA_FIRST: data_first}
    options = {"ep_size": 2, "layers": 1, "num_experts": 6}
    engine = start(wrapper, groups_by("expert"), model_options=options, **changes)
    train(engine, 1)
    verify(engine)
    rows = [row for row in describe(engine).rows if row.moe]
    return (
        [row.expert for row in rows],
        [row.elements for row in rows],
        [row.partition_bytes for row in rows],
    )


@pytest.mark.parametrize("wrapper", ["zero2", "bf16", "half"])
def test_describe_shows_global_expert_numbers(wrapper: str) -> None:
    numbers = [row[0] for row in run_on_ranks(4, described, wrapper, False)]
    assert numbers == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]


def test_describe_with_data_before_expert_parallelism() -> None:
    ranks = run_on_ranks(4, described, "zero2", True)
    assert [row[0] for row in ranks] == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    for _, elements, partition_bytes in ranks:
        assert elements == [792] * 3
        assert partition_bytes == [792 // 2 * 2] * 3  # two ranks share it, two bytes each


def train_data_first(wrapper: str) -> float:
    runs = []
    for split in ("stock", "expert"):
        changes: dict[str, Any] = {DATA_FIRST: True, "gradient_clipping": 0.0}
        engine = start(wrapper, groups_by(split), model_options={"ep_size": 2}, **changes)
        train(engine, 3)
        runs.append(weights(engine))
    return largest_difference(*runs)


@pytest.mark.parametrize("wrapper", ["zero1", "bf16"])
def test_data_before_expert_parallelism_trains_as_stock(wrapper: str) -> None:
    assert run_on_ranks(4, train_data_first, wrapper) == [0.0] * 4


def startup_output(split: str, layers: int) -> tuple[int, int]:
    """Groups, and memory reports that DeepSpeed prints for groups while it starts."""
    model = TinyMoE(MoE, layers=layers, ep_size=2)
    optimizer = torch.optim.AdamW(make_groups(model, split))
    report = deepspeed.runtime.bf16_optimizer.see_memory_usage
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        deepspeed.initialize(model=model, optimizer=optimizer, config=config("bf16"))
    assert deepspeed.runtime.bf16_optimizer.see_memory_usage is report
    return len(optimizer.param_groups), printed.getvalue().count("initializing group")


def test_bf16_reports_memory_for_few_groups_only() -> None:
    """A report collects garbage and takes 0.15 s; rank 0 prints it."""
    groups, reports = run_on_ranks(2, startup_output, "module", 2)[0]
    assert (groups, reports) == (3, 6)
    groups, reports = run_on_ranks(2, startup_output, "expert", 6)[0]
    assert (groups, reports) == (13, 0)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(x.float(), y.float())


def train_dense(zero: dict[str, Any], cap: int | None) -> tuple[list[int], dict[str, list[float]]]:
    """Elements of the groups, and the history of a run that verify accepts."""
    model = Dense()
    overrides = [("layers.2", {"lr": 1e-3})]
    groups: Any = create_moe_param_groups(model, max_group_size=cap, overrides=overrides)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    cfg = config("zero2", zero_optimization=zero, gradient_clipping=0.0)
    engine = initialize(model, optimizer, cfg)
    verify(engine)
    return [row.elements for row in describe(engine).rows], train(engine, 3)


ZERO: list[dict[str, Any]] = [
    {"stage": 1},
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "sub_group_size": 300},  # several tiles of DeepSpeed's own for a group
]


@pytest.mark.parametrize("zero", ZERO, ids=str)
def test_dense_model(zero: dict[str, Any]) -> None:
    for whole, parts in zip(
        run_on_ranks(2, train_dense, zero, None),
        run_on_ranks(2, train_dense, zero, 300),
        strict=True,
    ):
        assert (whole[0], parts[0]) == ([3 * 272, 272], [272, 272, 272, 272])
        assert whole[1]["loss"] == parts[1]["loss"]
