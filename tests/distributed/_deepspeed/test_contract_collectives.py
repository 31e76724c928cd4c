"""Facts about DeepSpeed's MoE layer and torch's checkpoint that checkpointing relies on."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import deepspeed.comm
import pytest
import torch
from deepspeed.moe import mappings, sharded_moe
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch.utils.checkpoint import checkpoint

from moe_groups import checkpoint_activations
from moe_groups._deepspeed import collectives, patching
from moe_groups._deepspeed.collectives import support_kept_collectives
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups._deepspeed.kept_collectives import inside_region
from moe_groups.errors import UnsupportedDeepSpeedError
from tests.support.checkpointed_models import Tensors, different, initialized, plain, step
from tests.support.models import TinyMoE
from tests.support.ranks import run_in_fresh_processes, run_on_ranks

PARAMETERS = {
    "_AllToAll": ["ctx", "group", "input"],
    "_GatherTokens": ["ctx", "input_", "dim"],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_communication_is_a_static_forward(name: str) -> None:
    [owner] = [owner for owner, _, _ in collectives.KEPT if owner.endswith(f":{name}")]
    holder, forward = patching.find(owner, "forward")
    assert issubclass(holder, torch.autograd.Function)
    assert isinstance(inspect.getattr_static(holder, "forward"), staticmethod)
    assert list(inspect.signature(inspect.unwrap(forward)).parameters) == PARAMETERS[name]
    assert "save_for_backward" not in inspect.getsource(holder)  # the context has it all


def test_gates_reduce_a_capacity_with_this_all_reduce() -> None:
    assert sharded_moe.dist is deepspeed.comm
    for name in ("top1gating", "top2gating", "topkgating"):
        gate = getattr(sharded_moe, name, sharded_moe.top1gating)  # top-k since DeepSpeed 0.15
        assert "dist.all_reduce(new_capacity, op=dist.ReduceOp.MAX" in inspect.getsource(gate)
    arguments = r"def all_reduce\(tensor,\s+op=[^,]+,\s+group=None,\s+async_op=False,"
    assert re.search(arguments, inspect.getsource(deepspeed.comm.comm))


def test_layer_communicates_through_these_alone() -> None:
    source = inspect.getsource(sharded_moe.MOELayer.forward)
    assert source.count("_AllToAll.apply(") == 2
    assert "dist." not in source
    assert "_GatherTokens.apply(" in inspect.getsource(mappings.gather_tokens)


def test_autoep_communicates_through_these_alone() -> None:
    """Without folded tensor parallelism, DeepEP and ``async_split_plan``."""
    autoep = pytest.importorskip(collectives._AUTOEP, reason="DeepSpeed before 0.19.2")
    layer = autoep.AutoEPMoELayer
    source = inspect.getsource(getattr(layer, "_forward", layer.forward))  # 0.19.7 split it
    assert source.count("_AllToAllV.apply(") == 2
    assert source.count("compute_split_plan(") == 1
    assert "dist.all_to_all" not in source
    assert "local_counts_by_source" in autoep.SplitPlan._fields
    assert "save_for_backward" not in inspect.getsource(autoep._AllToAllV)
    places = [patching.find(owner, name) for owner, name, _ in collectives.KEPT_OF_AUTOEP]
    assert [inspect.unwrap(function).__name__ for _, function in places] == [
        "forward",
        "compute_split_plan",
    ]


def regions_seen() -> list[bool]:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(inside_region())
        return x.exp().sin()

    x = torch.ones(2, requires_grad=True)
    y = checkpoint_activations(function, x)
    y.register_hook(lambda _: seen.append(inside_region()))
    y.sum().backward()
    return [*seen, inside_region()]


def test_region_is_the_two_passes_and_not_the_backward_pass() -> None:
    assert regions_seen() == [True, False, True, False]


def test_recomputation_stops_early_in_the_region() -> None:
    """With an exception that passes through the contexts."""
    reached: list[int] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        reached.append(len(reached))
        return y + 1

    x = torch.ones(2, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    checkpoint_activations(function, x).sum().backward()
    assert reached == [0, 1]
    assert not inside_region()


# ---- the change ------------------------------------------------------------------------


def steps_around_the_change() -> list[Tensors]:
    model = initialized(TinyMoE(DeepSpeedMoE, ep_size=2, k=2))
    original = sharded_moe._AllToAll.forward
    before = step(model)
    support_kept_collectives()
    changed = sharded_moe._AllToAll.forward
    support_kept_collectives()
    assert inspect.unwrap(changed) is original
    assert sharded_moe._AllToAll.forward is changed
    return [before, step(model)]


def test_nothing_changes_outside_of_a_region() -> None:
    for before, after in run_in_fresh_processes(2, steps_around_the_change):
        assert different(before, after) == []


def refuse() -> str:
    complete = mappings._GatherTokens
    original = sharded_moe._AllToAll.forward
    del mappings._GatherTokens
    try:
        with pytest.raises(UnsupportedDeepSpeedError) as failure:
            checkpoint_activations(plain, torch.exp, torch.ones(1))
    finally:
        mappings._GatherTokens = complete
    assert sharded_moe._AllToAll.forward is original, "changed in part"
    return str(failure.value)


def test_missing_function_is_refused() -> None:
    [message] = run_in_fresh_processes(1, refuse)
    assert "has no deepspeed.moe.mappings:_GatherTokens.forward" in message
    assert "checkpoint_activations needs: install deepspeed" in message


def other_arguments(ctx: Any, tokens: torch.Tensor) -> torch.Tensor:
    raise AssertionError("never called")


def refuse_other_arguments() -> str:
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    original, engine.load_checkpoint = engine.load_checkpoint, other_arguments
    before = engine.save_checkpoint
    try:
        with pytest.raises(UnsupportedDeepSpeedError) as failure:
            support_our_groups(moe=True)
    finally:
        engine.load_checkpoint = original
    assert engine.save_checkpoint is before, "changed in part"
    return str(failure.value)


def test_other_arguments_are_refused() -> None:
    [message] = run_in_fresh_processes(1, refuse_other_arguments)
    assert "has deepspeed.runtime.engine:DeepSpeedEngine.load_checkpoint(ctx, tokens)" in message
    assert "which unique group names need with the arguments (self)" in message


def import_with_another_deepspeed() -> list[str]:
    """What the imports of a new process say, after a function of DeepSpeed got another name."""
    engine = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    engine.sanity_check = engine._do_optimizer_sanity_check
    del engine._do_optimizer_sanity_check
    for name in [name for name in sys.modules if name.startswith("moe_groups")]:
        del sys.modules[name]
    messages = []
    for name in ("moe_groups._deepspeed", "moe_groups"):
        with pytest.raises(Exception, match="has no") as failure:
            importlib.import_module(name)
        assert type(failure.value).__name__ == "UnsupportedDeepSpeedError"
        messages.append(str(failure.value))
    return messages


def test_another_deepspeed_is_refused_when_imported() -> None:
    [messages] = run_in_fresh_processes(1, import_with_another_deepspeed)
    for message in messages:
        assert "has no deepspeed.runtime.engine:DeepSpeedEngine._do_optimizer_sanity" in message
        assert "which unique group names need: install deepspeed" in message


# ---- other all-reduces -----------------------------------------------------------------


def reduced_in_a_region(reduce: Callable[[torch.Tensor], Any]) -> int:
    runs = []

    def function(x: torch.Tensor) -> torch.Tensor:
        total = torch.ones(3 if reduce is whole_tensor else 1, dtype=torch.int64)
        runs.append(reduce(total))
        return x.exp() * total.sum()

    x = torch.ones(2, requires_grad=True)
    checkpoint_activations(function, x).sum().backward()
    return len([run for run in runs if run is not None])


def whole_tensor(tensor: torch.Tensor) -> object:
    deepspeed.comm.all_reduce(tensor)
    return None if tensor.eq(1).all() else tensor


def later(tensor: torch.Tensor) -> object:
    handle = deepspeed.comm.all_reduce(tensor, async_op=True)
    handle.wait()
    return handle


def test_other_all_reduces_run_again() -> None:
    assert run_on_ranks(2, reduced_in_a_region, whole_tensor) == [2, 2]
    assert run_on_ranks(2, reduced_in_a_region, later) == [2, 2]
