"""The layout from a name equals the one made from the model, for random pairs of groupings."""

import math
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from hypothesis import assume, given, settings, strategies as st

from moe_groups import (
    create_moe_param_groups,
)
from moe_groups.checkpoints.inference.target_layout import TARGETS, named_target
from moe_groups.checkpoints.layout import FlatGroup, Layout
from moe_groups.errors import CheckpointError
from tests.pure.groups.test_invariants import odd_size
from tests.support.checkpoints.made_layouts import cast, columns, layout_of
from tests.support.random_models import Case, cases

ONE_DTYPE = (torch.bfloat16,)


class Grouping(NamedTuple):
    """How a model is split: the name, and the cap."""

    to: Any
    cap: int | None

    @property
    def level(self) -> int:
        """Higher is finer; the order in a coarser group tells that in all finer ones."""
        return max(0, TARGETS.index(self.to) - 1)


groupings = st.builds(Grouping, st.sampled_from(TARGETS), st.none() | st.integers(1, 40))
ours = st.builds(Grouping, st.sampled_from(TARGETS[1:]), st.none() | st.integers(1, 40))


def stacked(case: Case) -> Case:
    """Fused experts have three dimensions, by which they are told from a list of experts."""
    for row in case.grouped:
        if row.place and row.place[2] is None and row.param.dim() == 1:
            row.param.data = row.param.data.new_zeros(2, 3, 1)
    return case


def models(**options: Any) -> st.SearchStrategy[Case]:
    return cases(**options).map(stacked)


def groups_of(case: Case, how: Grouping, **options: Any) -> list[dict[str, Any]]:
    if how.to != "stock":
        split_by, cap = how
        return create_moe_param_groups(case.given, split_by=split_by, max_group_size=cap, **options)
    given = case.given if case.form == "groups" else [{"params": case.given, "name": "dense"}]
    callers = []
    for group, caller in enumerate(given):  # DeepSpeed's split takes tensors, and caps frozen ones
        rows = [row for row in case.grouped if row.source == group]
        callers.append({**caller, "params": [row.param for row in rows]})
    split: list[dict[str, Any]] = stock_split(callers, how.cap or math.inf)
    return split


def layout(case: Case, how: Grouping, world: int, **options: Any) -> Layout:
    groups = groups_of(case, how, **{k: options.pop(k) for k in (*options,) if k in RULES})
    names = {id(row.param): (row.name, row.place and row.place[2]) for row in case.rows}
    return layout_of(groups, names, world, **options)


RULES = ("weight_decay", "no_decay", "overrides", "step_memory_budget", "data_parallel_size")


def parallel_groups(case: Case) -> set[str]:
    return {row.place[0] for row in case.grouped if row.place}


def world_of(case: Case) -> int:
    return math.lcm(*(int(name.split("_")[2]) for name in parallel_groups(case)))


def by_path(layout: Layout, source: Layout) -> Layout:
    """Labels given by hand are lost where the source's groups have none; names follow them."""
    if any(group.labels.get("expert_group_name") for group in source.groups):
        return layout

    def plain(group: FlatGroup) -> FlatGroup:
        labels = {
            key: value.replace("my.layers", "layers") if isinstance(value, str) else value
            for key, value in group.labels.items()
        }
        return replace(group, name=group.name.replace("my.layers", "layers"), labels=labels)

    return replace(layout, groups=tuple(map(plain, layout.groups)))


def places(layout: Layout) -> dict[Any, Any]:
    """All but what groups are called."""
    return {
        rank: [replace(group, name="", labels={}) for group in groups]
        for rank, groups in columns(layout).items()
    }


def use_sane_options(case: Case) -> bool:
    """Callers' groups with names and learning rates of their own; has each dense parameters?"""
    if case.form != "groups":
        return True
    for index, (group, options) in enumerate(zip(case.given, case.groups, strict=True)):
        options.clear()
        options.update(name="abcd"[index], lr=0.1 * (index + 1))
        members = group["params"]
        group.clear()
        group.update(options, params=members)
    dense = {row.source for row in case.grouped if row.place is None}
    return dense == {*range(len(case.given))}


@given(models(dtypes=ONE_DTYPE), groupings, groupings, st.integers(1, 2), st.sampled_from((1, 8)))
@settings(max_examples=400)
def test_equals_the_layout_of_the_real_groups(
    case: Case, saved: Grouping, wanted: Grouping, factor: int, alignment: int
) -> None:
    named = use_sane_options(case)
    world = factor * world_of(case)
    source = layout(case, saved, world, alignment=alignment)
    if wanted.to == "stock" and len(parallel_groups(case)) > 1:
        with pytest.raises(CheckpointError, match="every run" if named else None):
            named_target(source, "stock", max_group_size=wanted.cap)
        return
    expected = by_path(layout(case, wanted, world, alignment=alignment), source)
    cap = wanted.cap or math.inf
    try:
        found = named_target(source, wanted.to, max_group_size=cap, alignment=alignment)
    except CheckpointError:
        assert not named  # of groups without dense parameters the order may be lost
        return
    if named or "stock" not in (saved.to, wanted.to):
        assert columns(found) == columns(expected)
    else:  # DeepSpeed's split keeps no name of a caller's group without dense parameters
        assert places(found) == places(expected)
    assert found.fingerprint() == expected.fingerprint()


@given(models(dtypes=ONE_DTYPE), groupings, groupings)
def test_every_parameter_is_there_once_and_caps_hold(
    case: Case, saved: Grouping, wanted: Grouping
) -> None:
    use_sane_options(case)
    source = layout(case, saved, world_of(case))
    try:
        found = named_target(source, wanted.to, max_group_size=wanted.cap)
    except CheckpointError:
        return
    for rank, groups in columns(found).items():
        names = [param.name for group in groups for param in group.params]
        assert sorted(names) == sorted(row.name for row in case.grouped)
        assert len({group.name for group in groups}) == len(groups) or wanted.to == "stock"
        saved_at = source.home(rank)
        for group in groups:
            if wanted.cap and (group.parallel_group or wanted.to != "stock"):
                assert len(group.params) == 1 or group.numel <= wanted.cap
            for param in group.params:
                home, before = saved_at[param.name]
                assert (home.ranks, home.parallel_group) == (group.ranks, group.parallel_group)
                assert before._replace(offset=param.offset) == param


@given(models(forms=("module", "named"), dtypes=ONE_DTYPE), ours, ours, st.data())
@settings(max_examples=200)
def test_decay_rules_and_overrides(
    case: Case, saved: Grouping, wanted: Grouping, data: st.DataObject
) -> None:
    options = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "no_decay": st.just(odd_size),
                "weight_decay": st.just(0.1),
                "overrides": st.sampled_from(([("*", {"lr": 0.3})], [("w*", {"lr": 0.3})])),
            },
        )
    )
    assume(options.get("overrides") != [("w*", {"lr": 0.3})] or "w" in case.grouped[0].name[:1])
    world = world_of(case)
    source = layout(case, saved, world, **options)
    expected = by_path(layout(case, wanted, world, **options), source)
    found = named_target(source, wanted.to, max_group_size=wanted.cap)
    assert columns(found) == columns(expected)


@given(models(forms=("module", "named")), groupings, ours)
@settings(max_examples=300)
def test_several_dtypes(case: Case, saved: Grouping, wanted: Grouping) -> None:
    world = world_of(case)
    source = layout(case, saved, world)
    try:
        found = named_target(source, wanted.to, max_group_size=wanted.cap)
    except CheckpointError:
        assert saved.to == "stock" or wanted.level < saved.level
        assert len({row.param.dtype for row in case.grouped}) > 1
        return
    assert columns(found) == columns(by_path(layout(case, wanted, world), source))


@given(models(forms=("module", "named")), ours, ours)
@settings(max_examples=200)
def test_dtypes_from_before_the_engine_cast(case: Case, saved: Grouping, wanted: Grouping) -> None:
    """Groups are made before ``deepspeed.initialize`` gives all parameters one dtype."""
    assume(wanted.level >= saved.level)
    source, expected = (layout(case, how, world_of(case)) for how in (saved, wanted))
    found = named_target(cast(source), wanted.to, max_group_size=wanted.cap)
    assert columns(found) == columns(by_path(cast(expected), source))


@given(models(forms=("groups",)), groupings, groupings)
@settings(max_examples=300)
def test_any_names_and_options_of_the_callers_groups(
    case: Case, saved: Grouping, wanted: Grouping
) -> None:
    """What is not known is refused; nothing is put in another place."""
    for group, index in zip(case.given, count(), strict=False):
        if "stock" in (saved.to, wanted.to):  # of groups with one name it loses all but one
            group["name"] = f"{group.get('name', '')}{index}"
        if saved.to == "stock":  # nothing else tells experts of two groups from two tiles of one
            group["lr"] = float(index)
    assume(wanted.to != "stock" or len(parallel_groups(case)) < 2)
    world = world_of(case)
    source = layout(case, saved, world)
    try:
        found = named_target(source, wanted.to, max_group_size=wanted.cap or math.inf)
    except CheckpointError:
        return
    assert places(found) == places(layout(case, wanted, world))


@given(models(forms=("module", "named"), dtypes=ONE_DTYPE), ours, ours, st.randoms())
@settings(max_examples=200)
def test_groups_in_another_order(
    case: Case, saved: Grouping, wanted: Grouping, random: Any
) -> None:
    """As those of a plan for a memory budget: names of groups and parameters tell the model's."""
    world = world_of(case)
    names = {id(row.param): (row.name, row.place and row.place[2]) for row in case.rows}
    groups = groups_of(case, saved)
    random.shuffle(groups)
    source = layout_of(groups, names, world)
    found = named_target(source, wanted.to, max_group_size=wanted.cap)
    assert columns(found) == columns(by_path(layout(case, wanted, world), source))


@given(models(forms=("module",), dtypes=ONE_DTYPE), ours, st.sampled_from((16, 32)))
@settings(max_examples=15, derandomize=True)
def test_from_a_plan_for_a_memory_budget(case: Case, wanted: Grouping, world: int) -> None:
    options = {"step_memory_budget": "auto", "data_parallel_size": world}
    source = layout(case, Grouping("module", None), world, **options)
    found = named_target(source, wanted.to, max_group_size=wanted.cap)
    assert columns(found) == columns(layout(case, wanted, world))


@given(models(dtypes=ONE_DTYPE), groupings, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_another_number_of_ranks(
    case: Case, how: Grouping, before: int, after: int, neighbours: bool
) -> None:
    assume(use_sane_options(case) and (how.to != "stock" or len(parallel_groups(case)) < 2))
    least = world_of(case)
    # with one rank for each expert nothing shows whether ranks are neighbours
    before += neighbours and least > 1
    source = layout(case, how, before * least, neighbours=neighbours)
    expected = layout(case, how, after * least, neighbours=neighbours)
    found = named_target(
        source,
        how.to,
        max_group_size=how.cap or math.inf,
        data_parallel_size=after * least,
    )
    assert places(found) == places(expected)
