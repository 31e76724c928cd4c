"""What our layer's parameters know about themselves, and when two layers clash."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn

from moe_groups import (
    ExpertTag,
    MoE,
    copy_expert_tag,
    create_moe_param_groups,
    get_expert_tag,
    set_expert_tag,
    tag_experts,
)
from moe_groups.errors import TagError
from tests.support.models import FFN, HIDDEN, TinyMoE


def layer(label: str | None = "a", ep_size: int = 2, **options: Any) -> MoE:
    return MoE(HIDDEN, FFN(), 4, ep_size, expert_group_name=label, **options)


def experts(moe: Any) -> list[nn.Module]:
    return list(moe.deepspeed_moe.experts.deepspeed_experts)


def tags(module: nn.Module) -> dict[str, ExpertTag | None]:
    return {name: get_expert_tag(param) for name, param in module.named_parameters()}


# ---- the layer -------------------------------------------------------------------------


def test_every_expert_parameter_knows_layer_and_number_and_keeps_deepspeeds_marks() -> None:
    moe = layer("blocks.7.moe")
    assert len(experts(moe)) == 2
    for number, expert in enumerate(experts(moe)):
        for param in expert.parameters():
            assert get_expert_tag(param) == ExpertTag("ep_size_2", "blocks.7.moe", number, 2)
            marks = vars(param)
            assert marks["expert_group_name"] == "blocks.7.moe"
            assert marks["expert_number"] == number
            assert marks["allreduce"] is False
            assert marks["group_name"] == "ep_size_2"
    assert all(get_expert_tag(p) is None for p in moe.deepspeed_moe.gate.parameters())


def test_the_layer_is_deepspeeds_but_for_its_label() -> None:
    ours, theirs = layer(), DeepSpeedMoE(HIDDEN, FFN(), 4, 2)
    assert ours.expert_group_name == theirs.expert_group_name == "ep_size_2"
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


def test_the_signature_is_deepspeeds_plus_a_keyword() -> None:
    *ours, last = inspect.signature(MoE).parameters.values()
    theirs = inspect.signature(DeepSpeedMoE).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert (last.name, last.kind, last.default) == ("expert_group_name", last.KEYWORD_ONLY, None)


def test_every_argument_reaches_deepspeeds_layer() -> None:
    options: dict[str, Any] = {
        "k": 2,
        "capacity_factor": 1.5,
        "eval_capacity_factor": 2.5,
        "min_capacity": 7,
        "use_residual": True,
        "noisy_gate_policy": "RSample",
        "drop_tokens": False,
        "use_rts": False,
        "enable_expert_tensor_parallelism": True,
        "top2_2nd_expert_sampling": False,
    }

    def settings(moe: Any) -> set[tuple[str, Any]]:
        parts = (moe, moe.deepspeed_moe, moe.deepspeed_moe.gate)
        plain = (item for part in parts for item in vars(part).items())
        return {(key, value) for key, value in plain if isinstance(value, int | float | str)}

    for some in (options, *({key: value} for key, value in options.items())):
        ours, theirs = layer(None, **some), DeepSpeedMoE(HIDDEN, FFN(), 4, 2, **some)
        assert settings(ours) >= settings(theirs)


def test_the_residual_mlp_is_dense() -> None:
    moe = layer(use_residual=True)
    dense = [name for name, tag in tags(moe).items() if tag is None]
    assert {name.partition(".")[0] for name in dense} == {"mlp", "coefficient", "deepspeed_moe"}
    groups = create_moe_param_groups(moe)
    mlp = {id(p) for p in moe.mlp.parameters()}
    assert mlp <= {id(p) for g in groups if not g.get("moe") for p in g["params"]}


def test_global_numbers_count_over_all_ranks() -> None:
    tag = ExpertTag("ep_size_4", "a", expert_number=1, num_local_experts=3)
    assert [tag.global_number(rank) for rank in range(4)] == [1, 4, 7, 10]
    assert ExpertTag("ep_size_4", "a").global_number(2) is None


@pytest.mark.parametrize("bad", ["", "a b", "a\n", "a\tb", "a\x00"])
def test_labels_that_would_break_a_process_group_key(bad: Any) -> None:
    with pytest.raises(TagError, match="expert_group_name="):
        layer(bad)
    param = nn.Parameter(torch.zeros(2))
    with pytest.raises(TagError, match="expert_group_name="):
        set_expert_tag(param, ExpertTag("ep_size_2", bad))
    assert not vars(param)


# ---- copies ----------------------------------------------------------------------------

COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("label", ["a", None])
def test_copies_keep_their_tags(copied: Callable[[Any], Any], label: str | None) -> None:
    moe = layer(label, use_residual=True)
    clone = copied(moe)
    assert tags(clone) == tags(moe)
    assert type(clone) is MoE
    assert not {id(p) for p in clone.parameters()} & {id(p) for p in moe.parameters()}
    assert all(torch.equal(a, b) for a, b in zip(moe.parameters(), clone.parameters(), strict=True))


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle"])
def test_copies_of_a_model_group_alike(copied: Callable[[Any], Any]) -> None:
    model = TinyMoE(MoE)
    clone = copied(model)
    names = [g["name"] for g in create_moe_param_groups(clone, split_by="expert")]
    assert names == [g["name"] for g in create_moe_param_groups(model, split_by="expert")]
    assert tags(clone) == tags(model)


def test_a_copied_layer_without_a_label_takes_its_new_name() -> None:
    first = layer(None)
    create_moe_param_groups(first)  # as part of another model, it was called otherwise
    model = nn.ModuleDict({"x": first, "y": copy.deepcopy(first)})
    names = [g["name"] for g in create_moe_param_groups(model) if g.get("moe")]
    assert names == ["ep_size_2_x", "ep_size_2_y"]


# ---- two layers with one name ----------------------------------------------------------


def duplicates(other_ep_size: int = 2) -> nn.ModuleDict:
    return nn.ModuleDict({"first": layer("same"), "second": layer("same", other_ep_size)})


def only_experts(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if get_expert_tag(p)]


@pytest.mark.parametrize("other_ep_size", [2, 4])
@pytest.mark.parametrize(
    "as_input",
    [lambda m: m, lambda m: m.named_parameters(), only_experts],
    ids=["module", "named", "experts"],
)
def test_two_layers_with_one_label_are_named(
    as_input: Callable[[nn.Module], Any], other_ep_size: int
) -> None:
    model = duplicates(other_ep_size)
    before = tags(model)
    with pytest.raises(TagError, match=r"two MoE layers are called 'same'.*first\b.*second\b"):
        create_moe_param_groups(as_input(model))
    assert tags(model) == before


def test_two_layers_with_one_label_without_names() -> None:
    with pytest.raises(TagError, match="two MoE layers are called 'same'"):
        create_moe_param_groups(duplicates().parameters())


def test_a_copy_beside_its_original_clashes() -> None:
    first = layer("same")
    model = nn.ModuleDict({"first": first, "second": copy.deepcopy(first)})
    with pytest.raises(TagError, match="two MoE layers are called 'same'"):
        create_moe_param_groups(model.parameters())


def test_a_label_that_is_another_layers_module_name_clashes() -> None:
    model = nn.ModuleDict({"first": layer(None), "second": layer("first")})
    with pytest.raises(TagError, match="two MoE layers are called 'first'"):
        create_moe_param_groups(model)


def test_one_layer_used_in_two_places_is_one_layer() -> None:
    shared = layer("same")
    model = nn.ModuleList([shared, nn.Linear(2, 2), shared])
    for params in (model, list(model.parameters())):
        groups = create_moe_param_groups(params)
        assert [g["name"] for g in groups] == ["dense", "ep_size_2_same"]


# ---- tags by hand ----------------------------------------------------------------------


def test_a_replaced_parameter_takes_the_tag_of_the_old_one() -> None:
    moe = layer("a")
    expert: Any = experts(moe)[1]
    new = nn.Parameter(torch.zeros_like(expert.up.weight))
    copy_expert_tag(expert.up.weight, new)
    expert.up.weight = new
    assert get_expert_tag(new) == ExpertTag("ep_size_2", "a", 1, 2)
    for params in (moe, list(moe.parameters())):
        groups = create_moe_param_groups(params, split_by="expert")
        assert [g["name"] for g in groups][1:] == ["ep_size_2_a.expert.0", "ep_size_2_a.expert.1"]


def test_copying_from_a_dense_parameter_does_nothing() -> None:
    source, target = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    copy_expert_tag(source, target)
    assert not vars(target)


@pytest.mark.parametrize("tag", [tag_experts, create_moe_param_groups])
def test_parameters_know_their_layer_once_the_module_was_seen(tag: Callable[[Any], Any]) -> None:
    model = TinyMoE(MoE, ep_size=2)
    with pytest.raises(TagError, match="pass the module"):
        create_moe_param_groups(model.parameters())
    tag(model)
    found = {tag.layer for tag in tags(model).values() if tag is not None}
    assert found == {"blocks.0.moe", "blocks.1.moe"}
    by_params = create_moe_param_groups(model.parameters(), split_by="expert")
    by_module = create_moe_param_groups(model, split_by="expert")
    assert [g["name"] for g in by_params] == [g["name"] for g in by_module]
