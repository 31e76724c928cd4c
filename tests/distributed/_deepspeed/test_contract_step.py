"""Facts about the optimizer step in DeepSpeed's wrappers, for metrics and experts' options."""

import hashlib
import inspect
import math
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import distributed

from tests.support.old_deepspeed import NO_BF16, WRONG_NORM, before as is_before, known_before
from tests.support.ranks import run_on_ranks
from tests.support.training import groups_by, largest_difference, start, train, weights

EP2 = {"ep_size": 2}
WRAPPERS = ["zero1", "zero2", "bf16"]
CLIP = 0.05


def calls_of_a_step(wrapper: str) -> tuple[list[int], int]:
    """How many groups have tensors in each call of the torch optimizer, and how many there are."""
    engine = start(wrapper, groups_by("stock"), model_options=EP2)
    calls: list[int] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        calls.append(sum(bool(group["params"]) for group in optimizer.param_groups))

    engine.basic_optimizer.register_step_pre_hook(look)
    train(engine, 1)
    return calls, len(engine.optimizer.param_groups)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_zero_steps_a_group_at_a_time_and_bf16_all(wrapper: str) -> None:
    for calls, groups in run_on_ranks(2, calls_of_a_step, wrapper):
        assert groups == 2
        assert calls == ([groups] if wrapper == "bf16" else [1] * groups)


def norms_of_a_step(wrapper: str) -> tuple[float, float]:
    """The norm of what is stepped, over all ranks, and the one that DeepSpeed tells."""
    engine = start(wrapper, groups_by("stock"), model_options=EP2)
    squares = torch.zeros(())

    def add(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for tensor in (tensor for group in optimizer.param_groups for tensor in group["params"]):
            assert tensor.grad is not None
            squares.add_(tensor.grad.float().square().sum())

    engine.basic_optimizer.register_step_pre_hook(add)
    train(engine, 1)
    distributed.all_reduce(squares)  # dense parameters are cut, experts are others on each rank
    return math.sqrt(float(squares)), float(engine.get_global_grad_norm())


@pytest.mark.numeric
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_stepped_gradients_are_clipped_and_the_norm_is_from_before(wrapper: str) -> None:
    for stepped, seen_norm in run_on_ranks(2, norms_of_a_step, wrapper):
        assert seen_norm > 2 * CLIP, "nothing was clipped"
        with known_before("0.19", WRONG_NORM):
            assert stepped == pytest.approx(CLIP, rel=1e-2)


def steps_without(wrapper: str, how: str) -> list[float]:
    """Largest change of an expert and of a dense parameter where the expert is held."""
    engine = start(wrapper, groups_by("stock"), model_options=EP2)
    before = weights(engine)
    if how == "no gradient in the optimizer":

        def drop(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for group in optimizer.param_groups:
                for tensor in group["params"] if group.get("moe") else ():
                    tensor.grad = None

        engine.basic_optimizer.register_step_pre_hook(drop)
    else:
        for name, param in engine.module.named_parameters():
            if "deepspeed_experts" in name:
                param.register_hook(torch.zeros_like)
        for group in engine.optimizer.param_groups:
            group["weight_decay"] = 0.0
    train(engine, 2)
    after = weights(engine)
    kinds: list[list[str]] = [[], []]
    for name in before:
        kinds["deepspeed_experts" not in name].append(name)
    return [
        largest_difference({n: before[n] for n in names}, {n: after[n] for n in names})
        for names in kinds
    ]


@pytest.mark.parametrize("how", ["no gradient in the optimizer", "hook of the parameter"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ways_to_hold_an_expert(wrapper: str, how: str) -> None:
    for expert, dense in run_on_ranks(2, steps_without, wrapper, how):
        assert expert == 0
        assert dense > 0


def keys_after(wrapper: str, folder: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """A key of ours in the groups of a started engine, after a step, and after a load."""

    def groups_of(model: Any) -> list[dict[str, Any]]:
        return [{**group, "note": i} for i, group in enumerate(groups_by("stock")(model))]

    engine = start(wrapper, groups_of, model_options=EP2)

    def notes() -> list[Any]:
        return [group.get("note") for group in engine.optimizer.param_groups]

    at_first = notes()
    train(engine, 1)
    stepped = notes()
    engine.save_checkpoint(str(folder))
    for group in engine.optimizer.param_groups:
        group["note"] = "of this run"
    engine.load_checkpoint(str(folder))
    return at_first, stepped, notes()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_other_keys_of_a_group_are_kept_and_saved(wrapper: str, tmp_path: Path) -> None:
    with known_before("0.18.5", NO_BF16):
        found = run_on_ranks(2, keys_after, wrapper, tmp_path)
    for kept in found:
        assert kept == ([0, 1], [0, 1], [0, 1])


def refreshed(wrapper: str) -> tuple[bool, float, float]:
    """Is the engine's hook on its module; a weight's master before and after the refresh."""
    engine = start(wrapper, groups_by("stock"), model_options=EP2)
    modules_of_hooks = {
        getattr(h, "__module__", "") for h in engine.module._forward_pre_hooks.values()
    }
    name, param = next(iter(engine.module.named_parameters()))
    with torch.no_grad():
        param.fill_(3)
    before = weights(engine)[name]
    engine.optimizer.refresh_fp32_params()
    after = weights(engine)[name]
    return "deepspeed.runtime.engine" in modules_of_hooks, float(before.min()), float(after.min())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_of_the_module_are_not_those_that_are_stepped(wrapper: str) -> None:
    with known_before("0.16.4", "BF16_Optimizer refreshes the wrong parts of its masters"):
        found = run_on_ranks(2, refreshed, wrapper)
    for hooked, before, after in found:
        assert hooked or not hasattr(deepspeed.DeepSpeedEngine, "_create_module_forward_pre_hook")
        assert before < 3
        assert after == 3


# ---- what lean_step follows -----------------------------------------------------------

FOLLOWED = {
    (DeepSpeedZeroOptimizer, "step"): "9520884fd916d178",
    (DeepSpeedZeroOptimizer, "scaled_global_norm"): "63c6a6fe100c4e49",
    (DeepSpeedZeroOptimizer, "get_grad_norm_direct"): "72af0993ad8cde2c",
    (DeepSpeedZeroOptimizer, "_average_expert_grad_norms"): "75e2e7693e3f19d7",
    (DeepSpeedZeroOptimizer, "unscale_and_clip_grads"): "6bf2ce6f97eafcc2",
    (BF16_Optimizer, "step"): "9b21d4a28f8714d9",
    (BF16_Optimizer, "update_lp_params"): "128911db918ae80c",
}
"""What ``lean_step.py`` does as DeepSpeed does, and the digest of its source."""


@pytest.mark.skipif(is_before("0.19.8"), reason="lean_step refuses DeepSpeed before 0.19.8")
@pytest.mark.parametrize(("owner", "name"), FOLLOWED)
def test_what_is_followed_is_as_it_was(owner: type, name: str) -> None:
    """If this fails for a new DeepSpeed, compare the function with ours first."""
    source = inspect.getsource(inspect.unwrap(vars(owner)[name]))
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == FOLLOWED[owner, name]
