"""Input that cannot be grouped: the message names the culprit, and nothing is half-changed."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from moe_groups import (
    ExpertTag,
    MoE,
    MoEGroupsError,
    create_moe_param_groups,
    set_expert_tag,
    split_params_into_different_moe_groups_for_optimizer,
)
from moe_groups.errors import InvalidArgumentError, ParameterInputError, TagError, VerificationError
from tests.support.models import TinyMoE


def parameter(size: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size))


def expert(parallel_group: Any = "ep_size_2", **marks: Any) -> nn.Parameter:
    param = parameter()
    for key, value in {"allreduce": False, "group_name": parallel_group, **marks}.items():
        setattr(param, key, value)
    return param


# ---- arguments -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_by": "layer"}, "split_by='layer' must be 'parallel_group', 'module', 'expert' or"),
        ({"max_group_size": 0}, "max_group_size=0 must"),
        ({"max_group_size": -5}, "max_group_size=-5 must"),
        ({"max_group_size": 0.5}, "max_group_size=0.5 must"),
        ({"max_group_size": float("nan")}, "max_group_size=nan must"),
        ({"max_group_size": True}, "max_group_size=True must"),
        ({"max_group_size": "1e6"}, "max_group_size='1e6' must"),
        ({"max_group_bytes": 0, "data_parallel_size": 2}, "max_group_bytes=0 must"),
        ({"max_group_bytes": 99}, "max_group_bytes.*number of ranks is not known"),
        ({"max_group_bytes": 99, "data_parallel_size": 0}, "data_parallel_size=0 must"),
        ({"max_group_bytes": 99, "data_parallel_size": 3}, "3 ranks cannot hold.*ep_size_2"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        create_moe_param_groups(TinyMoE(MoE, ep_size=2), **options)


@pytest.mark.parametrize("cap", [None, float("inf"), 1e9, 10**12])
def test_caps_that_mean_no_cut(cap: float | None) -> None:
    assert len(create_moe_param_groups(nn.Linear(4, 4), max_group_size=cap)) == 1


# ---- forms of input --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lr": 0.1, "name": "x"}, r"group 0 \('x'\) has no \"params\".*'lr', 'name'"),
        ([{"params": [parameter()]}, {"lr": 0.1}], "group 1 has no"),
        ({parameter(), parameter()}, "set, which has another order"),
        ({"params": {parameter()}, "name": "x"}, r"group 0 \('x'\) come as a set"),
        (3, "expected a module, parameters.*got int"),
        ({"params": None}, "group 0: expected .* got NoneType"),
        ([parameter(), "w"], "item 1 is a str"),
        ([parameter(), {"params": []}], "item 1 is a dict"),
        ([{"params": []}, parameter()], "group 1 is a Parameter"),
        ([("w", 3)], "item 0 is a tuple"),
        ({"params": [nn.Linear(2, 2)], "name": "x"}, r"group 0 \('x'\): item 0 is a Linear"),
        ([], "none of the 0 parameters is trainable"),
        ({"params": []}, "none of the 0 parameters is trainable"),
        ({"params": [parameter()], "param_names": ["a", "b"]}, "group 0.*param_names"),
    ],
)
def test_input_of_another_form(params: Any, message: str) -> None:
    with pytest.raises(ParameterInputError, match=message):
        create_moe_param_groups(params)


def test_the_drop_in_split_takes_group_dicts_only() -> None:
    with pytest.raises(InvalidArgumentError, match="Linear> must be a group dict or a list"):
        split_params_into_different_moe_groups_for_optimizer(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_parameter_in_two_groups() -> None:
    tied = parameter()
    named: list[dict[str, Any]] = [
        {"params": [("emb", tied)], "name": "a"},
        {"params": [("head", tied)]},
    ]
    with pytest.raises(ParameterInputError, match=r"emb is in two groups, group 0 \('a'\) and"):
        create_moe_param_groups(named)
    unnamed = [{"params": [parameter()]}, {"params": [tied]}, {"params": [tied]}]
    with pytest.raises(ParameterInputError, match=r"shape \(3,\) is in two.* group 1 and group 2"):
        create_moe_param_groups(unnamed)


# ---- what can be grouped though it looks odd -------------------------------------------


def test_no_expert_at_all_gives_dense_groups() -> None:
    groups = create_moe_param_groups(nn.Linear(4, 4), split_by="expert", max_group_size=16)
    assert [g["name"] for g in groups] == ["dense.tile.0", "dense.tile.1"]
    assert not [g for g in groups if "moe" in g or "expert_group_name" in g]


@pytest.mark.parametrize("names", [(None, None), ("same", "same"), ("", "x"), (7, 7)])
def test_unnamed_and_same_named_groups_keep_their_options(names: tuple[Any, Any]) -> None:
    dicts: Any = [{"params": [parameter(), expert()], "lr": lr} for lr in (1, 2)]
    for group, name in zip(dicts, names, strict=True):
        if name is not None:
            group["name"] = name
    groups = split_params_into_different_moe_groups_for_optimizer(dicts)
    assert len({g["name"] for g in groups}) == len(groups) == 4
    lr_of = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert [lr_of[id(p)] for g in dicts for p in g["params"]] == [1, 1, 2, 2]


def test_all_frozen() -> None:
    with pytest.raises(ParameterInputError, match="none of the 2 parameters is trainable"):
        create_moe_param_groups(nn.Linear(4, 4).requires_grad_(False))


def test_several_modules() -> None:
    with pytest.raises(ParameterInputError, match=r"item 0 is a Linear.*nn\.ModuleList"):
        create_moe_param_groups([nn.Linear(2, 2), nn.Linear(2, 2)])  # type: ignore[arg-type]


# ---- tags ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, "", "experts", "ep_size_0", "ep_size_2_a", "ep_size_", 2, ["e"]]
)
@pytest.mark.parametrize("split_by", ["parallel_group", "module", "expert"])
def test_expert_without_a_usable_process_group(value: Any, split_by: Any) -> None:
    bad = ("w.bad", expert(value, expert_group_name="a"))
    with pytest.raises(TagError, match=r"w\.bad.*group_name="):
        create_moe_param_groups([("ok", parameter()), bad], split_by=split_by)


@pytest.mark.parametrize("label", ["a b", "a\tb", "", "\x07", 3, ["a"]])
@pytest.mark.parametrize("split_by", ["parallel_group", "module", "expert"])
def test_labels_that_would_break_a_process_group_key(label: Any, split_by: Any) -> None:
    bad = expert(expert_group_name=label)
    with pytest.raises(TagError, match="expert_group_name="):
        create_moe_param_groups([parameter(), bad], split_by=split_by)


def test_experts_that_do_not_know_their_layer() -> None:
    with pytest.raises(TagError, match=r"w\.bad.*pass the module"):
        create_moe_param_groups([("w.bad", expert())])
    assert create_moe_param_groups([expert()], split_by="parallel_group")  # needs no layer


def test_set_expert_tag_refuses_and_changes_nothing() -> None:
    param = parameter()
    with pytest.raises(TagError, match="'experts'"):
        set_expert_tag(param, ExpertTag("experts"))
    assert not vars(param)


# ---- nothing half-changed --------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"overrides": [("no.such.name", {"lr": 1.0})]},
        {"overrides": [("inp", {"lr": 1.0}), ("inp.*", {"lr": 2.0})]},
        {"max_group_bytes": 99, "data_parallel_size": 3},
        {"no_decay": lambda name, param: 1 / 0},
    ],
)
def test_an_error_leaves_everything_as_it_was(options: dict[str, Any]) -> None:
    model = TinyMoE(MoE, ep_size=2)

    def state() -> Any:
        return [(name, p.requires_grad, dict(vars(p))) for name, p in model.named_parameters()]

    before = state()
    with pytest.raises((MoEGroupsError, ZeroDivisionError)):
        create_moe_param_groups(model, **options)
    assert state() == before
    assert gc.isenabled()
    dicts = [{"params": list(model.named_parameters()), "lr": 0.1}]
    shallow = copy.copy(dicts[0])
    with pytest.raises((MoEGroupsError, ZeroDivisionError)):
        create_moe_param_groups(dicts, split_by="parallel_group", **options)
    assert dicts[0] == shallow
    assert state() == before


def test_errors_survive_pickling() -> None:
    """They travel between processes."""
    error = pickle.loads(pickle.dumps(VerificationError(["one", "two"])))
    assert error.problems == ["one", "two"]
    assert "2 problem(s)" in str(error)
    assert issubclass(TagError, ValueError)
    assert issubclass(TagError, MoEGroupsError)
