"""The groups of a name are those that a run makes of the same model."""

import math
import weakref
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from hypothesis import assume, given, settings, strategies as st
from torch import nn

from moe_groups import ExpertTag, create_moe_param_groups, set_expert_tag, split_for_muon
from moe_groups.checkpoints.convert.named import TARGETS, named_target
from moe_groups.checkpoints.layout import Layout, Rank, merge_ranks
from moe_groups.checkpoints.manifest import Manifest, read_manifest, write_manifest
from moe_groups.errors import CheckpointError, InvalidArgumentError
from moe_groups.groups.families import read_table
from moe_groups.groups.grouping import split_like_deepspeed
from moe_groups.groups.inputs import read_input
from moe_groups.groups.rules import Rules
from tests.pure.experts.test_tag_experts import Tree, marked
from tests.pure.groups.test_invariants import odd_size
from tests.support.checkpoints.made_layouts import cast, columns, layout_of
from tests.support.random_models import Case, cases

RULES: dict[str, Any] = {
    "no_decay": st.just(odd_size),
    "weight_decay": st.just(0.1),
    "overrides": st.just([("*w0", {"lr": 0.3})]),
}


class Grouping(NamedTuple):
    """How a model is split: the name, and the cap."""

    to: Any
    cap: int | None


groupings = st.builds(Grouping, st.sampled_from(TARGETS), st.none() | st.integers(1, 40))
ours = st.builds(Grouping, st.sampled_from(TARGETS[1:]), st.none() | st.integers(1, 40))


def groups_of(case: Case, how: Grouping, **rules: Any) -> list[dict[str, Any]]:
    if how.to != "stock":
        split_by, cap = how
        return create_moe_param_groups(case.given, split_by=split_by, max_group_size=cap, **rules)
    sources = {row.source for row in case.rows}
    callers = [
        {"params": [row.param for row in case.rows if row.source == source], "name": str(source)}
        for source in sorted(sources)
    ]
    split: list[dict[str, Any]] = stock_split(callers, how.cap or math.inf)
    return split


def layout(case: Case, how: Grouping, world: int, **rules: Any) -> Layout:
    names = {id(row.param): (row.name, row.place and row.place[2]) for row in case.rows}
    return layout_of(groups_of(case, how, **rules), names, world)


def parallel_groups(case: Case) -> set[str]:
    return {row.place[0] for row in case.grouped if row.place}


def world_of(case: Case) -> int:
    return math.lcm(*(int(name.split("_")[2]) for name in parallel_groups(case)))


def places(layout: Layout) -> dict[Any, Any]:
    """All but what groups are called, and their options."""
    return {
        rank: [replace(group, name="", labels={}, options={}) for group in groups]
        for rank, groups in columns(layout).items()
    }


@given(cases(), ours, ours, st.fixed_dictionaries({}, optional=RULES))
@settings(max_examples=150, deadline=None)
def test_equals_the_layout_of_the_real_groups(
    tmp_path_factory: pytest.TempPathFactory,
    case: Case,
    saved: Grouping,
    wanted: Grouping,
    rules: dict[str, Any],
) -> None:
    """Also from the file, after the engine has cast all parameters, and converted twice."""
    if case.form not in ("module", "named"):
        rules.pop("overrides", None)  # there may be no names
    world = world_of(case)
    path = tmp_path_factory.getbasetemp() / "manifest.json"
    write_manifest(Manifest(cast(layout(case, saved, world, **rules)), "ZeRO-1"), path)
    source = read_manifest(path).layout
    found = named_target(source, wanted.to, wanted.cap)
    assert columns(found) == columns(cast(layout(case, wanted, world, **rules)))
    assert columns(named_target(found, saved.to, saved.cap)) == columns(source)


@given(cases(), ours, st.none() | st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_stock_equals_what_deepspeed_makes(case: Case, saved: Grouping, cap: int | None) -> None:
    world = world_of(case)
    source = layout(case, saved, world)
    frozen = any(r.place and r.param.numel() and not r.param.requires_grad for r in case.rows)
    if frozen or len(parallel_groups(case)) > 1:
        with pytest.raises(CheckpointError, match=r"frozen experts|every run"):
            named_target(source, "stock", cap or math.inf)
        return
    found = named_target(source, "stock", cap or math.inf)
    assert places(found) == places(layout(case, Grouping("stock", cap), world))


@given(cases(), st.integers(1, 40))
@settings(deadline=None)
def test_the_split_of_deepspeed(case: Case, cap: int) -> None:
    """Its own function makes the same groups, but for empty ones, in another order of sizes."""
    for row in case.rows:
        row.param.requires_grad_()
    given = read_input(case.given)
    table = read_table(given, Rules(), "parallel_group")
    made = [
        (group, variant.source, [id(given.params[row]) for row in rows])
        for group, variant, rows in split_like_deepspeed(table, cap)
    ]
    source_of = {id(row.param): row.source for row in case.rows}
    real = []
    for group in groups_of(case, Grouping("stock", cap)):
        params = [id(param) for param in group["params"] if param.numel()]
        if params:
            name = str(group["name"]) if group.get("moe") else None
            real.append((name, source_of[params[0]], params))
    several = len(parallel_groups(case)) > 1
    assert (sorted(made, key=str) == sorted(real, key=str)) if several else (made == real)


@given(cases(forms=("module",), dtypes=(torch.bfloat16,)), ours, st.sampled_from((16, 32)))
@settings(max_examples=7, derandomize=True, deadline=None)
def test_from_a_plan_for_a_memory_budget(case: Case, wanted: Grouping, world: int) -> None:
    options = {"step_memory_budget": "auto", "data_parallel_size": world}
    source = layout(case, Grouping("module", None), world, **options)
    found = named_target(source, wanted.to, wanted.cap)
    assert columns(found) == columns(layout(case, wanted, world))


# ---- models by hand -----------------------------------------------------------------------


def linears(count: int) -> nn.Module:
    return marked(nn.ModuleList(nn.Linear(2, 2) for _ in range(count)))


def block() -> nn.Module:
    return Tree(norm=nn.Linear(1, 1), experts=linears(2))


def named_layout(model: nn.Module, groups: list[dict[str, Any]], world: int = 2) -> Layout:
    names: dict[int, tuple[str, int | None]] = {
        id(param): (name, getattr(param, "expert_number", None))
        for name, param in model.named_parameters()
    }
    return layout_of(groups, names, world)


def test_the_halves_of_muon() -> None:
    model = Tree(blocks=nn.ModuleList([block(), block()]))
    halves = split_for_muon(model, muon={"lr": 0.02}, adam={"lr": 3e-4})
    module, expert = (
        named_layout(model, create_moe_param_groups(halves, split_by=split))
        for split in ("module", "expert")
    )
    assert columns(named_target(module, "expert")) == columns(expert)
    stock = named_target(module, "stock").of(Rank(0, 0))
    assert [group.name for group in stock] == ["muon", "adam", "ep_size_2", "ep_size_2"]


def test_stages_of_a_pipeline_are_grouped_one_by_one() -> None:
    stages = [Tree(a=block()), Tree(b=nn.Linear(3, 3), c=block())]

    def all_stages(split: Any) -> Layout:
        parts = [
            named_layout(stage, create_moe_param_groups(stage, split_by=split)) for stage in stages
        ]
        found = [
            (Rank(model, rank.data), [replace(g, model_rank=model) for g in groups])
            for model, part in enumerate(parts)
            for rank, groups in columns(part).items()
        ]
        origins = {
            Rank(model, rank.data): origin
            for model, part in enumerate(parts)
            for rank, origin in part.origins.items()
        }
        return merge_ranks(found, origins)

    for wanted in ("parallel_group", "module", "expert"):
        found = named_target(all_stages("module"), wanted)
        assert columns(found) == columns(all_stages(wanted))


def test_deepspeeds_default_cap() -> None:
    model = Tree(
        experts=marked(
            nn.ModuleList(nn.Linear(10**8, 1, bias=False, device="meta") for _ in range(3))
        ),
        dense=nn.Linear(10**8, 2, bias=False, device="meta"),
    )
    source = named_layout(model, create_moe_param_groups(model, split_by="expert"))
    counts = {
        cap: [len(group.params) for group in named_target(source, "stock", cap).of(Rank(0, 0))]
        for cap in (None, math.inf, 2 * 10**8)
    }
    assert counts == {None: [1, 1, 1, 1], math.inf: [1, 3], 2 * 10**8: [1, 2, 1]}


def test_what_the_manifest_does_not_say_is_refused() -> None:
    model = Tree(moe=block())
    groups = create_moe_param_groups(model)
    changed = [{**group, "name": f"my.{group['name']}"} for group in groups]
    source = named_layout(model, changed)
    assert not source.origins
    with pytest.raises(CheckpointError, match=r"nothing says .* made from.*Give a file"):
        named_target(source, "expert")


def test_parameters_without_layers_are_refused() -> None:
    model = Tree(moe=Tree(gate=nn.Linear(2, 2), experts=linears(2)))
    params = list(model.parameters())
    for param in params:
        if not getattr(param, "allreduce", True):
            set_expert_tag(param, ExpertTag("ep_size_2"))
    source = named_layout(model, create_moe_param_groups(params, split_by="parallel_group"))
    assert columns(named_target(source, "parallel_group")) == columns(source)
    with pytest.raises(CheckpointError, match=r"moe\.experts\.0\.weight had no tag.*Give a file"):
        named_target(source, "module")


@pytest.mark.parametrize("wanted", TARGETS)
def test_other_orders_and_gaps_are_refused(wanted: Any) -> None:
    """``round_robin_gradients`` and ``parameter_alignment`` give such layouts."""
    model = Tree(blocks=nn.ModuleList([block(), block()]))
    source = named_layout(model, create_moe_param_groups(model))
    dense = source.groups[0]
    gaps = tuple(p._replace(offset=10 * n) for n, p in enumerate(dense.params))
    turned = (*dense.params[1:], dense.params[0])
    for params in (gaps, turned):
        groups = (replace(dense, params=params), *source.groups[1:])
        with pytest.raises(CheckpointError, match="round_robin_gradients, parameter_alignment"):
            named_target(replace(source, groups=groups), wanted)


def test_arguments_out_of_range() -> None:
    model = Tree(moe=block())
    source = named_layout(model, create_moe_param_groups(model))
    with pytest.raises(InvalidArgumentError, match="to='layer' is unknown"):
        named_target(source, "layer")  # type: ignore[arg-type]


def test_nothing_keeps_a_model_alive() -> None:
    model = Tree(moe=block())
    groups = create_moe_param_groups(model)
    known = weakref.ref(model), [weakref.ref(param) for param in model.parameters()]
    del model, groups
    assert known[0]() is None
    assert [param() for param in known[1]] == [None] * len(known[1])


def test_not_all_calls_are_remembered() -> None:
    from moe_groups.groups import origin

    models = [nn.Linear(2, 2) for _ in range(origin._MOST + 5)]
    for model in models:
        create_moe_param_groups(model)
    assert len(origin._made) == origin._MOST


@given(cases(forms=("module",)))
@settings(max_examples=5)
def test_parameters_that_are_frozen_after_grouping_leave_the_origin_unknown(case: Case) -> None:
    groups = create_moe_param_groups(case.given)
    assume(len(groups[0]["params"]) > 1)
    groups[0]["params"] = groups[0]["params"][1:]  # as the engine has them then
    names = {id(row.param): (row.name, row.place and row.place[2]) for row in case.rows}
    assert not layout_of(groups, names, world_of(case)).origins


def test_a_later_call_with_other_groups_changes_nothing() -> None:
    """The origin is that of the groups that are stepped; of two orders it is never the other."""
    model = Tree(a=block(), b=block())
    groups = create_moe_param_groups(model, no_decay=odd_size)
    wanted = named_layout(model, groups).origins
    create_moe_param_groups(model, split_by="expert", no_decay=odd_size)
    create_moe_param_groups(model)
    assert named_layout(model, groups).origins == wanted
    first, second, *others = model.parameters()
    groups = create_moe_param_groups([first, second, *others], split_by="parallel_group")
    assert named_layout(model, groups).origins
    create_moe_param_groups([first, *others, second], split_by="parallel_group")
    assert not named_layout(model, groups).origins
