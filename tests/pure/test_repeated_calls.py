"""A call must not depend on the calls before it, and describe says what it cannot describe."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from moe_groups import (
    MoE,
    create_moe_param_groups,
    describe,
    get_expert_tag,
    is_norm_or_bias,
    tag_experts,
)
from moe_groups.errors import InvalidArgumentError, TagError


def expert(*shape: int) -> nn.Parameter:
    param: Any = nn.Parameter(torch.zeros(shape, device="meta"))
    param.allreduce, param.group_name = False, "ep_size_2"
    made: nn.Parameter = param
    return made


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.scale, self.proj_bias = expert(4, 8, 8), expert(4, 8), expert(4, 8)
        self.router = nn.Linear(8, 4)


def members(groups: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    return [(group["name"], list(map(id, group["params"]))) for group in groups]


@pytest.mark.parametrize("split_by", ["parallel_group", "module", "expert"])
def test_the_second_call_makes_the_groups_of_the_first(split_by: Any) -> None:
    """The decay rule sees the same tags, although it is the first call that writes them."""
    models: list[nn.Module] = [
        Fused(),
        nn.ModuleDict({"a": Fused(), "b": Fused()}),
        MoE(8, nn.Linear(8, 8), 4, ep_size=2),
    ]
    for model in models:
        options: Any = {"split_by": split_by, "weight_decay": 0.1, "no_decay": is_norm_or_bias}
        first = members(create_moe_param_groups(model, **options))
        tag_experts(model)
        assert members(create_moe_param_groups(model, **options)) == first


def test_a_rule_sees_tags() -> None:
    seen = []

    def rule(name: str, param: torch.Tensor) -> bool:
        seen.append(get_expert_tag(param))
        return False

    create_moe_param_groups(nn.ModuleDict({"a": Fused()}), weight_decay=0.1, no_decay=rule)
    assert {tag.layer for tag in seen if tag} == {"a"}


def test_a_rule_that_fails_leaves_no_tags() -> None:
    def rule(name: str, param: torch.Tensor) -> bool:
        raise RuntimeError("from the rule")

    model = Fused()
    before = [copy.copy(param.__dict__) for param in model.parameters()]
    with pytest.raises(RuntimeError, match="from the rule"):
        create_moe_param_groups(model, weight_decay=0.1, no_decay=rule)
    assert [param.__dict__ for param in model.parameters()] == before


def test_layers_tagged_apart_under_one_label_clash() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"moe": Fused()}), "decoder": nn.ModuleDict()})
    model["decoder"].add_module("moe", Fused())
    for part in model.children():
        assert {tag.layer for tag in tag_experts(part).values()} == {"moe"}
    with pytest.raises(TagError, match="two MoE layers are called 'moe'"):
        create_moe_param_groups(model.parameters())
    names = [group["name"] for group in create_moe_param_groups(model)]
    assert names == ["dense", "ep_size_2_encoder.moe", "ep_size_2_decoder.moe"]


@pytest.mark.parametrize("number", ["3", -3, 1.0])
def test_an_expert_number_that_is_no_count_is_refused(number: object) -> None:
    param: Any = expert(4, 4)
    param.expert_group_name, param.expert_number = "a", number
    with pytest.raises(TagError, match="expert_number="):
        create_moe_param_groups([param], split_by="expert")


@pytest.mark.parametrize("value", [nn.Linear(2, 2), [nn.Linear(2, 2).weight], 3, [("a", 1)]])
def test_describe_says_what_it_takes(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="is no group dict"):
        describe(value)


def test_describe_refuses_partitions_that_deepspeed_made() -> None:
    group = {"params": [nn.Parameter(torch.zeros(8))], "moe": True, "name": "ep_size_2_a"}
    with pytest.raises(InvalidArgumentError, match="describe the engine"):
        describe([group])
    assert describe([{"params": []}]).rows == []
    assert describe({"params": [nn.Linear(2, 2).weight]}).rows[0].name == "group 0"


def test_a_grouped_model_can_be_converted_by_swapping_its_parameters() -> None:
    """torch swaps no tensor that somebody has a weak reference to."""
    model = nn.Linear(4, 4)
    create_moe_param_groups(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype is torch.bfloat16
