"""The layout from a name equals the one made from the model, for random pairs of groupings."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from moe_groups import (
    ExpertTag,
    InvalidArgumentError,
    create_moe_param_groups,
    set_expert_tag,
    tag_experts,
)
from moe_groups.errors import CheckpointError
from moe_groups.flat_layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.tags import is_expert_parameter
from moe_groups.target_layout import TARGETS, named_target
from tests.made_layouts import layout_of
from tests.pure.random_models import Case, cases
from tests.pure.test_invariants import odd_size
from tests.pure.test_tag_experts import Tree, marked

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


def columns(layout: Layout) -> dict[Any, list[FlatGroup]]:
    return {rank: layout.of(rank) for rank in sorted(layout.order)}


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


# ---- random models --------------------------------------------------------------------


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


def cast(layout: Layout) -> Layout:
    groups = [
        replace(group, params=tuple(param._replace(dtype="bfloat16") for param in group.params))
        for group in layout.groups
    ]
    return replace(layout, groups=tuple(groups))


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


# ---- models by hand -------------------------------------------------------------------


def named_layout(model: nn.Module, groups: list[dict[str, Any]], world: int = 2) -> Layout:
    names: dict[int, tuple[str, int | None]] = {
        id(param): (name, getattr(param, "expert_number", None))
        for name, param in model.named_parameters()
    }
    return layout_of(groups, names, world)


def linears(count: int) -> nn.Module:
    return marked(nn.ModuleList(nn.Linear(2, 2) for _ in range(count)))


def block() -> nn.Module:
    return Tree(norm=nn.Linear(1, 1), experts=linears(2))


def split(model: nn.Module, to: Any) -> list[dict[str, Any]]:
    params = list(model.parameters())
    if not all(hasattr(param, "expert_number") for param in filter(is_expert_parameter, params)):
        tag_experts(model)
    if to == "stock":
        groups: list[dict[str, Any]] = stock_split({"params": params, "name": "dense"})
        return groups
    return create_moe_param_groups(params, split_by=to)


@pytest.mark.parametrize("wanted", TARGETS)
@pytest.mark.parametrize("saved", TARGETS)
def test_layers_without_numbers(saved: Any, wanted: Any) -> None:
    """The dense groups tell that the second in the alphabet comes first."""
    model = Tree(second=Tree(moe=block()), first=Tree(moe=block()))
    source, expected = (named_layout(model, split(model, to)) for to in (saved, wanted))
    assert columns(named_target(source, wanted)) == columns(expected)


def test_layers_whose_order_only_the_groups_have() -> None:
    model = Tree(second=linears(2), first=linears(2), head=nn.Linear(1, 1))
    source = named_layout(model, split(model, "module"))
    expected = named_layout(model, split(model, "parallel_group"))
    assert columns(named_target(source, "parallel_group")) == columns(expected)
    other_order = split(model, "module")[::-1]
    with pytest.raises(CheckpointError, match="do not tell what they were made from"):
        named_target(named_layout(model, other_order), "parallel_group")


def test_callers_groups_with_layers_in_an_order_of_their_own() -> None:
    """The first of them has the layer that comes second in the model, and in the saved groups."""
    model = Tree(second=Tree(experts=linears(2)), first=Tree(experts=linears(2)))
    model.head = nn.Linear(1, 1)
    tag_experts(model)
    early, late, head = (list(layer.parameters()) for layer in model.children())
    callers = [
        {"params": [*head, late[0]], "name": "a", "lr": 0.1},
        {"params": [*early, *late[1:]], "name": "b", "lr": 0.2},
    ]
    source = named_layout(model, create_moe_param_groups(callers))
    layers = [group.labels.get("expert_group_name") for group in source.of(Rank(0, 0))]
    assert layers == [None, "first", "first", "second"]
    with pytest.raises(CheckpointError, match=r"first\..* and second\..* nothing tells"):
        named_target(source, "parallel_group")
    finer = create_moe_param_groups(callers, split_by="expert")
    assert columns(named_target(source, "expert")) == columns(named_layout(model, finer))


@pytest.mark.parametrize("wanted", TARGETS)
def test_parameters_in_another_order_than_the_models(wanted: Any) -> None:
    """``round_robin_gradients`` gives such layouts, and then the new groups have one too."""
    model = Tree(blocks=nn.ModuleList([block(), block()]))
    groups = split(model, "module")
    groups[0]["params"] = [*groups[0]["params"][::2], *groups[0]["params"][1::2]]
    with pytest.raises(CheckpointError, match=r"in no model's order \(round_robin_gradients\?\)"):
        named_target(named_layout(model, groups), wanted)


def by_matrix() -> nn.Module:
    """Experts that are not modules: a list of matrices for each of two layers."""
    matrices = [linears(2), linears(2)]
    for number, matrix in [*enumerate(matrices[0].children()), *enumerate(matrices[1].children())]:
        for param in matrix.parameters():
            set_expert_tag(param, ExpertTag("ep_size_2", "mine", number, 2))
    return Tree(moe=Tree(w1=matrices[0], w2=matrices[1], gate=nn.Linear(2, 2)))


def test_experts_whose_parameters_do_not_stand_together() -> None:
    model = by_matrix()
    module, expert = (named_layout(model, split(model, to)) for to in ("module", "expert"))
    with pytest.raises(CheckpointError, match=r"moe\.w2\.0\.bias and moe\.w1\.1\.weight would be"):
        named_target(expert, "module")
    assert columns(named_target(expert, "expert")) == columns(expert)
    with pytest.raises(CheckpointError, match=r"which expert moe\.w1\.0\.weight is"):
        named_target(module, "expert")


@pytest.mark.parametrize("wanted", ["module", "expert"])
def test_names_that_tell_nothing(wanted: Any) -> None:
    model = Tree(gate=nn.Linear(2, 2), bank=linears(2))
    source = named_layout(model, split(model, "stock"))
    with pytest.raises(CheckpointError, match=r"which layer bank\.0\.weight is.*Give a file"):
        named_target(source, wanted)


def test_groups_that_nobody_makes() -> None:
    model = Tree(a=block(), b=block())
    dense, experts = split(model, "stock")
    for groups in (
        [dense, {**experts, "name": "ep_size_2_mine"}],
        [{**dense, "name": "dense.tile.1"}, experts],
        [dense, *({**experts, "params": experts["params"][i::2]} for i in (1, 0))],
    ):
        with pytest.raises(CheckpointError, match="Give a file that says"):
            named_target(named_layout(model, groups), "module")


def test_numbers_of_experts_over_all_ranks() -> None:
    """Kept where the checkpoint tells them (above), else found: DeepSpeed's files do not."""
    model = Tree(moe=block())
    source = named_layout(model, split(model, "stock"), world=4)
    told = [
        replace(group, params=tuple(p._replace(expert=None) for p in group.params))
        for group in source.groups
    ]
    for to in TARGETS:
        found = named_target(replace(source, groups=tuple(told)), to)
        numbers = {
            (group.ep_rank, param.name.split(".")[2]): param.expert
            for group in found.groups
            for param in group.params
            if group.parallel_group
        }
        assert numbers == {(0, "0"): 0, (0, "1"): 1, (1, "0"): 2, (1, "1"): 3}


def test_deepspeeds_default_cap() -> None:
    params = [FlatParam(name, 10**8, 0) for name in ("a", "b")]
    experts = [param._replace(name=f"experts.0.{param.name}") for param in params]
    groups = [
        FlatGroup("dense", (0,), lay_out(params)),
        FlatGroup("ep_size_1", (0,), lay_out(experts), 0, "ep_size_1", 0),
    ]
    source = merge_ranks([(Rank(0, 0), groups)])
    names = {
        cap: [
            [p.name for p in g.params]
            for g in named_target(source, "stock", max_group_size=cap).groups
        ]
        for cap in (None, math.inf, 10**7)
    }
    whole = [["a", "b"], ["experts.0.a", "experts.0.b"]]
    assert names[math.inf] == whole
    assert names[None] == names[10**7] == [whole[0], ["experts.0.a"], ["experts.0.b"]]
    assert len(named_target(source, "parallel_group").groups) == 2


def test_pipeline_stages_are_split_one_by_one() -> None:
    stages = [Tree(a=block()), Tree(b=nn.Linear(3, 3), c=block())]
    layouts = {
        to: merge_ranks(
            [
                (Rank(model, rank.data), [replace(g, model_rank=model) for g in groups])
                for model, stage in enumerate(stages)
                for rank, groups in columns(named_layout(stage, split(stage, to))).items()
            ]
        )
        for to in TARGETS
    }
    for saved in TARGETS:
        for wanted in TARGETS:
            assert columns(named_target(layouts[saved], wanted)) == columns(layouts[wanted])
    found = named_target(layouts["module"], "expert", data_parallel_size=4)
    assert sorted(found.order) == [Rank(m, d) for m in range(2) for d in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "layer"}, r"to='layer' is unknown"),
        ({"max_group_size": 0}, r"max_group_size=0 must be"),
        ({"alignment": 0}, r"alignment=0 must be"),
        ({"data_parallel_size": 0}, r"data_parallel_size=0 must be"),
        ({"data_parallel_size": 3}, r"data_parallel_size must be a multiple of 2"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    model = Tree(moe=block())
    source = named_layout(model, split(model, "stock"))
    with pytest.raises(InvalidArgumentError, match=message):
        named_target(source, **{"to": "module"} | options)


def test_experts_that_no_rank_has() -> None:
    model = Tree(moe=block())
    source = named_layout(model, split(model, "stock"))
    half = replace(source, order={Rank(0, 0): source.order[Rank(0, 0)]})
    with pytest.raises(CheckpointError, match="needs the experts of ep_size_2 rank 1"):
        named_target(half, "module", data_parallel_size=4)


def test_dtypes_of_which_only_a_part_is_known() -> None:
    """One layer has two, and its groups' names say so; those of the other say nothing."""
    model = Tree(layers=nn.ModuleList([block(), block()]))
    first = [*linears_of(model.layers, 0)]
    first[0].data = first[0].data.bfloat16()
    source = cast(named_layout(model, split(model, "module")))
    assert any(group.name.endswith(".float32") for group in source.groups)
    with pytest.raises(CheckpointError, match="parameters of several dtypes would come together"):
        named_target(source, "parallel_group")
    assert len(named_target(source, "module").groups) == len(source.groups)


def linears_of(layers: Any, index: int) -> list[nn.Parameter]:
    return list(layers[index].experts.parameters())


def test_experts_that_were_numbered_backwards_by_hand() -> None:
    model = Tree(moe=block())
    for number, expert in enumerate(reversed(list(linears_of_block(model)))):
        for param in expert.parameters():
            set_expert_tag(param, ExpertTag("ep_size_2", "mine", number, 2))
    expert, module = (named_layout(model, split(model, to)) for to in ("expert", "module"))
    assert columns(named_target(expert, "expert")) == columns(expert)
    with pytest.raises(CheckpointError, match="nothing tells in which order"):
        named_target(expert, "module")
    assert module.fingerprint() != expert.fingerprint()


def linears_of_block(model: Any) -> Iterator[nn.Module]:
    yield from model.moe.experts
