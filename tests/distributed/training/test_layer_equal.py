"""Our layer computes what DeepSpeed's computes, bit for bit, copies of it too."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn

from moe_groups import MoE, create_moe_param_groups, get_expert_tag
from moe_groups.errors import TagError
from tests.support.models import FFN, HIDDEN
from tests.support.ranks import run_on_ranks

NUM_EXPERTS = 4
Tensors = dict[str, torch.Tensor]


def make(layer: type[nn.Module], ep_size: int, options: dict[str, Any]) -> Any:
    return layer(HIDDEN, FFN(), num_experts=NUM_EXPERTS, ep_size=ep_size, **options)


def initialized(layer: Any) -> Any:
    layer.set_deepspeed_parallelism()  # as deepspeed.initialize does
    return layer


def run(layer: nn.Module) -> Tensors:
    """Output, auxiliary loss, expert counts and all gradients of one step."""
    rank = torch.distributed.get_rank()
    x = torch.randn(3, 8, HIDDEN, generator=torch.Generator().manual_seed(rank))
    x.requires_grad_(True)
    torch.manual_seed(7)  # gates draw random numbers
    out, aux, counts = layer(x)
    layer.zero_grad()
    (out.square().sum() + aux).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    assert x.grad is not None
    return {"out": out, "aux": aux, "counts": counts, "input": x.grad, **gradients}


def different(ours: Tensors, theirs: Tensors) -> list[str]:
    assert list(ours) == list(theirs)
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def copied(layer: Any) -> Any:
    return initialized(copy.deepcopy(layer))


def copied_initialized(layer: Any) -> Any:
    return copy.deepcopy(initialized(layer))


def copied_after_run(layer: Any) -> Any:
    run(initialized(layer))
    return copy.deepcopy(layer)


def pickled(layer: Any) -> Any:
    return initialized(pickle.loads(pickle.dumps(layer)))


def compare(ep_size: int, options: dict[str, Any], made_from: Callable[..., Any]) -> list[str]:
    """Names of what differs between DeepSpeed's layer and ours, with the same weights."""
    theirs = initialized(make(DeepSpeedMoE, ep_size, options))
    ours = make(MoE, ep_size, {**options, "expert_group_name": "layer"})
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    used = made_from(ours)
    tags = [get_expert_tag(p) for p in used.parameters()]
    assert tags == [get_expert_tag(p) for p in ours.parameters()]
    assert len([tag for tag in tags if tag]) == 3 * NUM_EXPERTS // ep_size
    expected = run(theirs)
    assert sum(bool(value.any()) for value in expected.values()) >= len(expected) - 1, "all zero"
    return different(run(used), expected)


OPTIONS = {
    "top1": {"k": 1},
    "top2": {"k": 2},
    "residual": {"k": 1, "use_residual": True},
    "drop_none": {"k": 2, "drop_tokens": False, "noisy_gate_policy": "RSample"},
}


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    "made_from", [initialized, copied, copied_initialized, copied_after_run, pickled]
)
def test_bit_equal(ep_size: int, options: dict[str, Any], made_from: Callable[..., Any]) -> None:
    assert run_on_ranks(2, compare, ep_size, options, made_from) == [[], []]


@pytest.mark.long
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bit_equal_on_four_ranks(options: dict[str, Any]) -> None:
    assert run_on_ranks(4, compare, 2, options, initialized) == [[]] * 4


def train_the_copy() -> None:
    layer = initialized(make(MoE, 2, {"k": 2, "expert_group_name": "layer"}))
    run(layer)
    before = {name: p.grad for name, p in layer.named_parameters()}
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for param in other.parameters():
            param.mul_(2)
    run(other)
    for name, param in layer.named_parameters():
        assert param.grad is before[name], f"the copy shares {name} with the original"
    assert other.deepspeed_moe.ep_group is layer.deepspeed_moe.ep_group
    with pytest.raises(TagError, match="two MoE layers are called 'layer'"):
        create_moe_param_groups(experts_of(layer) + experts_of(other))


def experts_of(layer: Any) -> list[torch.Tensor]:
    return list(layer.deepspeed_moe.experts.parameters())


def test_copy_is_a_layer_of_its_own() -> None:
    run_on_ranks(2, train_the_copy)
