"""What always holds, over random models and every form of input."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from deepspeed.utils import groups as process_groups
from hypothesis import given, settings, strategies as st

from moe_groups import ExpertTag, create_moe_param_groups, set_expert_tag
from tests.pure.groups.test_packing import all_cuts, allowed, score
from tests.support.random_models import Case, Place, Row, cases

LEVELS = st.sampled_from(("parallel_group", "module", "expert"))
CAPS = st.none() | st.integers(1, 40)
OURS = ("params", "name", "moe", "expert_group_name", "expert_number")


def odd_size(name: str, param: torch.Tensor) -> bool:
    """A decay rule that divides every group."""
    return param.numel() % 2 == 1


def row_of(case: Case) -> dict[int, Row]:
    return {id(row.param): row for row in case.rows}


@given(cases(), LEVELS, CAPS)
def test_every_trainable_parameter_is_in_exactly_one_group(
    case: Case, split_by: Any, cap: int | None
) -> None:
    groups = create_moe_param_groups(case.given, split_by=split_by, max_group_size=cap)
    out = [id(p) for group in groups for p in group["params"]]
    assert sorted(out) == sorted(id(row.param) for row in case.grouped)
    assert all(group["params"] for group in groups)


@given(cases(), LEVELS, CAPS)
def test_groups_are_homogeneous_and_say_what_they_hold(
    case: Case, split_by: Any, cap: int | None
) -> None:
    rows = row_of(case)
    for group in create_moe_param_groups(case.given, split_by=split_by, max_group_size=cap):
        members = [rows[id(p)] for p in group["params"]]
        assert len({row.key(split_by) for row in members}) == 1
        place = members[0].place
        assert group.get("moe", False) is (place is not None)
        if place is not None:
            assert group["expert_group_name"] == (
                None if split_by == "parallel_group" else place[1]
            )
            assert group["expert_number"] == (place[2] if split_by == "expert" else None)


@given(cases(forms=("groups",)), LEVELS, CAPS)
def test_hyperparameters_reach_exactly_the_parameters_they_were_given_for(
    case: Case, split_by: Any, cap: int | None
) -> None:
    rows = row_of(case)
    for group in create_moe_param_groups(case.given, split_by=split_by, max_group_size=cap):
        options = {key: value for key, value in group.items() if key not in OURS}
        for param in group["params"]:
            given_options = dict(case.groups[rows[id(param)].source])
            given_options.pop("name", None)
            assert options == given_options


@given(cases(), LEVELS, st.integers(1, 40))
def test_tiles_are_optimal_and_keep_the_order(case: Case, split_by: Any, cap: int) -> None:
    tiles: dict[Any, list[list[int]]] = {}
    rows = row_of(case)
    for group in create_moe_param_groups(case.given, split_by=split_by, max_group_size=cap):
        members = [id(p) for p in group["params"]]
        tiles.setdefault(rows[members[0]].key(split_by), []).append(members)
    for key, found in tiles.items():
        together = [row for row in case.grouped if row.key(split_by) == key]
        assert [member for tile in found for member in tile] == [id(r.param) for r in together]
        sizes = [row.param.numel() for row in together]
        edges = [sum(map(len, found[:i])) for i in range(len(found) + 1)]
        cuts = list(pairwise(edges))
        assert allowed(sizes, cuts, cap)
        if len(sizes) <= 10:  # brute force is exponential
            best = min(score(sizes, t) for t in all_cuts(len(sizes)) if allowed(sizes, t, cap))
            assert score(sizes, cuts) == best


@given(cases(), LEVELS, CAPS)
def test_dense_groups_come_first_then_layers_and_experts_in_order(
    case: Case, split_by: Any, cap: int | None
) -> None:
    rows = row_of(case)
    groups = create_moe_param_groups(case.given, split_by=split_by, max_group_size=cap)
    found = [rows[id(group["params"][0])].place for group in groups]
    places = [row.place for row in case.grouped if row.place]
    parallel_groups = list(dict.fromkeys(place[0] for place in places))
    layers = list(dict.fromkeys(place[:2] for place in places))

    def position(place: Place | None) -> tuple[int, ...]:
        if place is None:
            return (-1,)
        by_layer = layers.index(place[:2]) if split_by != "parallel_group" else 0
        by_expert = (place[2] or 0) if split_by == "expert" else 0
        return parallel_groups.index(place[0]), by_layer, by_expert

    assert list(map(position, found)) == sorted(map(position, found))


@given(cases(), LEVELS, CAPS)
def test_grouping_again_gives_the_same(case: Case, split_by: Any, cap: int | None) -> None:
    def group() -> list[tuple[str, list[int]]]:
        groups = create_moe_param_groups(case.given, split_by=split_by, max_group_size=cap)
        return [(group["name"], list(map(id, group["params"]))) for group in groups]

    assert group() == group()


@given(cases(), LEVELS, CAPS)
@settings(max_examples=300)
def test_names_are_unique_and_usable(case: Case, split_by: Any, cap: int | None) -> None:
    groups = create_moe_param_groups(
        case.given, split_by=split_by, max_group_size=cap, weight_decay=0.1, no_decay=odd_size
    )
    names = [group["name"] for group in groups]
    assert all(isinstance(name, str) and name and not name.split()[1:] for name in names)
    assert len(set(names)) == len(names)  # Lightning's LearningRateMonitor refuses others
    for group in groups:
        if group.get("moe"):
            parallel_group = group["params"][0].group_name
            name = group["name"]
            assert name == parallel_group or name.startswith(f"{parallel_group}_")
            # the size that DeepSpeed reads out of every key when it saves a checkpoint
            process_groups._EXPERT_PARALLEL_GROUP[name] = None
            try:
                assert process_groups._get_max_expert_size_name() == parallel_group
            finally:
                process_groups._EXPERT_PARALLEL_GROUP.clear()


@given(cases(), LEVELS, CAPS)
def test_the_input_is_not_changed(case: Case, split_by: Any, cap: int | None) -> None:
    before = snapshot(case)
    create_moe_param_groups(
        case.given,
        split_by=split_by,
        max_group_size=cap,
        weight_decay=0.1,
        no_decay=odd_size,
        overrides=[("*", {"lr": 0.7})] if case.form in ("module", "named") else (),
    )
    assert snapshot(case) == before


def snapshot(case: Case) -> Any:
    """Everything a caller could see change."""
    params: list[Any] = [
        (id(p), p.requires_grad, p.dtype, p.data_ptr(), p.data.tolist(), p.grad, dict(vars(p)))
        for p in (row.param for row in case.rows)
    ]
    if case.form == "module":  # grouping a module tags it; DeepSpeed's own marks stay
        params = [
            (*rest, {k: marks[k] for k in ("allreduce", "group_name") if k in marks})
            for *rest, marks in params
        ]
        return params, dict(case.model.named_parameters())
    flat = case.given if case.form == "groups" else [{"params": case.given}]
    return params, [
        {k: (id(v), v) if k != "params" else (id(v), list(map(id, v))) for k, v in g.items()}
        for g in flat
    ]


@pytest.mark.parametrize("split_by", ["parallel_group", "module", "expert"])
@pytest.mark.parametrize("name", ["ep_size_2", "ep_size_2_a", "ep_size_2_experts", "ep_size_2.2"])
def test_a_callers_name_that_looks_like_ours_stays_harmless(name: str, split_by: Any) -> None:
    dense, expert = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    set_expert_tag(expert, ExpertTag("ep_size_2", "a", 0))
    groups = create_moe_param_groups({"params": [dense, expert], "name": name}, split_by=split_by)
    _, moe = (group["name"] for group in groups)
    assert len({group["name"] for group in groups}) == 2
    assert moe == "ep_size_2" or moe.startswith("ep_size_2_")


def test_changing_a_group_afterwards_leaves_the_callers_dict_alone() -> None:
    """Optimizers and schedulers write into the groups."""
    param = torch.nn.Parameter(torch.zeros(3))
    given_group = {"params": [param], "lr": 0.1}
    (group,) = create_moe_param_groups(given_group)
    before = copy.copy(given_group)
    group["lr"] = 0.5
    group["params"].clear()
    assert given_group == before
    assert given_group["params"]


def test_every_form_of_input_groups_alike() -> None:
    layer = torch.nn.Linear(4, 2)
    params, named = list(layer.parameters()), list(layer.named_parameters())
    forms: list[Any] = [
        layer,
        params,
        tuple(params),
        layer.parameters(),
        layer.named_parameters(),
        {"params": params},
        {"params": layer.parameters()},
        {"params": named},
        [{"params": params}],
        ({"params": torch.nn.ParameterList(params)},),
        {"params": params, "param_names": [name for name, _ in named]},
        torch.optim.SGD(named, lr=0.1).param_groups,
    ]
    for form in forms:
        (group,) = create_moe_param_groups(form)
        assert list(map(id, group["params"])) == list(map(id, params))
        assert group["name"] == "dense"
        assert "param_names" not in group
    for form in (params[0], {"params": params[0]}):
        (group,) = create_moe_param_groups(form)
        assert group["params"][0] is params[0]


def test_names_in_group_dicts_reach_the_rules() -> None:
    layer = torch.nn.Linear(4, 2)
    names, params = zip(*layer.named_parameters(), strict=True)
    for group in (
        {"params": layer.named_parameters()},
        {"params": params, "param_names": names},
    ):
        weight, bias = create_moe_param_groups(group, overrides=[("bias", {"lr": 0.5})])
        assert "lr" not in weight
        assert bias["lr"] == 0.5
        assert bias["params"][0] is layer.bias
