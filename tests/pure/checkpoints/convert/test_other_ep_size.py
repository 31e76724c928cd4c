"""Experts on the ranks of another ``ep_size``: the groups are those that a run makes there."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from moe_groups import (
    MoE,
    cli,
    create_moe_param_groups,
    is_norm_or_bias,
    regroup_checkpoint,
    tag_experts,
)
from moe_groups.checkpoints.convert.named import named_target
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.checkpoints.layout import Layout
from moe_groups.checkpoints.manifest import Manifest, read_manifest, write_manifest
from moe_groups.errors import CheckpointError, InvalidArgumentError
from tests.support.checkpoints.made_checkpoints import (
    make_checkpoint,
    random_state,
    same,
    shard_contents,
    state_by_expert,
)
from tests.support.checkpoints.made_layouts import columns, layout_of
from tests.support.models import TinyMoE

EP_SIZES = (1, 2, 4)


class Model(nn.Module):
    """Layers of some experts each, between dense ones."""

    def __init__(self, ep_size: int, experts: list[int], residual: bool) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(3),
                MoE(3, nn.Linear(3, 3), count, ep_size=ep_size, use_residual=residual),
            )
            for count in experts
        )
        self.last = nn.Linear(3, 1)


def given_of(model: nn.Module, form: str) -> Any:
    if form == "model":
        return model
    named = list(model.named_parameters())
    if form == "named":
        return named
    halves: dict[bool, list[Any]] = {True: [], False: []}
    for name, param in named:
        halves[name.endswith("bias")].append((name, param))
    return [{"params": own, "name": str(key)} for key, own in halves.items()]


def made(
    model: nn.Module, form: str, split: Any, cap: int | None, world: int, **more: Any
) -> Layout:
    tag_experts(model)
    groups = create_moe_param_groups(
        given_of(model, form),
        split_by=split,
        max_group_size=cap,
        no_decay=is_norm_or_bias,
        weight_decay=0.1,
    )
    names = {
        id(param): (name, getattr(param, "expert_number", None))
        for name, param in model.named_parameters()
    }
    return layout_of(groups, names, world, **more)


splits = st.sampled_from(["parallel_group", "module", "expert"])
caps = st.none() | st.integers(1, 40)


@given(
    st.sampled_from([*itertools.permutations(EP_SIZES, 2), (2, 2)]),
    st.lists(st.sampled_from([4, 8]), min_size=1, max_size=2),
    st.booleans(),
    st.sampled_from(["model", "named", "groups"]),
    splits,
    splits,
    caps,
    st.sampled_from([4, 8]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_layout_of_the_real_groups(
    sizes: tuple[int, int],
    experts: list[int],
    residual: bool,
    form: str,
    saved: str,
    wanted: Any,
    cap: int | None,
    world: int,
    neighbours: bool,
) -> None:
    old, new = (Model(ep_size, experts, residual) for ep_size in sizes)
    source = made(old, form, saved, None, world, neighbours=neighbours)
    found = named_target(source, wanted, cap, sizes[1], neighbours)
    real = made(new, form, wanted, cap, world, neighbours=neighbours)
    assert columns(found) == columns(real)
    assert found.origins == real.origins


def tiny(ep_size: int, split: str = "module", world: int = 4, **options: Any) -> Layout:
    model = TinyMoE(MoE, ep_size=ep_size, **options)
    return made(model, "model", split, None, world)


def saved(place: Path, layout: Layout, kind: str = "zero", **options: Any) -> Path:
    make_checkpoint(place, layout, random_state(layout), kind, **options)
    wrapper = {"zero": "ZeRO-2", "bf16": "BF16_Optimizer"}[kind]
    write_manifest(Manifest(layout, wrapper), place / "global_step7/moe_groups.json")
    return place


def layout_in(place: Path) -> Layout:
    return read_manifest(place / "global_step7/moe_groups.json").layout


@pytest.mark.parametrize("kind", ["zero", "bf16"])
@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 2), (2, 4), (4, 1)])
def test_every_expert_keeps_its_state_bit_for_bit(
    old: int, new: int, kind: str, tmp_path: Path
) -> None:
    """Also back again, from the command line, and what is written is sound."""
    source = saved(tmp_path / "a", tiny(old), kind)
    command = ["regroup-checkpoint", str(source), str(tmp_path / "b"), "--to", "expert"]
    assert cli.main([*command, "--ep-size", str(new)]) == 0
    layout = layout_in(tmp_path / "b")
    assert columns(layout) == columns(tiny(new, "expert"))
    assert not inspect_checkpoint(tmp_path / "b").problems
    state = state_by_expert(source, layout_in(source))
    assert len(state) == len({*state})
    assert same(state_by_expert(tmp_path / "b", layout), state)
    regroup_checkpoint(tmp_path / "b", tmp_path / "c", "module", ep_size=old)
    assert columns(layout_in(tmp_path / "c")) == columns(layout_in(source))
    assert same(state_by_expert(tmp_path / "c", layout_in(source)), state)
    regroup_checkpoint(source, tmp_path / "d", ep_size=new)
    assert columns(layout_in(tmp_path / "d")) == columns(tiny(new))


def test_another_world_too(tmp_path: Path) -> None:
    source, target = saved(tmp_path / "a", tiny(2, world=2)), tiny(4, "expert", world=4)
    regroup_checkpoint(source, tmp_path / "b", target)
    state = state_by_expert(source, layout_in(source))
    assert same(state_by_expert(tmp_path / "b", target), state)


def test_rates_go_with_the_experts(tmp_path: Path) -> None:
    """Of a group's options, and of the scheduler's list; groups of other rates do not mix."""
    layout = tiny(2, "expert", world=2)
    names = [group.name for group in layout.of(next(iter(layout.order)))]
    rates = {name: 0.1 * (1 + place % 3) for place, name in enumerate(names)}
    options = {name: {"lr": rate} for name, rate in rates.items()}
    scheduler = {"base_lrs": [*rates.values()], "last_epoch": 7}
    source = saved(tmp_path / "a", layout, options=options, scheduler=scheduler)
    regroup_checkpoint(source, tmp_path / "b", "expert", ep_size=1)
    model = tmp_path / "b/global_step7/mp_rank_00_model_states.pt"
    content = torch.load(model, weights_only=False)
    found = layout_in(tmp_path / "b").of(next(iter(layout.order)))
    local = [
        group.name.replace("expert.2", "expert.0").replace("expert.3", "expert.1")
        for group in found
    ]
    wanted = [rates[name.replace("ep_size_1", "ep_size_2")] for name in local]
    assert content["lr_scheduler"]["base_lrs"] == wanted
    optimizer = shard_contents(tmp_path / "b").popitem()[1]["optimizer_state_dict"]
    groups = optimizer["base_optimizer_state"]["param_groups"]
    assert [group["lr"] for group in groups] == wanted
    for names, group in zip(content["param_shapes"], found, strict=True):
        sizes = [(name, shape.numel()) for name, shape in names.items()]
        assert sizes == [(param.name, param.numel) for param in group.params]
    with pytest.raises(CheckpointError, match="their old groups cannot become one"):
        regroup_checkpoint(source, tmp_path / "c", "module", ep_size=1)


def frozen(layout: Layout) -> Layout:
    origins = {
        rank: replace(origin, frozen_experts=True) for rank, origin in layout.origins.items()
    }
    return replace(layout, origins=origins)


def unnumbered(layout: Layout) -> Layout:
    groups = [
        replace(group, params=tuple(param._replace(expert=None) for param in group.params))
        for group in layout.groups
    ]
    return replace(layout, groups=tuple(groups))


REFUSED: dict[str, tuple[Any, int, str]] = {
    "experts": (lambda layout: layout, 8, r"the 4 experts of blocks\.0\..* a divisor of"),
    "frozen": (frozen, 1, r"some experts were frozen.*regroup=\"auto\""),
    "unnumbered": (unnumbered, 1, r"nothing says which expert .*blocks\.0.*universal"),
    "origins": (lambda layout: replace(layout, origins={}), 1, "nothing says what the groups"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused(name: str, tmp_path: Path) -> None:
    change, ep_size, text = REFUSED[name]
    source = saved(tmp_path / "a", change(tiny(2, world=8)))
    with pytest.raises(CheckpointError, match=text):
        regroup_checkpoint(source, tmp_path / "b", "expert", ep_size=ep_size)
    assert [*tmp_path.iterdir()] == [source]


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    source = saved(tmp_path / "a", tiny(2))
    with pytest.raises(InvalidArgumentError, match="ep_size_3: their number must be a multiple"):
        regroup_checkpoint(source, tmp_path / "b", "expert", ep_size=3)
    with pytest.raises(InvalidArgumentError, match="nothing says what the new groups are"):
        regroup_checkpoint(source, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"none of module, .*max_group_size=10: give the cap"):
        regroup_checkpoint(source, tmp_path / "b", ep_size=1, max_group_size=10)
    with pytest.raises(CheckpointError, match="ep_size=1 goes with one of stock"):
        regroup_checkpoint(source, tmp_path / "b", source, ep_size=1)
    assert [*tmp_path.iterdir()] == [source]


def test_the_order_with_another_ep_size_must_be_known() -> None:
    """Biases of all experts first, then their weights, in one group."""
    model = TinyMoE(MoE, ep_size=2)
    tag_experts(model)
    params = sorted(model.named_parameters(), key=lambda each: each[0].rpartition(".")[2])
    groups = create_moe_param_groups(params, split_by="module")
    names = {id(p): (name, getattr(p, "expert_number", None)) for name, p in params}
    with pytest.raises(CheckpointError, match="expert by expert"):
        named_target(layout_of(groups, names, 2), "module", ep_size=1)


def test_a_file_for_experts_that_nothing_numbers(tmp_path: Path) -> None:
    """Without a manifest, or with AutoEP's tensors of several experts."""
    source = saved(tmp_path / "a", tiny(2))
    (source / "global_step7/moe_groups.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"has experts of ep_size_1: nothing says which expert"
    ):
        regroup_checkpoint(source, tmp_path / "b", tiny(1))
