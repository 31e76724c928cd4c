"""Experts that nobody trains, and groups that mark none: what each wrapper steps then."""

import warnings
from pathlib import Path

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn

from moe_groups import MoE, create_moe_param_groups, verify
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.errors import ParameterInputError
from tests.support.models import TinyMoE
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import WRAPPERS, largest_difference, start, train, weights


def frozen(layer: type[nn.Module] = MoE) -> nn.Module:
    """With experts that differ from those of a new model, so that loading them is seen."""
    model = TinyMoE(layer, ep_size=2)
    for block in model.blocks:
        experts = block.get_submodule("moe.deepspeed_moe.experts").requires_grad_(False)
        for param in experts.parameters():
            param.data += 0.125 * (1 + torch.distributed.get_rank())
    return model


def is_expert(name: str) -> bool:
    return ".experts." in name


def trained_and_loaded(wrapper: str, layer: type[nn.Module], folder: Path) -> tuple[float, ...]:
    engine = start(wrapper, create_moe_param_groups, frozen(layer))
    before = weights(engine)
    verify(engine)
    assert type(engine.optimizer).__name__ == WRAPPERS[wrapper]
    assert engine.has_moe_layers
    train(engine, 2)
    moved = weights(engine)
    engine.save_checkpoint(str(folder))
    train(engine, 2, first=2)
    wanted = weights(engine)
    forget_process_groups()
    other = TinyMoE(layer, ep_size=2)
    for block in other.blocks:
        block.get_submodule("moe.deepspeed_moe.experts").requires_grad_(False)
    engine = start(wrapper, create_moe_param_groups, other)
    engine.load_checkpoint(str(folder))
    train(engine, 2, first=2)
    stays = largest_difference(
        {n: w for n, w in before.items() if is_expert(n)},
        {n: w for n, w in moved.items() if is_expert(n)},
    )
    least = min(float((moved[n] - before[n]).abs().max()) for n in before if not is_expert(n))
    return stays, largest_difference(weights(engine), wanted), least


@pytest.mark.parametrize(
    ("wrapper", "layer"),
    [
        pytest.param("zero1", MoE, marks=pytest.mark.long),
        ("zero2", DeepSpeedMoE),
        ("bf16", MoE),
        pytest.param("fp32", MoE, marks=pytest.mark.long),
        pytest.param("half", MoE, marks=pytest.mark.long),
        pytest.param("half_unfused", DeepSpeedMoE, marks=pytest.mark.long),
    ],
)
def test_trains_beside_frozen_experts(wrapper: str, layer: type[nn.Module], tmp_path: Path) -> None:
    found = run_on_ranks(2, trained_and_loaded, wrapper, layer, tmp_path, timeout=300)
    for stays, difference, least in found:
        assert stays == difference == 0.0
        assert least > 0.0
    if not wrapper.startswith(("half", "fp")):  # inspection knows the wrappers that partition
        assert not inspect_checkpoint(tmp_path).problems


def unmarked(wrapper: str) -> str:
    """What is said of an optimizer over ``model.parameters()``, whose group is not marked."""
    model = TinyMoE(MoE, ep_size=2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            engine = start(wrapper, lambda m: [{"params": list(m.parameters())}], model)
        except ParameterInputError as error:
            return f"refused: {error}"
    verify(engine)
    losses = train(engine, 4)["loss"]
    assert losses[-1] < losses[0]
    return " ".join(str(one.message) for one in said if "marked moe" in str(one.message))


@pytest.mark.parametrize(
    ("wrapper", "expected"),
    [
        ("fp32", ""),
        pytest.param("half_unfused", "", marks=pytest.mark.long),
        pytest.param("half", "ranks clip by different norms", marks=pytest.mark.long),
        pytest.param("zero1", "refused: expert parameter blocks.0.moe", marks=pytest.mark.long),
        pytest.param("bf16", "refused: expert parameter blocks.0.moe", marks=pytest.mark.long),
    ],
)
def test_groups_that_are_not_marked(wrapper: str, expected: str) -> None:
    for said in run_on_ranks(2, unmarked, wrapper):
        assert expected in said
        assert bool(said) == bool(expected)


def dense_alone() -> str:
    model = TinyMoE(MoE, ep_size=2)
    with pytest.raises(ParameterInputError) as error:
        start("zero2", lambda m: [{"params": list(m.get_submodule("inp").parameters())}], model)
    return str(error.value)


@pytest.mark.long
def test_an_optimizer_without_the_trainable_experts_is_refused() -> None:
    for message in run_on_ranks(2, dense_alone):
        assert "11 more are in no group of the optimizer that is marked moe" in message
