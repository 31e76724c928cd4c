"""Our split under DeepSpeed's name, beside DeepSpeed's own."""

import inspect
from typing import Any

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from hypothesis import given, settings, strategies as st
from torch import nn

from moe_groups import (
    ExpertTag,
    set_expert_tag,
    split_params_into_different_moe_groups_for_optimizer as our_split,
)
from tests.support.random_models import Case, cases

Groups = list[dict[str, Any]]


@given(cases(forms=("params",), dtypes=(torch.float32,), min_layers=1), st.integers(1, 40))
@settings(max_examples=200)
def test_never_more_expert_groups_nor_larger_ones_at_the_same_number(case: Case, cap: int) -> None:
    params = list(case.model.parameters())
    ours = our_split({"params": params}, max_group_size=cap)
    stock = stock_split({"params": params, "name": "dense"}, max_group_size=cap)
    for parallel_group in {row.place[0] for row in case.grouped if row.place}:
        mine, theirs = (expert_sizes(groups, parallel_group) for groups in (ours, stock))
        assert len(mine) <= len(theirs)
        if len(mine) == len(theirs):
            assert max(mine) <= max(theirs)


def expert_sizes(groups: Groups, parallel_group: str) -> list[int]:
    """Elements of each non-empty expert group of one parallel group."""
    return [
        sum(p.numel() for p in group["params"])
        for group in groups
        if group.get("moe") and group["params"] and group["params"][0].group_name == parallel_group
    ]


def model() -> list[nn.Parameter]:
    """Dense parameters of 10 elements, and experts of 6 in two parallel groups."""
    params = [nn.Parameter(torch.zeros(10)) for _ in range(3)]
    for ep_size in (1, 2):
        for number in range(3):
            params.append(nn.Parameter(torch.zeros(6)))
            set_expert_tag(params[-1], ExpertTag(f"ep_size_{ep_size}", f"layer{ep_size}", number))
    return params


def test_the_signature_is_deepspeeds_plus_a_keyword() -> None:
    *ours, last = inspect.signature(our_split).parameters.values()
    theirs = inspect.signature(stock_split).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert last.kind is last.KEYWORD_ONLY


@pytest.mark.parametrize("form", [lambda group: group, lambda group: [group], lambda g: (g,)])
def test_the_same_groups_as_deepspeeds_where_that_is_well_behaved(form: Any) -> None:
    """One named group and no cap: the same members and options; DeepSpeed's order is its own."""
    params = model()
    ours = our_split(form({"params": params, "name": "all", "lr": 0.1}), None)
    stock = stock_split(form({"params": params, "name": "all", "lr": 0.1}), None)

    def content(groups: Groups) -> set[tuple[Any, ...]]:
        return {
            (g.get("moe", False), g["name"], g["lr"], tuple(map(id, g["params"]))) for g in groups
        }

    assert content(ours) == content(stock)


def test_dense_groups_are_capped_too_and_none_is_empty() -> None:
    params = model()
    ours = our_split({"params": params, "name": "all"}, max_group_size=5)
    assert [len(g["params"]) for g in ours] == [1] * 9
    stock = stock_split({"params": params, "name": "all"}, max_group_size=5)
    assert [] in [g["params"] for g in stock]  # the reason for the second half of the name


@pytest.mark.parametrize("split_by", ["parallel_group", "module", "expert"])
def test_a_finer_level(split_by: Any) -> None:
    ours = our_split({"params": model()}, split_by=split_by)
    expected = {"parallel_group": 2, "module": 2, "expert": 6}[split_by]
    assert len([g for g in ours if g.get("moe")]) == expected
