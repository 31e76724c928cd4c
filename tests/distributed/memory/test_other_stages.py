"""Plans and estimates for models that an engine has, or that ZeRO-3 has partitioned."""

from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from moe_groups import create_moe_param_groups, estimate_step_memory, plan_param_groups
from moe_groups.errors import InvalidArgumentError
from tests.support.ranks import run_on_ranks
from tests.support.training import initialize
from tests.support.zero_runs import Dense, start_dense

ZERO3: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}


def start_zero3(model: nn.Module, groups: list[dict[str, Any]]) -> Any:
    return initialize(model, torch.optim.AdamW(groups), ZERO3)


def answers() -> None:
    """Of everything that plans or estimates."""
    refused = pytest.raises(InvalidArgumentError, match=r"ZeRO-3.*measure_step_memory")
    partitioned = deepspeed.zero.Init(config_dict_or_path=ZERO3)
    with partitioned:
        early = Dense()
    groups = create_moe_param_groups(early)  # no warning of costs either
    late = Dense()
    engine = start_zero3(late, create_moe_param_groups(late))
    for model in (early, late, engine):
        with refused:
            plan_param_groups(model)
        with refused:
            create_moe_param_groups(model, step_memory_budget="auto")
    for made in (groups, torch.optim.AdamW(groups), engine, engine.optimizer):
        with refused:
            estimate_step_memory(made)

    model = Dense()
    planned = plan_param_groups(model).groups_of(model)
    for groups in (planned, create_moe_param_groups(model, step_memory_budget="auto")):
        with pytest.raises(InvalidArgumentError, match=r"were planned.*ZeRO-3.*sub_group_size"):
            start_zero3(model, groups)

    engine = start_dense("zero1")
    assert plan_param_groups(engine.module).step.zero_stage == 1
    made = create_moe_param_groups(engine.module)
    assert estimate_step_memory(made).step.zero_stage == 1
    for part in (engine, engine.optimizer, engine.basic_optimizer):
        with pytest.raises(InvalidArgumentError, match="the engine has partitioned them"):
            estimate_step_memory(part)


def test_no_answer_for_another_stage_than_the_engines() -> None:
    run_on_ranks(2, answers)
