"""Halves for Muon and Adam, over random models; torch's Muon over the same groups."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from moe_groups import create_moe_param_groups, is_norm_or_bias, tag_experts
from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.muon import is_hidden_matrix, split_for_muon
from tests.pure.groups.test_invariants import LEVELS, OURS, row_of
from tests.support.newton_schulz import ROOM, orthogonalized, rounding_of
from tests.support.random_models import Case, cases

MUON = {"lr": 0.5, "momentum": 0.9}
ADAM = {"lr": 0.25, "betas": (0.5, 0.6)}
ONLY = {True: {"momentum", "ns_method"}, False: {"betas", "eps"}}


def unfold(case: Case) -> None:
    """Make some of the vectors matrices, by their sizes.

    Not in fused layers: beside a tensor of three dimensions one of two is a stack of vectors.
    """
    for row in case.rows:
        fused = row.place is not None and row.place[2] is None
        if row.param.ndim == 1 and row.param.numel() % 2 and not fused:
            row.param.data = row.param.data[None]


def own_dims(param: torch.Tensor) -> int:
    return param.ndim - (not getattr(param, "allreduce", True) and param.ndim == 3)


def by_numel(name: str, param: torch.Tensor) -> bool:
    return own_dims(param) >= 2 and param.numel() % 3 > 0


@given(cases(), LEVELS, st.none() | st.integers(1, 40), st.sampled_from((None, by_numel)))
def test_halves(case: Case, split_by: Any, cap: int | None, rule: Any) -> None:
    unfold(case)
    rows = row_of(case)
    halves = split_for_muon(case.given, muon=MUON, adam=ADAM, is_muon=rule)
    groups = create_moe_param_groups(halves, split_by=split_by, max_group_size=cap)
    out = [id(param) for group in groups for param in group["params"]]
    assert sorted(out) == sorted(id(row.param) for row in case.grouped)
    assert len({group["name"] for group in groups}) == len(groups)
    for group in groups:
        members = [rows[id(param)] for param in group["params"]]
        assert len({row.key(split_by) for row in members}) == 1
        use_muon = group["use_muon"]
        for row in members:
            assert vars(row.param)["use_muon"] is use_muon
            matrix = own_dims(row.param) == 2
            assert use_muon is (matrix if rule is None else by_numel("", row.param))
        assert options_of(group) == expected_options(use_muon, case.groups[members[0].source])


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in OURS}


def expected_options(use_muon: bool, own: Mapping[str, Any]) -> dict[str, Any]:
    """The half's, then those of the caller's group that are not the other half's."""
    other = ONLY[not use_muon]
    kept = {key: value for key, value in own.items() if key != "name" and key not in other}
    return {**(MUON if use_muon else ADAM), **kept, "use_muon": use_muon}


class Model(nn.Module):
    """Names as Hugging Face and Megatron give them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 4)
        self.embed_proj = nn.Linear(4, 4, bias=False)
        self.attn = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 4, 2)
        self.mlp = nn.ModuleDict({"experts": Experts(), "router": nn.Linear(4, 2, bias=False)})
        self.lm_head = nn.Linear(4, 12)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(2, 8, 4))
        self.down_proj_bias = nn.Parameter(torch.zeros(2, 4))
        self.scale = nn.Parameter(torch.zeros(2, 4))
        for param in self.parameters():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = "ep_size_1"  # type: ignore[attr-defined]


MATRICES = {
    "attn.in_proj_weight",
    "attn.out_proj.weight",
    "mlp.experts.down_proj",
    "mlp.router.weight",
}


def test_default_rule() -> None:
    model = Model()
    muon, adam = split_for_muon(model, muon=MUON, adam=ADAM)
    assert {name for name, _ in muon["params"]} == MATRICES
    assert (muon["name"], adam["name"]) == ("muon", "adam")
    tag_experts(model)
    table = {"table.weight"}  # only the module tells that it is an embedding
    assert {n for n, p in model.named_parameters() if is_hidden_matrix(n, p)} == MATRICES | table


def test_overrides_and_decay_reach_both_halves() -> None:
    halves = split_for_muon(Model(), muon=MUON, adam=ADAM)
    groups = create_moe_param_groups(
        halves,
        weight_decay=0.1,
        no_decay=is_norm_or_bias,
        overrides=[("*.experts.*", {"lr": 2.0})],
    )
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "muon": (0.5, 0.1),
        "adam": (0.25, 0.1),
        "adam.no_decay": (0.25, 0.0),
        "ep_size_1_mlp.muon.override.0": (2.0, 0.1),
        "ep_size_1_mlp.adam.no_decay.override.0": (2.0, 0.0),
    }


@pytest.mark.parametrize("chosen", ["norm.weight", "mlp.experts.down_proj_bias"])
def test_what_is_no_matrix_is_refused(chosen: str) -> None:
    model = Model()
    with pytest.raises(InvalidArgumentError, match=chosen):
        split_for_muon(model, muon=MUON, adam=ADAM, is_muon=lambda name, _: name == chosen)
    assert not any(hasattr(param, "use_muon") for param in model.parameters())
    assert not hasattr(model.mlp["experts"].scale, "expert_group_name")


def test_options_of_the_grouping_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"adam=.*'name'"):
        split_for_muon(Model(), muon=MUON, adam={"name": "mine"})


@pytest.mark.numeric
def test_muon_of_torch() -> None:
    model = Model()

    def rule(name: str, param: torch.Tensor) -> bool:
        return is_hidden_matrix(name, param) and param.ndim == 2

    with pytest.raises(ValueError, match="only supports 2D"):
        torch.optim.Muon([g for g in ours(model, None) if g["use_muon"]])
    groups = ours(model, rule)
    muon = torch.optim.Muon([group for group in groups if group["use_muon"]])
    adam = torch.optim.AdamW([group for group in groups if not group["use_muon"]])
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.randn_like(param)
        if param.ndim == 2:
            nn.init.orthogonal_(param.grad)  # no singular value is small, where rounding is felt
    muon.step()
    adam.step()
    for name, param in model.named_parameters():
        step = param.detach() - before[name]
        if rule(name, param) and not name.startswith("table"):
            step += MUON["lr"] * 0.1 * before[name]  # its weight decay
            assert param.grad is not None
            error = float((step / -MUON["lr"] - orthogonalized(param.grad)).norm())
            assert error < ROOM * rounding_of(param.grad, torch.bfloat16), name
        else:
            assert float(step.abs().max()) > 0, name


def ours(model: nn.Module, rule: Any) -> list[dict[str, Any]]:
    return create_moe_param_groups(split_for_muon(model, muon=MUON, adam=ADAM, is_muon=rule))
