"""Orders and places from names, compared with the module trees that have these names."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from hypothesis import given, strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moe_groups import MoE
from moe_groups.checkpoints.expert_names import ExpertPlaces
from moe_groups.checkpoints.inference.model_order import ModelOrder, apart
from moe_groups.checkpoints.inference.sequences import merge
from moe_groups.checkpoints.layout import FlatParam
from moe_groups.experts.find import find_experts
from tests.pure.experts.test_tag_experts import Fused, Tree, marked
from tests.pure.experts.test_wrappers import with_peft
from tests.support.models import TinyMoE

# ---- the order of parameters -------------------------------------------------------------


@st.composite
def modules(draw: st.DrawFn, depth: int = 3) -> nn.Module:
    """Lists and named children in any order of their names."""
    listed = draw(st.booleans())
    children = [draw(modules(depth - 1)) for _ in range(draw(st.integers(0, 3)) if depth else 0)]
    module: nn.Module = nn.ModuleList(children) if listed else nn.Module()
    slots = draw(st.permutations(("a", "b", "c", "10", "9")))
    if not listed:
        numbers = sorted((slot for slot in slots if slot.isdecimal()), key=int)
        slots = [numbers.pop(0) if slot.isdecimal() else slot for slot in slots]
        for slot, child in zip(slots, children, strict=False):
            module.add_module(slot, child)
    for name in draw(st.lists(st.sampled_from(("p", "q", "0x")), unique=True)):
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
    return module


@given(modules(), st.data())
def test_what_is_known_of_an_order_is_right(model: nn.Module, data: st.DataObject) -> None:
    names = [name for name, _ in model.named_parameters()]
    if not names:
        return
    kept = st.lists(st.booleans(), min_size=len(names), max_size=len(names))
    seen = [list(itertools.compress(names, mask)) for mask in data.draw(st.lists(kept, max_size=3))]
    order = ModelOrder(seen)
    assert order.consistent
    for one, other in itertools.permutations(range(len(names)), 2):
        assert order.before(names[one], names[other]) in (None, one < other)
    for sequence in seen:
        for one_name, other_name in itertools.combinations(sequence, 2):
            assert order.before(one_name, other_name)
    shuffled = data.draw(st.permutations(sorted(set().union(*seen))))
    found = order.sort(shuffled)
    pairs = itertools.combinations(sorted(shuffled, key=names.index), 2)
    assert (found is not None) == all(order.before(*pair) for pair in pairs)
    if found is not None:
        assert [shuffled[index] for index in found] == sorted(shuffled, key=names.index)


@given(modules(), st.data())
def test_modules_that_are_apart_follow_each_other(model: nn.Module, data: st.DataObject) -> None:
    names = [name for name, _ in model.named_parameters()]
    one = [name for name in names if data.draw(st.booleans())]
    other = [name for name in names if name not in one and data.draw(st.booleans())]
    if one and other and apart(one, other):
        places = [[names.index(name) for name in part] for part in (one, other)]
        assert max(places[0]) < min(places[1]) or max(places[1]) < min(places[0])


@pytest.mark.parametrize(
    "sequences",
    [
        [["blocks.1.w", "blocks.0.w"]],
        [["blocks.0.norm.w", "blocks.0.w"]],
        [["a.w", "b.w", "a.v"]],
        [["a.w", "b.w"], ["b.v", "a.v"]],
        [["a.w", "b.w"], ["b.v", "c.v"], ["c.u", "a.u"]],
    ],
)
def test_an_order_that_no_model_has(sequences: list[list[str]]) -> None:
    assert not ModelOrder(sequences).consistent


# ---- merging sequences -------------------------------------------------------------------


@given(st.permutations(range(6)), st.data())
def test_merged_sequences(order: list[int], data: st.DataObject) -> None:
    """All pairs that follow from the sequences are known, and no others."""
    kept = st.lists(st.booleans(), min_size=6, max_size=6)
    sequences = [
        list(itertools.compress(order, mask)) for mask in data.draw(st.lists(kept, max_size=4))
    ]
    merged = merge(sequences)
    assert merged is not None
    items = set().union(*sequences)
    assert sorted(merged.order) == sorted(items)
    known = {pair for sequence in sequences for pair in itertools.combinations(sequence, 2)}
    for through in items:  # Warshall
        known |= {(a, b) for a, x in known for y, b in known if x == y == through}
    assert merged.known == known
    assert all(merged.order.index(a) < merged.order.index(b) for a, b in known)
    assert merged.tells(merged.order) == all(p in known for p in itertools.pairwise(merged.order))


def test_sequences_that_contradict_each_other() -> None:
    assert merge([["a", "b"], ["b", "c"], ["c", "a"]]) is None


# ---- layers and numbers of experts -------------------------------------------------------


def places(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Layer and number of each expert parameter, from its name and from the module tree."""
    tags = find_experts(model).tags()
    named = {
        param: FlatParam(name, param.numel(), 0, tuple(param.shape))
        for name, param in model.named_parameters()
    }
    experts = {flat: tags[id(param)] for param, flat in named.items() if id(param) in tags}
    read = ExpertPlaces([flat for flat in named.values() if flat not in experts], experts)
    return {
        flat.name: (read.of(flat.name), (tag.layer, tag.expert_number))
        for flat, tag in experts.items()
    }


def layers(make: Callable[[], nn.Module]) -> nn.Module:
    return Tree(
        layers=nn.ModuleList(Tree(gate=nn.Linear(2, 2), experts=marked(make())) for _ in range(2))
    )


class Plain(nn.Module):
    """Tensors of all experts that have two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 2))


def deepspeed() -> nn.Module:
    return TinyMoE(DeepSpeedMoE, num_experts=4, ep_size=2)


def experts() -> nn.Module:
    return nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


TOLD: dict[str, Callable[[], nn.Module]] = {
    "DeepSpeed's layer": deepspeed,
    "ours": lambda: TinyMoE(MoE, num_experts=4, ep_size=2),
    "at the root": lambda: DeepSpeedMoE(16, nn.Linear(2, 2), 2),
    "compiled": lambda: Tree(inner=torch.compile(deepspeed())),  # type: ignore[arg-type]
    "activation checkpointing": lambda: Tree(inner=checkpoint_wrapper(deepspeed())),
    "PEFT": lambda: with_peft(deepspeed()).requires_grad_(),
    "PEFT, copied": lambda: with_peft(deepspeed(), modules_to_save=["blocks.0.moe"]),
    "a list": lambda: layers(experts),
    "experts made of lists": lambda: layers(lambda: nn.ModuleList([experts(), experts()])),
    "a list of another name": lambda: Tree(gate=nn.Linear(2, 2), my_experts=marked(experts())),
    "fused": lambda: layers(Fused),
    "fused, two dimensions": lambda: layers(Plain),
    "fused at the root": lambda: Tree(gate=nn.Linear(2, 2), experts=marked(Fused())),
}


@pytest.mark.parametrize("make", TOLD.values(), ids=TOLD)
def test_names_tell_the_place_of_an_expert(make: Callable[[], nn.Module]) -> None:
    found = places(make())
    assert found
    for name, (told, tagged) in found.items():
        assert told == tagged, name


UNTOLD: dict[str, Callable[[], nn.Module]] = {
    "a list that is not called experts": lambda: Tree(mlp=Tree(bank=marked(experts()))),
    "a dict": lambda: Tree(moe=Tree(experts=marked(nn.ModuleDict({"a": nn.Linear(2, 2)})))),
    "experts in a list of nothing else": lambda: marked(
        nn.ModuleList(Tree(experts=Plain()) for _ in range(2))
    ),
}


@pytest.mark.parametrize("make", UNTOLD.values(), ids=UNTOLD)
def test_names_that_do_not_tell(make: Callable[[], nn.Module]) -> None:
    found = places(make())
    assert found
    assert not any(told for told, _ in found.values())
    assert all(None not in tagged for _, tagged in found.values())


def test_autoep_is_known_without_shapes() -> None:
    names = [f"model.layers.3.mlp.experts.w{number}" for number in (1, 2, 3)]
    read = ExpertPlaces([], [FlatParam(name, 8, 0) for name in names])
    assert {read.of(name) for name in names} == {("model.layers.3.mlp", None)}
