"""Decay rules and overrides: which parameters they select, and which value wins."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_groups import (
    ExpertTag,
    MoE,
    create_moe_param_groups,
    is_norm_or_bias,
    plan_param_groups,
    set_expert_tag,
    split_for_muon,
)
from moe_groups.errors import InvalidArgumentError, OverrideError
from tests.support.models import HIDDEN, MoEBlock

EXPERTS = 11  # so that expert 1 and expert 10 are distinguished


class Labelled(nn.Module):
    """Two MoE layers whose labels differ from their module names ``blocks.<n>.moe``."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(
            MoEBlock(MoE, num_experts=EXPERTS, expert_group_name=f"layers.{n}.moe")
            for n in range(2)
        )


def options_of(groups: list[dict[str, Any]], model: nn.Module, key: str) -> dict[str, Any]:
    """Qualified parameter name to the option of its group, where it has that."""
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(p)]: g[key] for g in groups if key in g for p in g["params"]}


def expert_name(layer: int, number: int) -> str:
    return f"blocks.{layer}.moe.deepspeed_moe.experts.deepspeed_experts.{number}."


# ---- is_norm_or_bias -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("norm.weight", (8,), True),
        ("fc.bias", (8,), True),
        ("scale", (), True),
        ("", (8,), True),
        ("experts.down_proj_bias", (4, 8), True),
        ("experts.bias", (4, 8), True),
        ("fc.weight", (8, 4), False),
        ("", (8, 4), False),
        ("experts.down_proj", (4, 8, 16), False),
        ("relative_attention_bias.weight", (32, 8), False),
        ("bias_gelu.weight", (8, 4), False),
        ("norm.proj.weight", (8, 4), False),
    ],
)
def test_norms_and_biases_of_dense_parameters(
    name: str, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_norm_or_bias(name, torch.empty(shape, device="meta")) is expected


@pytest.mark.parametrize(
    ("name", "shape", "fused", "expected"),
    [
        ("experts.down_proj", (4, 8), True, True),  # one vector for each expert
        ("experts.down_proj", (4, 8, 16), True, False),
        ("experts.norm.weight", (4, 8), False, True),
        ("experts.ln_1.weight", (4, 8), False, True),
        ("experts.post_layernorm.weight", (4, 8), False, True),
        ("experts.3.up.weight", (8, 4), False, False),
        ("experts.3.normalizer.weight", (8, 4), False, False),
        ("blocks.1.prenorm.fn.experts.3.up.weight", (8, 4), False, False),
    ],
)
def test_norms_and_biases_of_experts(
    name: str, shape: tuple[int, ...], fused: bool, expected: bool
) -> None:
    param = nn.Parameter(torch.empty(shape, device="meta"))
    set_expert_tag(param, ExpertTag("ep_size_1", "moe", fused=fused))
    assert is_norm_or_bias(name, param) is expected


def test_placeholders_are_judged_by_their_real_shape() -> None:
    param = nn.Parameter(torch.empty(0))
    param.ds_shape = torch.Size((8, 4))  # type: ignore[attr-defined]
    assert not is_norm_or_bias("fc.weight", param)
    param.ds_shape = torch.Size((8,))  # type: ignore[attr-defined]
    assert is_norm_or_bias("fc.weight", param)


# ---- decay -----------------------------------------------------------------------------


def test_decay_is_zero_where_the_rule_says_so_and_only_there() -> None:
    model = Labelled()
    groups = create_moe_param_groups(model, weight_decay=0.1, no_decay=is_norm_or_bias)
    found = options_of(groups, model, "weight_decay")
    expected = {n: 0.0 if is_norm_or_bias(n, p) else 0.1 for n, p in model.named_parameters()}
    assert found == expected
    assert set(expected.values()) == {0.0, 0.1}


def test_without_a_default_only_the_exempt_groups_say_anything() -> None:
    model = nn.Linear(4, 4)
    groups = create_moe_param_groups(model, no_decay=is_norm_or_bias)
    assert options_of(groups, model, "weight_decay") == {"bias": 0.0}


def test_the_rule_sees_names_and_parameters() -> None:
    model = nn.Linear(4, 4)
    seen = []
    create_moe_param_groups(model, no_decay=lambda name, param: bool(seen.append((name, param))))  # type: ignore[func-returns-value]
    assert [(name, id(param)) for name, param in seen] == [
        (name, id(param)) for name, param in model.named_parameters()
    ]


# ---- overrides -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "prefixes"),
    [
        ("inp.weight", ["inp.weight"]),
        ("inp", ["inp."]),
        ("blocks.1", ["blocks.1."]),
        ("blocks.*.norm", ["blocks.0.norm.", "blocks.1.norm."]),
        ("layers.1.moe", [expert_name(1, n) for n in range(EXPERTS)]),
        ("layers.1.moe.expert.1", [expert_name(1, 1)]),
        ("*.moe.*expert.3*", [expert_name(0, 3), expert_name(1, 3)]),
        ("*.expert.10.down", [expert_name(0, 10) + "down", expert_name(1, 10) + "down"]),
        ("layers.[!0].moe.expert.?", [expert_name(1, n) for n in range(10)]),
    ],
)
@pytest.mark.parametrize("split_by", ["parallel_group", "module", "expert"])
def test_patterns_select_names_modules_layers_and_experts(
    pattern: str, prefixes: list[str], split_by: Any
) -> None:
    model = Labelled()
    groups = create_moe_param_groups(model, split_by=split_by, overrides=[(pattern, {"lr": 0.5})])
    names = [name for name, _ in model.named_parameters()]
    expected = {name: 0.5 for name in names if name.startswith(tuple(prefixes))}
    assert options_of(groups, model, "lr") == expected
    assert expected


def test_parameters_without_names_are_selected_by_layer_and_expert() -> None:
    model = Labelled()
    groups = create_moe_param_groups(
        model.parameters(), overrides=[("layers.0.moe.expert.2", {"lr": 0.5})]
    )
    found = options_of(groups, model, "lr")
    assert set(found) == {n for n, _ in model.named_parameters() if expert_name(0, 2) in n}
    assert len(found) == 3


def test_a_pattern_that_matches_nothing_is_named() -> None:
    overrides = [("inp", {"lr": 0.5}), ("imp.*", {"lr": 0.1}), ("*.expert.99", {"lr": 0.1})]
    with pytest.raises(
        OverrideError, match=r"'imp\.\*', '\*\.expert\.99' match no trainable parameter"
    ) as error:
        create_moe_param_groups(Labelled(), overrides=overrides)
    assert "'inp'" not in str(error.value)
    assert "inp.weight" in str(error.value)  # an example of what there is


def test_conflicting_overrides_show_both_values_and_the_parameter() -> None:
    overrides = [("blocks.1", {"lr": 0.25}), ("*.expert.3", {"lr": 0.75, "eps": 1e-6})]
    with pytest.raises(OverrideError) as error:
        create_moe_param_groups(Labelled(), overrides=overrides)
    shown = ("blocks.1", "0.25", "*.expert.3", "0.75", expert_name(1, 3))
    assert all(part in str(error.value) for part in shown)


def test_overrides_that_agree_or_set_different_keys_combine() -> None:
    model = Labelled()
    overrides: list[tuple[str, dict[str, Any]]] = [
        ("layers.1.moe", {"lr": 0.5, "betas": (0.8, 0.9)}),
        ("*.expert.3", {"lr": 0.5, "eps": 1e-6}),
    ]
    groups = create_moe_param_groups(model, overrides=overrides)
    assert {options_of(groups, model, key)[expert_name(1, 3) + "down.weight"] for key in
            ("lr", "betas", "eps")} == {0.5, (0.8, 0.9), 1e-6}  # fmt: skip
    assert expert_name(0, 2) + "down.weight" not in options_of(groups, model, "lr")


def test_override_wins_over_the_callers_group_and_that_over_defaults() -> None:
    layers = [nn.Linear(4, 4) for _ in range(2)]
    model = nn.ModuleList(layers)
    own, default = (list(layer.named_parameters(prefix=str(n))) for n, layer in enumerate(layers))
    given: list[dict[str, Any]] = [
        {"params": own, "weight_decay": 0.5, "lr": 0.3},
        {"params": default},
    ]
    groups = create_moe_param_groups(
        given,
        weight_decay=0.1,
        no_decay=is_norm_or_bias,
        overrides=[("0.weight", {"lr": 0.7}), ("1.bias", {"weight_decay": 0.9})],
    )
    assert options_of(groups, model, "weight_decay") == {
        "0.weight": 0.5,
        "0.bias": 0.5,  # the caller gave it, so the rule does not apply
        "1.weight": 0.1,
        "1.bias": 0.9,  # not the rule's 0.0
    }
    assert options_of(groups, model, "lr") == {"0.weight": 0.7, "0.bias": 0.3}


@pytest.mark.parametrize(
    ("override", "culprit"),
    [
        (("*", {"params": []}), "params"),
        (("*", {"moe": True, "lr": 0.1}), "moe"),
        (("*", {"name": "x"}), "name"),
        ("*", r"overrides\[0\]='\*' must be 2 values: a string, a dict"),
        (("*", 0.1), r"overrides\[0\]\[1\]=0.1 must be a dict"),
        ((3, {"lr": 0.1}), r"overrides\[0\]\[0\]=3 must be a string"),
    ],
)
def test_overrides_that_cannot_be_used(override: Any, culprit: str) -> None:
    with pytest.raises(InvalidArgumentError, match=culprit):
        create_moe_param_groups(nn.Linear(4, 4), overrides=[override])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr=-0.001 must be finite and at least 0"),
        ({"lr": float("nan")}, "lr=nan must be"),
        ({"lr": 10**400}, "lr=10000.* must be"),
        ({"lr": "1e-3"}, "lr='1e-3' must be a finite number or a tensor"),
        ({"lr": True}, "lr=True must be"),
        ({"lr": torch.tensor(-1.0)}, "must be finite and at least 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must be 2 or 3 numbers below 1"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\) must be 2 or 3 numbers below 1"),
        ({"amsgrad": "False"}, "amsgrad='False' must be True or False"),
        ({"lerning_rate": 1e-4}, "'lerning_rate', which no optimizer reads: use 'lr'"),
        ({"wieght_decay": 0.0}, "use 'weight_decay'"),
        ({"LR": 1e-4}, "use 'lr'"),
    ],
)
def test_options_that_no_optimizer_can_use(options: dict[str, Any], message: str) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(InvalidArgumentError, match=f"override '\\*'.*{message}"):
        create_moe_param_groups(model, overrides=[("*", options)])
    with pytest.raises(InvalidArgumentError, match=f"group 0.*{message}"):
        create_moe_param_groups({"params": model.named_parameters(), **options})
    with pytest.raises(InvalidArgumentError, match=message):
        plan_param_groups(model, overrides=[("*", options)], data_parallel_size=2)
    with pytest.raises(InvalidArgumentError, match=f"muon.*{message}"):
        split_for_muon(model, muon=options, adam={})


def test_keys_of_ones_own() -> None:
    """An override may set what group dicts have, and what an imported optimizer takes."""
    model, scaled = nn.Linear(4, 4), [("*", {"lr_scale": 0.5})]
    with pytest.raises(InvalidArgumentError, match="'lr_scale', which no optimizer reads"):
        create_moe_param_groups(model, overrides=scaled)
    given = {"params": model.named_parameters(), "lr_scale": 1.0}
    assert create_moe_param_groups(given, overrides=scaled)[0]["lr_scale"] == 0.5

    class Lookahead(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, slow_steps: int = 5) -> None:
            super().__init__(params, lr)

    slow = create_moe_param_groups(model, overrides=[("*", {"slow_steps": 6})])
    assert Lookahead(slow, lr=0.1).param_groups[0]["slow_steps"] == 6
