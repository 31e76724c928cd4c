"""The layout from a name, for models by hand: what tells orders and places, and what does not."""

import math
from dataclasses import replace
from typing import Any

import pytest
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from torch import nn

from moe_groups import ExpertTag, create_moe_param_groups, set_expert_tag, tag_experts
from moe_groups.checkpoints.inference.target_layout import TARGETS, named_target
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.errors import CheckpointError, InvalidArgumentError
from moe_groups.tags import is_expert_parameter
from tests.pure.experts.test_tag_experts import Tree, marked
from tests.support.checkpoints.made_layouts import cast, columns, layout_of


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


def test_several_expert_parallel_sizes() -> None:
    """Our groups have them in the model's order, DeepSpeed's in any."""
    model = Tree(second=Tree(experts=linears(2)), first=Tree(experts=linears(2)))
    for param in model.get_submodule("first").parameters():
        param.group_name = "ep_size_1"  # type: ignore[attr-defined]
    model.add_module("head", nn.Linear(1, 1))
    source, expected = (
        named_layout(model, split(model, to)) for to in ("parallel_group", "expert")
    )
    assert [group.name for group in source.of(Rank(0, 0))] == ["dense", "ep_size_2", "ep_size_1"]
    assert columns(named_target(source, "expert")) == columns(expected)
    stock = named_layout(model, split(model, "stock"))
    with pytest.raises(CheckpointError, match="nothing tells the order of their layers"):
        named_target(stock, "expert")
    with pytest.raises(CheckpointError, match="another way in every run"):
        named_target(source, "stock")


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
        ({"data_parallel_size": 3}, r"their number must be a multiple of 2"),
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
    first = model.get_parameter("layers.0.experts.0.weight")
    first.data = first.data.bfloat16()
    source = cast(named_layout(model, split(model, "module")))
    assert any(group.name.endswith(".float32") for group in source.groups)
    with pytest.raises(CheckpointError, match="parameters of several dtypes would come together"):
        named_target(source, "parallel_group")
    assert len(named_target(source, "module").groups) == len(source.groups)


def test_experts_that_were_numbered_backwards_by_hand() -> None:
    experts = linears(2)
    for number, expert in enumerate(reversed(list(experts.children()))):
        for param in expert.parameters():
            set_expert_tag(param, ExpertTag("ep_size_2", "mine", number, 2))
    model = Tree(moe=Tree(norm=nn.Linear(1, 1), experts=experts))
    source = named_layout(model, split(model, "expert"))
    assert columns(named_target(source, "expert")) == columns(source)
    with pytest.raises(CheckpointError, match="nothing tells in which order"):
        named_target(source, "module")
