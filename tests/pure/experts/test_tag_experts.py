"""``tag_experts`` for models that were not built with our layer."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn

from moe_groups import (
    ExpertTag,
    MoE,
    create_moe_param_groups,
    is_norm_or_bias,
    set_expert_tag,
    tag_experts,
)
from moe_groups.errors import InvalidArgumentError, TagError, UnmarkedExpertsWarning
from tests.support.models import FFN, HIDDEN, TinyMoE

Places = dict[str, tuple[str | None, int | None]]


def mark(params: Iterable[nn.Parameter], ep_size: int = 2) -> None:
    """What a hand-made expert has: what DeepSpeed asks for, and nothing of ours."""
    for param in params:
        param.allreduce = False  # type: ignore[attr-defined]
        param.group_name = f"ep_size_{ep_size}"  # type: ignore[attr-defined]


def marked(module: nn.Module) -> nn.Module:
    mark(module.parameters())
    return module


def places(model: nn.Module) -> Places:
    """Qualified name to layer and expert number, as tagged; tagging again changes nothing."""
    found = tag_experts(model)
    assert tag_experts(model) == found
    names = {name for name, param in model.named_parameters() if hasattr(param, "allreduce")}
    assert set(found) == names
    return {name: (tag.layer, tag.expert_number) for name, tag in found.items()}


class Tree(nn.Module):
    """A module with the given children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class Fused(nn.Module):
    """All experts in one tensor, with a vector each: as AutoEP and transformers keep them."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(experts, 8, 16))
        self.gate_up_proj_scale = nn.Parameter(torch.zeros(experts, 16))


def test_deepspeeds_own_layer() -> None:
    model = TinyMoE(DeepSpeedMoE, layers=2, num_experts=4, ep_size=2)
    found = tag_experts(model)
    for layer in range(2):
        for number in range(2):
            path = f"blocks.{layer}.moe.deepspeed_moe.experts.deepspeed_experts.{number}"
            tag = found[f"{path}.up.weight"]
            assert tag == ExpertTag("ep_size_2", f"blocks.{layer}.moe", number, 2)
            param: Any = model.get_parameter(f"{path}.up.weight")
            assert (param.expert_group_name, param.expert_number) == (tag.layer, tag.expert_number)
            assert (param.allreduce, param.group_name) == (False, "ep_size_2")
    assert len(found) == 2 * 2 * 3


def test_the_residual_mlp_of_deepspeeds_layer_is_dense() -> None:
    found = tag_experts(TinyMoE(DeepSpeedMoE, layers=1, use_residual=True))
    assert len(found) == 4 * 3
    assert not [name for name in found if "mlp" in name or "coefficient" in name]


def test_a_list_called_experts() -> None:
    model = Tree(
        layers=nn.ModuleList(
            Tree(gate=nn.Linear(2, 2), experts=marked(nn.ModuleList(FFN() for _ in range(3))))
            for _ in range(2)
        )
    )
    assert places(model) == {
        f"layers.{layer}.experts.{number}.{name}": (f"layers.{layer}", number)
        for layer in range(2)
        for number in range(3)
        for name in ("up.weight", "up.bias", "down.weight")
    }


def test_a_list_under_another_name() -> None:
    bank = marked(nn.ModuleList(FFN() for _ in range(3)))
    assert set(places(Tree(mlp=Tree(router=nn.Linear(2, 2), bank=bank))).values()) == {
        ("mlp.bank", number) for number in range(3)
    }


def test_a_dict_of_experts() -> None:
    """Numbers follow the order of the dict, not its keys."""
    experts = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("zebra", "ant")})
    found = places(Tree(moe=Tree(experts=marked(experts))))
    assert found["moe.experts.zebra.weight"] == ("moe", 0)
    assert found["moe.experts.ant.weight"] == ("moe", 1)


def test_experts_made_of_sequentials() -> None:
    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))

    found = places(Tree(moe=Tree(experts=marked(nn.ModuleList([expert(), expert()])))))
    assert found == {
        f"moe.experts.{number}.{index}.{name}": ("moe", number)
        for number in range(2)
        for index in (0, 2)
        for name in ("weight", "bias")
    }


def test_experts_made_of_lists() -> None:
    def expert() -> nn.Module:
        return nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    found = places(Tree(moe=Tree(experts=marked(nn.ModuleList([expert(), expert()])))))
    assert found["moe.experts.0.2.weight"] == ("moe", 0)
    assert found["moe.experts.1.0.weight"] == ("moe", 1)


def test_a_list_of_layers_that_are_lists_of_experts() -> None:
    layers = nn.ModuleList(nn.ModuleList(FFN() for _ in range(2)) for _ in range(3))
    found = places(Tree(gates=nn.Linear(2, 2), moes=marked(layers)))
    assert set(found.values()) == {(f"moes.{a}", b) for a in range(3) for b in range(2)}


def test_fused_experts_split_down_to_the_layer() -> None:
    model = Tree(
        layers=nn.ModuleList(Tree(gate=nn.Linear(2, 2), experts=marked(Fused())) for _ in range(2))
    )
    assert set(places(model).values()) == {("layers.0", None), ("layers.1", None)}
    groups = create_moe_param_groups(model, split_by="expert", no_decay=is_norm_or_bias)
    moe = {g["name"]: (len(g["params"]), g.get("weight_decay")) for g in groups if g.get("moe")}
    assert moe == {
        f"ep_size_2_layers.{layer}{suffix}": (1, decay)
        for layer in range(2)
        for suffix, decay in (("", None), (".no_decay", 0.0))  # the vectors: two dimensions
    }


def test_convolutions_are_not_taken_for_fused_experts() -> None:
    experts = marked(nn.ModuleList(nn.Conv1d(2, 2, 3) for _ in range(2)))
    assert set(places(Tree(moe=Tree(experts=experts))).values()) == {("moe", 0), ("moe", 1)}


def test_one_layer_with_experts_at_the_root() -> None:
    assert set(places(marked(nn.ModuleList([FFN(), FFN()]))).values()) == {
        ("experts", 0),
        ("experts", 1),
    }


@pytest.mark.parametrize("split_by", ["parallel_group", "module", "expert"])
def test_labels_and_numbers_given_by_hand_are_kept(split_by: Any) -> None:
    """Experts in lists of matrices: the module tree does not say what an expert is."""
    moe = Tree(
        w1=nn.ParameterList(torch.zeros(2, 2) for _ in range(2)),
        w2=nn.ParameterList(torch.zeros(2, 2) for _ in range(2)),
    )
    for matrices in moe.children():
        for number, param in enumerate(matrices.parameters()):
            set_expert_tag(param, ExpertTag("ep_size_4", "mine", number, 2))
    by_params = create_moe_param_groups(moe.parameters(), split_by=split_by)
    assert set(places(moe).values()) == {("mine", 0), ("mine", 1)}
    by_module = create_moe_param_groups(moe, split_by=split_by)
    assert [g["name"] for g in by_module] == [g["name"] for g in by_params]
    assert len(by_module) == (2 if split_by == "expert" else 1)


def bank(label: str | None) -> nn.Module:
    """A hand-made layer with a list of experts, labelled by hand or not."""
    experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    for number, linear in enumerate(experts):
        for param in linear.parameters():
            set_expert_tag(param, ExpertTag("ep_size_2", label, number, 2))
    return Tree(gate=nn.Linear(2, 2), experts=experts)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: bank("second"), lambda: bank("second")),
        (lambda: bank("second"), lambda: bank(None)),  # takes its path as its label
        (lambda: bank("second"), lambda: MoE(2, nn.Linear(2, 2), 2, expert_group_name="second")),
    ],
    ids=["by hand", "by path", "ours"],
)
def test_two_layers_with_one_label_are_named(
    first: Callable[[], nn.Module], second: Callable[[], nn.Module]
) -> None:
    """Whoever gave the labels: else one group would mix two layers."""
    for model in (Tree(first=first(), second=second()), Tree(second=second(), first=first())):
        with pytest.raises(TagError, match=r"called 'second'.*'(first|second)'.*'(first|second)'"):
            create_moe_param_groups(model)


def test_a_module_without_experts_has_no_tags() -> None:
    assert tag_experts(nn.Linear(2, 2)) == {}


def test_an_expert_without_a_group_name_is_an_error_and_nothing_is_tagged() -> None:
    good, bad = nn.ModuleList([FFN(), FFN()]), nn.ModuleList([FFN(), FFN()])
    mark(good.parameters())
    mark(bad.parameters())
    del next(bad.parameters()).group_name  # type: ignore[attr-defined]
    model = Tree(first=Tree(experts=good), second=Tree(experts=bad))
    with pytest.raises(TagError, match=r"second\.experts\.0\.up\.weight"):
        tag_experts(model)
    assert not [p for p in model.parameters() if hasattr(p, "expert_group_name")]


def test_true_is_no_number_behind_an_expert_with_one() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    for number, expert in enumerate(model.experts):
        for param in expert.parameters():
            set_expert_tag(param, ExpertTag("ep_size_1", "moe", number))
    model.experts[1].bias.__dict__["expert_number"] = True
    with pytest.raises(TagError, match=r"experts\.1\.bias"):
        tag_experts(model)


def test_a_pattern_marks_no_layer_of_another_size() -> None:
    model = nn.Module()
    model.one = DeepSpeedMoE(HIDDEN, FFN(), num_experts=2)  # ep_size 1
    model.two = nn.Module()
    model.two.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
    before = [dict(param.__dict__) for param in model.parameters()]
    with pytest.raises(InvalidArgumentError, match="layer 'one', which are in 'ep_size_1'"):
        tag_experts(model, "*experts*", ep_size=4)
    assert [param.__dict__ for param in model.parameters()] == before
    tags = tag_experts(model, "two.experts", ep_size=4)
    assert {tag.parallel_group for tag in tags.values()} == {"ep_size_1", "ep_size_4"}


@pytest.mark.parametrize("arguments", [{"pattern": 5}, {"ep_size": 2}])
def test_a_pattern_is_a_string_and_goes_with_ep_size(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"pattern=5 must|tag_experts"):
        tag_experts(TinyMoE(DeepSpeedMoE), **arguments)


@pytest.mark.parametrize("split_by", ["module", "expert"])
def test_unmarked_experts_are_warned_of(split_by: Any) -> None:
    """As in a model of transformers; tagged, it is grouped without a warning."""
    model = Tree(ffn=Tree(gate=nn.Linear(8, 4), experts=Fused()))
    for given in (model, model.named_parameters(), [{"params": model.named_parameters()}]):
        with pytest.warns(UnmarkedExpertsWarning, match=r"'ffn\.experts\..*tag_experts") as caught:
            create_moe_param_groups(given, split_by=split_by)
        assert caught[0].filename == __file__
    tag_experts(model, "*.experts", ep_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_moe_param_groups(model, split_by=split_by)


def test_frozen_experts_need_no_marks() -> None:
    """As with LoRA on attention: nothing is missed where they are not stepped."""
    experts = Fused().requires_grad_(False)
    model = Tree(ffn=Tree(gate=nn.Linear(8, 4), experts=experts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_moe_param_groups(model)


def test_a_dense_model_is_warned_of_only_with_an_expert_split() -> None:
    model = Tree(ffn=nn.Linear(8, 4), shared_experts=nn.Linear(8, 4))
    with pytest.warns(UnmarkedExpertsWarning, match="split_by='expert' asks"):
        create_moe_param_groups(model, split_by="expert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_moe_param_groups(model)
        create_moe_param_groups(model.parameters(), split_by="parallel_group")
