"""Checkpointing repeats no all-to-all, and trains as if nothing were checkpointed."""

import copy
import gc
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.moe import mappings, sharded_moe
from deepspeed.utils import groups
from torch import nn

from moe_groups import checkpoint_activations
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups._deepspeed.kept_collectives import KeepPass
from moe_groups.errors import InvalidArgumentError, RecomputationError
from tests.support.checkpointed_models import (
    WAYS,
    CheckpointedMoE,
    Tensors,
    Way,
    batch,
    communication,
    different,
    gradients,
    initialized,
    plain,
    step,
    torchs,
)
from tests.support.old_deepspeed import known_before
from tests.support.pipeline_runs import start_pipeline, train_pipeline
from tests.support.ranks import run_on_ranks
from tests.support.training import groups_by, largest_difference, start, train, weights

LAYERS = 2
OPTIONS: dict[str, dict[str, Any]] = {
    "top1": {"k": 1, "drop_tokens": True, "use_rts": True, "noisy_gate_policy": "Jitter"},
    "top1_no_drop": {"k": 1, "drop_tokens": False, "noisy_gate_policy": "RSample"},
    "top2": {"k": 2, "drop_tokens": True},
    "top2_no_drop": {"k": 2, "drop_tokens": False},
    "top3": {"k": 3, "drop_tokens": True, "min_capacity": 4},
    "residual": {"k": 1, "use_residual": True, "drop_tokens": True},
}
Compared = tuple[tuple[int, int], list[str]]
TAKEN = inspect.signature(torch.utils.checkpoint.checkpoint).parameters
NO_EARLY_STOP: dict[str, Any] = {"early_stop": False} if "early_stop" in TAKEN else {}
"""torch 2.4 has a context manager for it alone."""


def made(way: Way, **options: Any) -> nn.Module:
    return initialized(CheckpointedMoE(way, **{"ep_size": 2, "layers": LAYERS} | options))


def compare(ways: dict[str, Way], **options: Any) -> dict[str, Compared]:
    """Way to its communication in a step, and what differs from no checkpointing there."""
    expected = step(made(plain, **options))
    assert expected["loss"].item() > 0
    found = {}
    for name, way in ways.items():
        model = made(way, **options)
        counted = communication(lambda: step(model))
        found[name] = counted, different(step(model), expected)
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step_repeats_no_all_to_all(options: dict[str, Any]) -> None:
    capacities = 0 if options["drop_tokens"] else LAYERS
    for found in run_on_ranks(2, compare, WAYS, **options):
        assert found == {
            "plain": ((4 * LAYERS, capacities), []),
            "torch": ((6 * LAYERS, 2 * capacities), []),
            "ours": ((4 * LAYERS, capacities), []),
        }


def test_two_layers_in_a_checkpointed_function() -> None:
    for found in run_on_ranks(2, compare, WAYS, per_piece=2, k=2):
        assert found["torch"] == ((6 * LAYERS, 2 * LAYERS), [])
        assert found["ours"] == ((4 * LAYERS, LAYERS), [])


def test_experts_that_are_not_distributed() -> None:
    for found in run_on_ranks(2, compare, WAYS, ep_size=1, k=2):
        assert found["ours"] == found["plain"]
        with known_before("0.19", "a rank with all experts sends tokens to itself"):
            assert found["plain"] == ((0, 0), [])


# ---- other ways to call it -------------------------------------------------------------


def ours_in_ours(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint_activations(checkpoint_activations, function, *args)


def torchs_in_ours(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint_activations(torchs, function, *args)


def ours_in_torchs(function: Callable[..., Any], *args: Any) -> Any:
    return torchs(checkpoint_activations, function, *args)


def without_early_stop(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint_activations(function, *args, **NO_EARLY_STOP)


def selective(function: Callable[..., Any], *args: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def keep_products(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        kept = op is torch.ops.aten.addmm.default  # not mm: the gate adds its noise in place
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(keep_products)

    return checkpoint_activations(function, *args, context_fn=contexts)


def autocast(way: Way) -> Way:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return way(function, *args)

    return run


def compare_combinations() -> dict[str, Compared]:
    ways = [ours_in_ours, torchs_in_ours, ours_in_torchs, without_early_stop]
    if hasattr(torch.utils.checkpoint, "CheckpointPolicy"):  # since torch 2.5
        ways.append(selective)
    return compare({way.__name__: way for way in ways}, k=2)


def test_combined_with_others() -> None:
    for found in run_on_ranks(2, compare_combinations):
        repeated = found.pop("torchs_in_ours")  # the inner one recomputes the layer
        assert repeated == ((6 * LAYERS, 2 * LAYERS), [])
        for name, result in found.items():
            assert result == ((4 * LAYERS, LAYERS), []), name


def compare_autocast() -> list[str]:
    options = {"k": 2, "drop_tokens": True}
    expected = step(made(autocast(plain), **options))
    assert different(step(made(plain, **options)), expected), "autocast changes nothing"
    return different(step(made(autocast(checkpoint_activations), **options)), expected)


def test_under_autocast() -> None:
    assert run_on_ranks(2, compare_autocast) == [[], []]


def compare_without_gradients() -> tuple[tuple[int, int], list[bool]]:
    ours, theirs = made(checkpoint_activations), made(plain)
    equal = []
    for training in (True, False):
        ours.train(training)
        theirs.train(training)
        with torch.no_grad():
            equal.append(torch.equal(ours(*batch()), theirs(*batch())))
    with torch.no_grad():
        return communication(lambda: ours(*batch())), equal


def test_without_gradients() -> None:
    for counted, equal in run_on_ranks(2, compare_without_gradients):
        assert counted == (2 * LAYERS, LAYERS)
        assert equal == [True, True]


def backward_twice(way: Way) -> tuple[tuple[int, int], Tensors]:
    model = made(way)
    loss = model(*batch())
    loss.backward(retain_graph=True)
    counted = communication(loss.backward)
    return counted, gradients(model)


def compare_backward_twice() -> tuple[tuple[int, int], list[str]]:
    counted, found = backward_twice(checkpoint_activations)
    return counted, different(found, backward_twice(plain)[1])


def test_second_backward_pass_over_one_graph() -> None:
    for counted, unequal in run_on_ranks(2, compare_backward_twice):
        assert counted == (2 * LAYERS, 0)
        assert unequal == []


def interleaved() -> list[str]:
    """Two forward passes before the first backward pass, as in a pipeline."""
    found = []
    for way in (plain, checkpoint_activations):
        model = made(way, noisy_gate_policy="RSample")
        torch.manual_seed(3)
        x, y = batch()
        losses = [model(x, y), model(2 * x, y)]
        for loss in losses:
            loss.backward()
        found.append(gradients(model))
    return different(*found)


def test_forward_passes_before_backward_passes() -> None:
    assert run_on_ranks(2, interleaved) == [[], []]


class TensorParallel:
    """An ``mpu`` in which all ranks share the tokens."""

    def get_tensor_model_parallel_world_size(self) -> int:
        return torch.distributed.get_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        return torch.distributed.get_rank()

    def get_tensor_model_parallel_group(self) -> Any:
        return torch.distributed.group.WORLD


def gather_tokens(way: Way) -> tuple[int, torch.Tensor]:
    """Gatherings in a forward and backward pass, and the gradient of the tokens."""
    support_our_groups(moe=True)  # so that gloo gathers them
    groups.mpu = TensorParallel()
    tokens = torch.ones(4, 3, 2, requires_grad=True)
    gather, calls = torch.distributed.all_gather, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return gather(*args, **kwargs)

    with mock.patch.object(torch.distributed, "all_gather", counted):
        way(lambda x: mappings.gather_tokens(x.exp(), dim=1).exp(), tokens).sum().backward()
    assert tokens.grad is not None
    return calls, tokens.grad


def test_gathering_under_tensor_parallelism() -> None:
    expected = [result for _, result in run_on_ranks(2, gather_tokens, plain)]
    for way, count in ((torchs, 2), (checkpoint_activations, 1)):
        for (gatherings, gradient), wanted in zip(
            run_on_ranks(2, gather_tokens, way), expected, strict=True
        ):
            assert gatherings == count
            assert torch.equal(gradient, wanted)


def left_after_a_step() -> int:
    model = made(checkpoint_activations)
    gc.disable()
    try:
        step(model)
        return sum(isinstance(thing, KeepPass) for thing in gc.get_objects())
    finally:
        gc.enable()


def test_nothing_is_kept_after_a_step() -> None:
    """Also without the garbage collector, which does not see memory run out."""
    assert run_on_ranks(2, left_after_a_step) == [0, 0]


# ---- training --------------------------------------------------------------------------


def train_three_ways(wrapper: str, options: dict[str, Any]) -> list[tuple[Any, float]]:
    engines = []
    for way in WAYS.values():
        model = CheckpointedMoE(way, ep_size=2, **options)
        torch.manual_seed(5)
        engine = start(wrapper, groups_by("expert"), model, gradient_accumulation_steps=2)
        engines.append((train(engine, 6), weights(engine)))
    return [(history, largest_difference(end, engines[0][1])) for history, end in engines]


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
@pytest.mark.parametrize("options", ["top1", "top2_no_drop"])
def test_training_is_equal(wrapper: str, options: str) -> None:
    for histories in run_on_ranks(2, train_three_ways, wrapper, OPTIONS[options]):
        first = histories[0][0]
        assert all(norm > 0 for norm in first["norm"][1::2])
        assert histories == [(first, 0.0)] * len(WAYS)


def train_pipeline_ways() -> list[tuple[list[float], tuple[int, int]]]:
    found = []
    for way in (None, torchs, checkpoint_activations):
        options: dict[str, Any] = {}
        if way is not None:
            options = {"activation_checkpoint_interval": 1, "activation_checkpoint_func": way}
        engine = start_pipeline("bf16", "module", stages=2, **options)
        losses = train_pipeline(engine, 3)
        counted = communication(lambda: train_pipeline(engine, 1, first=3))
        found.append((losses, counted))
    return found


@pytest.mark.long
def test_pipeline() -> None:
    """The first stage goes backward once for each of its two outputs, and so recomputes twice."""
    found = run_on_ranks(4, train_pipeline_ways)
    per_stage = {"first": found[0], "last": found[3]}
    for of_way in found:
        assert [losses for losses, _ in of_way] == [of_way[0][0]] * 3
    layers, micro_batches = 2, 2
    all_to_alls = {
        stage: [counted[0] / (layers * micro_batches) for _, counted in of_way]
        for stage, of_way in per_stage.items()
    }
    assert all_to_alls == {"first": [5, 9, 5], "last": [4, 6, 4]}


# ---- what cannot be done ---------------------------------------------------------------


def change_in_place() -> str:
    def function(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = sharded_moe._AllToAll.apply(torch.distributed.group.WORLD, x)
        return y.exp_()

    x = torch.ones(2, 3, requires_grad=True)
    y = checkpoint_activations(function, x)
    with pytest.raises(RecomputationError) as failure:
        y.sum().backward()
    return str(failure.value)


def test_result_changed_in_place_is_refused() -> None:
    for message in run_on_ranks(2, change_in_place):
        assert "_AllToAll.forward" in message
        assert "in place" in message


def do_something_else() -> list[str]:
    """The recomputation runs a layer that the forward pass did not, or another collective."""
    messages = []
    for other in (0, 1):
        model: Any = made(plain, layers=2, drop_tokens=True)
        model.blocks[1].moe.deepspeed_moe.gate.drop_tokens = False
        used = [other]

        def function(x: torch.Tensor) -> torch.Tensor:
            for block in model.blocks[used[0] : used[0] + 1 + used[0] + other]:
                x = block(x)[0]
            return x

        loss = checkpoint_activations(function, batch()[0], **NO_EARLY_STOP).sum()
        used[0] = 1 - other
        with pytest.raises(RecomputationError) as failure:
            loss.backward()
        messages.append(str(failure.value))
    return messages


def test_other_collectives_in_the_recomputation_are_refused() -> None:
    for other, missing in run_on_ranks(2, do_something_else):
        assert "collective 1 " in other
        assert "all_reduce of a whole number" in other
        assert "collective 1 " in missing


def test_reentrant_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="leave the argument out"):
        checkpoint_activations(copy.copy, torch.ones(1), use_reentrant=True)
