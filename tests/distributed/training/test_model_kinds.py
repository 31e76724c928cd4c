"""Kinds of models: own names, several sizes, DeepSpeed's layer, hand-made experts.

Compared with DeepSpeed's own split under BF16_Optimizer, in which all groupings are equal
bit for bit (``test_training_equal.py``).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups
from torch import nn

from moe_groups import MoE, create_moe_param_groups, tag_experts
from moe_groups.errors import ParameterInputError
from tests.distributed.training.test_integration import (
    EP2,
    Groups,
    equal,
    trained,
    trained_by_stock,
)
from tests.support.models import FFN, HIDDEN, MoEBlock, TinyMoE
from tests.support.ranks import run_in_fresh_processes, run_on_ranks
from tests.support.training import groups_by, start


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

    def __init__(self) -> None:
        super().__init__(DeepSpeedMoE, ep_size=2)
        self.blocks[1].moe = HandMade()


class WithFused(TinyMoE):
    """DeepSpeed's layer, then all experts of a rank in one tensor."""

    def __init__(self) -> None:
        super().__init__(DeepSpeedMoE, ep_size=2)
        fused: Any = nn.Module()
        torch.manual_seed(10 + torch.distributed.get_rank())
        fused.experts = nn.Parameter(torch.randn(2, HIDDEN, HIDDEN) / HIDDEN)
        fused.experts.allreduce = False
        fused.experts.group_name = "ep_size_2"
        fused.forward = lambda x: ((x @ fused.experts.sum(0)), x.new_zeros(()), None)
        self.blocks[1].moe = fused


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
    "fused": (
        WithFused,
        WithFused,
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


@pytest.mark.long
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


def start_only_hand_made(wrapper: str, process_groups: bool) -> str:
    if process_groups:
        groups._create_expert_and_data_parallel(2)
    with pytest.raises(ParameterInputError) as failure:
        start(wrapper, groups_by("module"), OnlyHandMade())
    return str(failure.value)


@pytest.mark.parametrize("wrapper", ["zero2", "bf16", "half", "fp32"])
@pytest.mark.parametrize(
    ("process_groups", "what"),
    [
        (False, "blocks.0.moe.experts.0.up.weight is an expert parameter of 'ep_size_2'"),
        (True, "group 'ep_size_2_blocks.0.moe' holds experts"),
    ],
)
def test_model_without_a_layer_that_deepspeed_knows_is_refused(
    wrapper: str, process_groups: bool, what: str
) -> None:
    for message in run_on_ranks(2, start_only_hand_made, wrapper, process_groups):
        assert what in message
        assert "param.allreduce = True" in message


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


def train_adapters(wrapper: str) -> tuple[list[str], list[str]]:
    """Names of the adapters that are the same on all ranks after training, and of the others."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["inp", "up", "down"], r=2, init_lora_weights=False)
    model = get_peft_model(TinyMoE(MoE, layers=1, **EP2), lora)
    _, _, after = trained(start(wrapper, groups_by("expert"), model))
    same: list[str] = []
    other: list[str] = []
    for name, param in after.items():
        if "lora" in name:
            first = param.clone()
            torch.distributed.broadcast(first, 0)
            everywhere = torch.tensor([float(torch.equal(first, param))])
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
            (same if everywhere.item() else other).append(name)
    return same, other


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_adapters_of_experts_are_not_averaged_over_experts(wrapper: str) -> None:
    for same, other in run_on_ranks(2, train_adapters, wrapper):
        assert all(".inp." in name for name in same)
        assert all(".deepspeed_experts." in name for name in other)
        assert (len(same), len(other)) == (2, 8)  # two local experts, two matrices, A and B
