"""Layers and numbers of experts from names, compared with the module trees that have them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moe_groups import MoE
from moe_groups.checkpoints.expert_names import ExpertPlaces
from moe_groups.checkpoints.layout import FlatParam
from moe_groups.experts.find import find_experts
from tests.pure.experts.test_tag_experts import Fused, Tree, marked
from tests.pure.experts.test_wrappers import with_peft
from tests.support.models import TinyMoE


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


NAMED: dict[str, Callable[[], nn.Module]] = {
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


@pytest.mark.parametrize("make", NAMED.values(), ids=NAMED)
def test_names_tell_the_place_of_an_expert(make: Callable[[], nn.Module]) -> None:
    found = places(make())
    assert found
    for name, (by_name, tagged) in found.items():
        assert by_name == tagged, name


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
    assert not any(by_name for by_name, _ in found.values())
    assert all(None not in tagged for _, tagged in found.values())


def test_autoep_is_known_without_shapes() -> None:
    names = [f"model.layers.3.mlp.experts.w{number}" for number in (1, 2, 3)]
    read = ExpertPlaces([], [FlatParam(name, 8, 0) for name in names])
    assert {read.of(name) for name in names} == {("model.layers.3.mlp", None)}
