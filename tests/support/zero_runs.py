"""Runs under ZeRO to compare bit for bit, and the memory of their steps."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from moe_groups._deepspeed.releases import need
from moe_groups.errors import InvalidArgumentError, UnsupportedDeepSpeedError
from tests.support.models import HIDDEN
from tests.support.skipping import SkippingMoE, skip
from tests.support.training import batches, config, groups_by, initialize, start, train

Snapshot = dict[str, torch.Tensor]
Run = tuple[dict[str, list[float]], Snapshot]
ZERO = ("zero1", "zero2")
CLIP = 0.05
Change = Callable[[Any], object]


class Case(NamedTuple):
    """One run, to be done with and without a change of the engine.

    Attributes:
        split: of the groups, as in :func:`tests.support.training.make_groups`.
        accumulate: micro-batches in a step.
        zero: entries of ``zero_optimization``.
        other: entries of the config.
    """

    wrapper: str = "zero2"
    split: str = "expert"
    ep_size: int = 2
    accumulate: int = 1
    zero: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    other: dict[str, Any] = {}  # noqa: RUF012

    def engine(self, change: Change | None = None, **options: Any) -> Any:
        """An engine of this case, which ``change`` has changed."""
        zero = config(self.wrapper)["zero_optimization"] | self.zero
        model = {"ep_size": self.ep_size} | options.pop("model_options", {})
        changes = {"gradient_accumulation_steps": self.accumulate, "zero_optimization": zero}
        changes |= self.other | options
        engine = start(self.wrapper, groups_by(self.split), model_options=model, **changes)
        if change is not None:
            change(engine)
        return engine


def snapshot(engine: Any) -> Snapshot:
    """All that a run made on this rank: parameters, master weights and optimizer state."""
    optimizer = engine.optimizer
    found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    partitions = "single_partition_of_fp32_groups", "fp32_groups_flat_partition"
    there = [name for name in partitions if hasattr(optimizer, name)]
    if not there:
        need("BF16_Optimizer", "leave it out")
    masters = getattr(optimizer, there[0])
    for index, master in enumerate(masters):
        found[f"master {index}"] = master.detach().clone()
        for key, value in optimizer.state[master].items():
            found[f"{key} {index}"] = torch.as_tensor(value).clone()
    assert any(optimizer.state.values())
    return found


def differences(expected: Run, actual: Run) -> list[str]:
    (history, end), (other, other_end) = expected, actual
    assert list(end) == list(other_end)
    problems = [f"{other} instead of {history}"] if repr(other) != repr(history) else []
    return problems + [name for name in end if not torch.equal(end[name], other_end[name])]


class Dense(nn.Module):
    """For settings that DeepSpeed refuses where a model has experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(5))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(x.float(), y.float())


def start_dense(wrapper: str = "zero2", zero: dict[str, Any] | None = None, **other: Any) -> Any:
    zero = config(wrapper)["zero_optimization"] | (zero or {})
    return start(wrapper, groups_by("module"), Dense(), zero_optimization=zero, **other)


def start_muon() -> Any:
    model = Dense()
    for param in model.parameters():
        param.use_muon = param.ndim > 1  # type: ignore[attr-defined]
    cfg = config("zero2") | {
        "optimizer": {"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}}
    }
    return initialize(model, None, cfg, model_parameters=model.parameters())


def start_without_optimizer() -> Any:
    return initialize(Dense(), None, {"train_micro_batch_size_per_gpu": 4})


STEP = "the optimizer step"
SCALARS = 8  # bytes; norms and flags come and go


class Cost(NamedTuple):
    """Bytes: gradients held when the step begins (R), its peak above the end (T + R)."""

    held: int
    peak: int
    partitions: int
    whole: int


def cost(engine: Any) -> Cost:
    """Of one step, and elements of this rank's partitions and of the parameters that touch them."""
    accumulate = engine.gradient_accumulation_steps()
    train(engine, accumulate)  # the first step creates the optimizer's state
    micro_batches = list(batches(accumulate, first=9))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for number, (x, y) in enumerate(micro_batches, 1):
            engine.backward(engine(x.bfloat16(), y.bfloat16()))
            with record_function(STEP) if number == accumulate else contextlib.nullcontext():
                engine.step()
    held, peak = _during_step(profiler)
    optimizer = engine.optimizer
    touching = (param for group in optimizer.params_in_partition for param in group)
    partitions = sum(map(int, optimizer.partition_size))
    return Cost(held, peak, partitions, sum(param.numel() for param in touching))


def _during_step(profiler: Any) -> tuple[int, int]:
    events = profiler.profiler.kineto_results.events()
    begin, end = next((e.start_ns(), e.end_ns()) for e in events if e.name() == STEP)
    memory = (e for e in events if e.name() == "[memory]" and abs(e.nbytes()) > SCALARS)
    held = at_begin = peak = 0
    for event in sorted(memory, key=lambda e: e.start_ns()):
        if event.start_ns() < begin:
            at_begin = peak = held + event.nbytes()
        elif event.start_ns() > end:
            break
        held += event.nbytes()
        peak = max(peak, held)
    return at_begin - held, peak - held


def against_plain(change: Change, cases: list[Case], steps: int = 3) -> list[str]:
    """What differs between runs with and without ``change``."""
    problems = []
    for case in cases:
        runs = []
        for one in (None, change):
            engine = case.engine(one)
            runs.append((train(engine, steps * case.accumulate), snapshot(engine)))
        problems += [f"{case}: {one}" for one in differences(*runs)]
    return problems


def dense_against_plain(change: Change, wrapper: str, zero: dict[str, Any]) -> list[str]:
    runs = []
    for one in (None, change):
        engine = start_dense(wrapper, zero, gradient_accumulation_steps=2)
        if one is not None:
            one(engine)
        runs.append((train(engine, 6), snapshot(engine)))
    return differences(*runs)


def skipping_an_expert(change: Change, wrapper: str, ep_size: int) -> list[str]:
    runs = []
    skip([1], (0,))
    for one in (None, change):
        engine = Case(wrapper, ep_size=ep_size).engine(one, layer=SkippingMoE)
        runs.append((train(engine, 3), snapshot(engine)))
    return differences(*runs)


def overflow(change: Change | None) -> Run:
    engine = Case(other={"bf16": {"enabled": True, "check_grad_overflow": True}}).engine(change)
    losses: list[float] = []
    for step, (x, y) in enumerate(batches(4)):
        loss = engine(x.bfloat16(), y.bfloat16())
        engine.backward(loss * (float("inf") if step == 1 else 1.0))
        engine.step()
        losses.append(float(loss.detach()))
    assert engine.skipped_steps == 1
    return {"loss": losses}, snapshot(engine)


def overflow_against_plain(change: Change) -> list[str]:
    return differences(overflow(None), overflow(change))


def resume(case: Case, before: Change | None, after: Change | None, folder: Path) -> list[str]:
    """Change an engine ``before`` it saves, another ``after`` it loads; a plain one goes on."""
    plain = case.engine()
    train(plain, 2 * case.accumulate)
    saving = case.engine(before)
    train(saving, 2 * case.accumulate)
    saving.save_checkpoint(str(folder))
    loading = case.engine(after)
    loading.load_checkpoint(str(folder))
    runs = []
    for engine in (plain, loading):
        history = train(engine, 2 * case.accumulate, first=2 * case.accumulate)
        del history["norm"][: case.accumulate - 1]  # still that of the step before
        runs.append((history, snapshot(engine)))
    return differences(*runs)


def changed_late(first: Change, second: Change, folder: Path) -> list[str]:
    """Changed after the checkpoint was loaded, between two steps, and once more."""
    case = Case(accumulate=2)
    plain, late = case.engine(), case.engine()
    train(plain, 2)
    plain.save_checkpoint(str(folder))
    late.load_checkpoint(str(folder))
    train(plain, 2), train(late, 2)
    first(late), second(late)
    return differences((train(plain, 4), snapshot(plain)), (train(late, 4), snapshot(late)))


def refusal(change: Change, engine: Any) -> str:
    """Why ``change`` refuses this engine, which stays as it is."""
    optimizer = getattr(engine, "optimizer", None)
    before = list(vars(optimizer)) if optimizer is not None else []
    with pytest.raises(InvalidArgumentError) as failure:
        change(engine)
    assert (list(vars(optimizer)) if optimizer is not None else []) == before
    return str(failure.value)


def changed_too_late(change: Change, case: Case) -> tuple[str, list[str]]:
    """Between ``backward`` and ``step``, and in the middle of an accumulation."""
    plain, engine = case.engine(), case.engine()
    runs = []
    for number, tried in enumerate((plain, engine)):
        (x, y), *rest = (tuple(data.bfloat16() for data in one) for one in batches(case.accumulate))
        tried.backward(tried(x, y))
        if number:
            with pytest.raises(InvalidArgumentError) as failure:
                change(tried)
        tried.step()
        for x, y in rest:
            tried.backward(tried(x, y))
            tried.step()
        runs.append((train(tried, 2 * case.accumulate), snapshot(tried)))
    return str(failure.value), differences(*runs)


def changed_without(change: Change, name: str) -> tuple[str, bool]:
    """What is said where DeepSpeed lacks a method, and whether the engine stays as it is."""
    engine = Case().engine()
    before = list(vars(engine.optimizer))
    missing = mock.patch.object(DeepSpeedZeroOptimizer, name, None)
    with missing, pytest.raises(UnsupportedDeepSpeedError) as failure:
        change(engine)
    return str(failure.value), list(vars(engine.optimizer)) == before
