"""The ways in which users bring groups into DeepSpeed, on real ranks.

Where a run is compared with DeepSpeed's own split, BF16_Optimizer trains, in which all
groupings are equal bit for bit (``test_training_equal.py``).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from torch import nn

from moe_groups import (
    MoE,
    create_moe_param_groups,
    split_params_into_different_moe_groups_for_optimizer,
    tag_experts,
    verify,
)
from tests.support.models import TinyMoE
from tests.support.ranks import run_on_ranks
from tests.support.training import (
    config,
    groups_by,
    initialize,
    largest_difference,
    start,
    train,
    weights,
)

Groups = list[dict[str, Any]]
Run = tuple[list[str], dict[str, list[float]], dict[str, torch.Tensor]]
EP2 = {"ep_size": 2}


def trained(engine: Any) -> Run:
    """Names of the MoE groups, history and weights of a run that verify accepts."""
    verify(engine)
    names = [group["name"] for group in engine.optimizer.param_groups if group.get("moe")]
    return names, train(engine, 3), weights(engine)


def trained_by_stock(engine: Any) -> Run:
    return [], train(engine, 3), weights(engine)


def equal(ours: Run, theirs: Run) -> bool:
    return ours[1] == theirs[1] and largest_difference(ours[2], theirs[2]) == 0


def client_callable(model: nn.Module) -> Any:
    def optimizer(params: Any) -> torch.optim.Optimizer:
        made = create_moe_param_groups(params, split_by="expert")
        return torch.optim.AdamW(made, lr=1e-2, weight_decay=0.01)

    tag_experts(model)
    parameters = list(model.parameters())
    return initialize(model, optimizer, config("bf16"), model_parameters=parameters)


def config_optimizer(model: nn.Module) -> Any:
    params = {"lr": 1e-2, "weight_decay": 0.01, "torch_adam": True, "fused": False}
    cfg = config("bf16", optimizer={"type": "AdamW", "params": params})
    made = create_moe_param_groups(model, split_by="expert")
    return initialize(model, None, cfg, model_parameters=made)


def compare_way(way: Callable[[nn.Module], Any]) -> bool:
    stock = trained_by_stock(start("bf16", groups_by("stock"), model_options=EP2))
    run = trained(way(TinyMoE(MoE, **EP2)))
    assert len(run[0]) == 4
    return equal(run, stock)


@pytest.mark.parametrize("way", [client_callable, config_optimizer])
def test_way_in(way: Callable[[nn.Module], Any]) -> None:
    assert run_on_ranks(2, compare_way, way) == [True, True]


def megatron_groups(model: nn.Module) -> Groups:
    """As Megatron-DeepSpeed makes them: by weight decay and learning-rate multiplier."""
    decay: list[torch.Tensor] = []
    no_decay: list[torch.Tensor] = []
    for param in model.parameters():
        (no_decay if param.ndim == 1 else decay).append(param)
    return [
        {"name": "wd_no_scale_lr", "params": decay, "wd_mult": 1.0, "lr_mult": 1.0},
        {"name": "no_wd_scale_lr", "params": no_decay, "wd_mult": 0.0, "lr_mult": 0.1}
        | {"weight_decay": 0.0, "lr": 1e-3},
    ]


def compare_drop_in(split_by: str | None) -> tuple[list[str], bool]:
    def ours(model: nn.Module) -> Groups:
        given = megatron_groups(model)
        before = [(list(group), len(group["params"])) for group in given]
        options: Any = {} if split_by is None else {"split_by": split_by}
        made = split_params_into_different_moe_groups_for_optimizer(given, **options)
        assert [(list(group), len(group["params"])) for group in given] == before
        for group in made:
            assert group["lr_mult"] == (0.1 if "no_wd" in group["name"] else 1.0)
        return made

    stock = trained_by_stock(
        start("bf16", lambda model: stock_split(megatron_groups(model)), model_options=EP2)
    )
    model = TinyMoE(MoE, **EP2)
    tag_experts(model)
    run = trained(start("bf16", ours, model))
    return run[0], equal(run, stock)


def test_drop_in_with_megatron_groups() -> None:
    names = ["ep_size_2_experts.wd_no_scale_lr", "ep_size_2_experts.no_wd_scale_lr"]
    assert run_on_ranks(2, compare_drop_in, None) == [(names, True)] * 2
    by_layer = [
        f"ep_size_2_blocks.{layer}.moe.{group}"
        for layer in (0, 1)
        for group in ("wd_no_scale_lr", "no_wd_scale_lr")
    ]
    assert run_on_ranks(2, compare_drop_in, "module") == [(by_layer, True)] * 2
