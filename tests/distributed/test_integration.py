"""The ways in which users bring groups into DeepSpeed, on real ranks.

Where a run is compared with DeepSpeed's own split, BF16_Optimizer trains, in which all
groupings are equal bit for bit (``test_training_equal.py``).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from torch import nn

from moe_groups import (
    MoE,
    ParameterInputError,
    create_moe_param_groups,
    split_params_into_different_moe_groups_for_optimizer,
    tag_experts,
    verify,
)
from tests.models import FFN, MoEBlock, TinyMoE
from tests.ranks import run_in_fresh_processes, run_on_ranks
from tests.training import (
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
    groups = engine.optimizer.param_groups
    names = [group["name"] for group in groups if group.get("moe")]
    return names, train(engine, 3), weights(engine)


def trained_by_stock(engine: Any) -> Run:
    return [], train(engine, 3), weights(engine)


def equal(ours: Run, theirs: Run) -> bool:
    return ours[1] == theirs[1] and largest_difference(ours[2], theirs[2]) == 0


# ---- models ---------------------------------------------------------------------------


class NamedBlocks(TinyMoE):
    """The second layer has a label of its own, the first takes its module name."""

    def __init__(self, layer: type[nn.Module] = MoE) -> None:
        super().__init__(layer, ep_size=2)
        named = {"expert_group_name": "my.layer"} if layer is MoE else {}
        options = {"num_experts": 4, "min_capacity": 0, "use_rts": False, "ep_size": 2}
        torch.manual_seed(1)
        self.blocks[1] = MoEBlock(layer, **options, **named)


class SeveralSizes(TinyMoE):
    """One layer with EP=1, one with EP=2."""

    def __init__(self, layer: type[nn.Module] = MoE) -> None:
        super().__init__(layer, ep_size=1)
        torch.manual_seed(1)
        options = {"num_experts": 4, "min_capacity": 0, "use_rts": False, "ep_size": 2}
        self.blocks[1] = MoEBlock(layer, **options)


class HandMade(nn.Module):
    """Experts without DeepSpeed's layer: every rank holds two of four and runs both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(10 + torch.distributed.get_rank())
        self.experts = nn.ModuleList(FFN() for _ in range(2))
        for param in self.experts.parameters():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = "ep_size_2"  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return sum(expert(x) for expert in self.experts), x.new_zeros(()), None


class WithHandMade(TinyMoE):
    """DeepSpeed's layer, then hand-made experts."""

    def __init__(self, layer: type[nn.Module] = DeepSpeedMoE) -> None:
        super().__init__(layer, ep_size=2)
        self.blocks[1].moe = HandMade()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], list[str]]] = {
    "own names": (
        NamedBlocks,
        lambda: NamedBlocks(DeepSpeedMoE),
        ["ep_size_2_blocks.0.moe", "ep_size_2_my.layer"],
    ),
    "several sizes": (
        SeveralSizes,
        lambda: SeveralSizes(DeepSpeedMoE),
        ["ep_size_1_blocks.0.moe", "ep_size_2_blocks.1.moe"],
    ),
    "DeepSpeed's layer": (
        lambda: TinyMoE(DeepSpeedMoE, **EP2),
        lambda: TinyMoE(DeepSpeedMoE, **EP2),
        ["ep_size_2_blocks.0.moe", "ep_size_2_blocks.1.moe"],
    ),
    "hand-made": (
        WithHandMade,
        WithHandMade,
        ["ep_size_2_blocks.0.moe", "ep_size_2_blocks.1.moe"],
    ),
}


def compare_model(which: str, wrapper: str) -> tuple[list[str], bool]:
    ours, theirs, _ = MODELS[which]
    stock = trained_by_stock(start(wrapper, groups_by("stock"), theirs()))
    model = ours()
    run = trained(start(wrapper, groups_by("module"), model))
    by_expert = trained(start(wrapper, groups_by("expert"), ours()))
    assert len(by_expert[0]) > len(run[0])
    return run[0], equal(run, stock) and equal(by_expert, stock)


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_model(which: str, world: int) -> None:
    expected = [(MODELS[which][2], True)] * world
    assert run_on_ranks(world, compare_model, which, "bf16") == expected


def names_of_several_sizes() -> list[str]:
    return trained(start("zero2", groups_by("expert"), SeveralSizes()))[0]


def test_ranks_need_not_agree_on_the_hash_seed() -> None:
    """Every rank of a real start-up has a hash seed of its own."""
    names = run_in_fresh_processes(2, names_of_several_sizes, env={"PYTHONHASHSEED": "random"})
    assert names[0] == names[1]
    assert len(names[0]) == 4 + 2


class OnlyHandMade(WithHandMade):
    """No layer that DeepSpeed knows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].moe = HandMade()


def start_only_hand_made(wrapper: str) -> str:
    with pytest.raises(ParameterInputError) as failure:
        start(wrapper, groups_by("module"), OnlyHandMade())
    return str(failure.value)


@pytest.mark.parametrize("wrapper", ["zero2", "bf16", "half", "fp32"])
def test_model_without_a_layer_that_deepspeed_knows_is_refused(wrapper: str) -> None:
    for message in run_on_ranks(2, start_only_hand_made, wrapper):
        assert "'ep_size_2_blocks.0.moe' holds experts" in message
        assert "average different experts" in message


def train_parameters_of_tagged_model() -> tuple[list[str], list[str]]:
    """tag_experts, then groups out of parameters alone."""
    model = WithHandMade()
    tagged = tag_experts(model)
    assert {tag.expert_number for tag in tagged.values()} == {0, 1}

    def groups_of(model: nn.Module) -> Groups:
        return create_moe_param_groups(model.parameters(), split_by="expert")

    names, _, _ = trained(start("zero2", groups_of, model))
    return names, list(tagged)


def test_parameters_of_a_tagged_model() -> None:
    for names, tagged in run_on_ranks(2, train_parameters_of_tagged_model):
        assert len(tagged) == 12
        assert names == [
            f"ep_size_2_blocks.{layer}.moe.expert.{number}" for layer in (0, 1) for number in (0, 1)
        ]


# ---- ways in --------------------------------------------------------------------------


def client_callable(model: nn.Module) -> Any:
    def optimizer(params: Any) -> torch.optim.Optimizer:
        groups = create_moe_param_groups(params, split_by="expert")
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.01)

    tag_experts(model)
    parameters = list(model.parameters())
    return initialize(model, optimizer, config("bf16"), model_parameters=parameters)


def config_optimizer(model: nn.Module) -> Any:
    params = {"lr": 1e-2, "weight_decay": 0.01, "torch_adam": True, "fused": False}
    cfg = config("bf16", optimizer={"type": "AdamW", "params": params})
    groups = create_moe_param_groups(model, split_by="expert")
    return initialize(model, None, cfg, model_parameters=groups)


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
        groups = split_params_into_different_moe_groups_for_optimizer(given, **options)
        assert [(list(group), len(group["params"])) for group in given] == before
        assert all(
            group["lr_mult"] == (0.1 if "no_wd" in group["name"] else 1.0) for group in groups
        )
        return groups

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
