"""Options in the middle of a run: beside runs that had them from the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from moe_groups import create_moe_param_groups, verify
from moe_groups.engine.group_options import GroupSchedule, set_group_options
from moe_groups.errors import InvalidArgumentError, OverrideError
from moe_groups.metrics.group_metrics import GroupMetrics
from tests.distributed.metrics.test_group_metrics import OFFLOADED
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import (
    CLIPPED_TOLERANCE,
    NORM_TOLERANCE,
    batches,
    groups_by,
    largest_difference,
    moving_in,
    start,
    train,
    weights,
)

WRAPPERS = ["zero1", "zero2", "zero2_fp32_grads", "bf16", "fp32"]
ALL_BUT_TWO = ["*.expert.0", "*.expert.3"]
"""Of the four experts of each layer, by their numbers over all ranks."""


def frozen_names(ep_size: int) -> list[str]:
    """Beginnings of the names of experts 0 and 3 on this rank."""
    rank = torch.distributed.get_rank() % ep_size
    numbers = [number - rank * 4 // ep_size for number in (0, 3)]
    here = [number for number in numbers if 0 <= number < 4 // ep_size]
    return [
        f"blocks.{layer}.moe.deepspeed_moe.experts.deepspeed_experts.{number}."
        for layer in range(2)
        for number in here
    ]


def split_by_freezing(found: dict[str, Any], ep_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    beginnings = tuple(frozen_names(ep_size))
    frozen = {name: value for name, value in found.items() if name.startswith(beginnings)}
    return frozen, {name: value for name, value in found.items() if name not in frozen}


def states(engine: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Moments and counters of each group by its place."""
    optimizer = engine.basic_optimizer
    found: dict[int, dict[str, torch.Tensor]] = {}
    for place, group in enumerate(optimizer.param_groups):
        for tensor in group["params"]:
            for key, value in optimizer.state[tensor].items():
                found.setdefault(place, {})[f"{len(tensor)} {key}"] = value.clone()
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def freeze(wrapper: str, ep_size: int, changes: dict[str, Any] | None = None) -> None:
    options: dict[str, Any] = {"model_options": {"ep_size": ep_size}, **(changes or {})}
    engine = start(wrapper, groups_by("expert"), **options)
    train(engine, 2)
    for pattern in ALL_BUT_TWO:
        set_group_options(engine, pattern, frozen=True)
    before, moments = weights(engine), states(engine)
    frozen, _ = split_by_freezing(before, ep_size)
    assert len(frozen) == 3 * 2 * (2 if ep_size == 1 else 1)
    metrics = GroupMetrics(engine, interval=3)
    train(engine, 3, first=2)
    report = metrics.step()
    assert report is None  # step 5
    held, others = split_by_freezing(weights(engine), ep_size)
    assert all(same_bits(value, before[name]) for name, value in held.items())
    assert not any(torch.equal(value, before[name]) for name, value in others.items())
    for place, group in enumerate(engine.optimizer.param_groups):
        stays = all(
            torch.equal(value, states(engine)[place][key]) for key, value in moments[place].items()
        )
        assert stays == bool(group.get("step_options", {}).get("frozen")), group["name"]
    train(engine, 1, first=5)
    report = metrics.step()
    assert report is not None
    assert report.total.grad_norm > 0
    for layer in report.layers.values():
        for number, stats in enumerate(layer.experts):
            assert stats is not None
            still = number in (0, 3)
            assert (stats.lr == stats.grad_norm == stats.update_norm == 0) == still
            assert stats.param_norm > 0
    for pattern in ALL_BUT_TWO:
        set_group_options(engine, pattern, frozen=None)
    train(engine, 1, first=6)
    now, _ = split_by_freezing(weights(engine), ep_size)
    assert not any(torch.equal(value, before[name]) for name, value in now.items())
    verify(engine)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_frozen_experts_stay_as_they_are(wrapper: str) -> None:
    for ep_size in (1, 2):
        run_on_ranks(2, freeze, wrapper, ep_size)


def test_frozen_experts_of_an_offloaded_optimizer() -> None:
    run_on_ranks(2, freeze, "zero2", 2, OFFLOADED)


def as_if_never_trained(wrapper: str) -> tuple[float, float]:
    """Frozen by us before the first step, beside parameters with gradients of zero.

    Those that require none are multiplied by another kernel, which may round another way.
    """

    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        for param in split_by_freezing(dict(model.named_parameters()), 2)[0].values():
            param.register_hook(torch.zeros_like)
        return create_moe_param_groups(model, split_by="expert")

    options: Any = {"model_options": {"ep_size": 2}, "lr_scheduler": moving_in(2)}
    ours = start(wrapper, groups_by("expert"), **options)
    for pattern in ALL_BUT_TWO:
        set_group_options(ours, pattern, frozen=True)
    history = train(ours, 3)
    kept = weights(ours)
    forget_process_groups()
    plain = start(wrapper, groups, **options)
    expected = train(plain, 3)
    assert history["loss"] == expected["loss"]
    away = [
        abs(one - other) / max(other, 1e-9)
        for one, other in zip(history["norm"], expected["norm"], strict=True)
    ]
    held, trained = split_by_freezing(weights(plain), 2)
    assert held
    return max(away), largest_difference(trained, split_by_freezing(kept, 2)[1])


@pytest.mark.numeric
@pytest.mark.parametrize("wrapper", ["zero1", "zero2_fp32_grads", "bf16", "fp32"])
def test_others_train_as_beside_parameters_with_gradients_of_zero(wrapper: str) -> None:
    for norms, difference in run_on_ranks(2, as_if_never_trained, wrapper):
        assert norms <= NORM_TOLERANCE
        assert difference <= CLIPPED_TOLERANCE


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step / 4)),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.7),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8),
}


def multiplied(wrapper: str, scheduler: str, ep_size: int) -> tuple[float, bool, list[float]]:
    """Expert 3 and the gates at half the rate, as an option and as groups of their own."""

    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        last = torch.distributed.get_rank() % ep_size == ep_size - 1
        number = 4 // ep_size - 1
        expert = 5e-3 if last else 1e-2
        overrides = [(f"*.expert.{number}", {"lr": expert}), ("*.gate.*", {"lr": 5e-3})]
        return create_moe_param_groups(model, split_by="expert", overrides=overrides)

    options = {"model_options": {"ep_size": ep_size}, "lr_scheduler": SCHEDULERS[scheduler]}
    plain = start(wrapper, groups, **options)  # type: ignore[arg-type]
    train(plain, 4)
    expected = weights(plain)
    forget_process_groups()

    def split(model: torch.nn.Module) -> list[dict[str, Any]]:
        return create_moe_param_groups(model, split_by="expert", overrides=[("*.gate.*", {})])

    ours = start(wrapper, split, **options)  # type: ignore[arg-type]
    set_group_options(ours, "*.moe.expert.3", lr_multiplier=0.5)
    set_group_options(ours, "*.gate.*", lr_multiplier=0.5)
    train(ours, 4)
    verify(ours)
    rates = [float(group["lr"]) for group in ours.optimizer.param_groups]
    followed = rates == [rates[0]] * len(rates)  # the scheduler saw nothing
    return largest_difference(expected, weights(ours)), followed, rates


@pytest.mark.numeric
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_multiplier_on_top_of_a_scheduler(scheduler: str) -> None:
    wrapper = {"lambda": "zero1", "exponential": "bf16", "cosine": "zero2"}[scheduler]
    for ep_size in (1, 2):
        for difference, followed, rates in run_on_ranks(2, multiplied, wrapper, scheduler, ep_size):
            assert followed, rates
            assert difference == 0


def absolute_values() -> list[float]:
    """``lr`` and ``weight_decay`` of one expert, under DeepSpeed's own scheduler."""
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}}
    engine = start("zero1", groups_by("expert"), scheduler=warmup)
    set_group_options(engine, "blocks.0.moe.expert.1", lr=2e-3, weight_decay=0.0)
    seen: list[tuple[float, float]] = []

    def look(optimizer: Any, *_: object) -> None:
        seen.extend((group["lr"], group["weight_decay"]) for group in optimizer.param_groups)

    engine.basic_optimizer.register_step_pre_hook(look)
    metrics = GroupMetrics(engine, interval=4)
    train(engine, 3)
    (scheduled,) = {group["lr"] for group in engine.optimizer.param_groups}
    train(engine, 1, first=3)
    report = metrics.step()
    assert report is not None
    last = seen[-len(engine.optimizer.param_groups) :]
    assert sorted(set(last)) == [(2e-3, 0.0), (scheduled, 0.01)]
    assert last.count((2e-3, 0.0)) == 1
    assert all(group["weight_decay"] == 0.01 for group in engine.optimizer.param_groups)
    experts = report.layers["blocks.0.moe"].experts
    return [stats.lr / scheduled if stats else 0.0 for stats in experts]


def test_absolute_values_hold_in_the_step_only() -> None:
    first, second, *others = run_on_ranks(2, absolute_values)[0]
    assert [first, *others] == pytest.approx([1.0] * 3)
    assert 0 < second < 0.9


def schedule(step: int) -> dict[str, Any]:
    return {"frozen": step in (2, 3), "lr_multiplier": 1.0 / (step + 1)}


def trained_with_schedule(wrapper: str, folder: str, steps: int, resume: bool) -> Any:
    engine = start(wrapper, groups_by("expert"), model_options={"ep_size": 2})
    made = GroupSchedule(engine, [("*.expert.3", schedule), ("*.expert.0", lambda _: {"lr": 1e-3})])
    if resume:
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
    for x, y in batches(steps - engine.global_steps, engine.global_steps):
        made.apply()
        engine.backward(engine(x.to(next(engine.module.parameters()).dtype), y))
        engine.step()
    if not resume:
        engine.save_checkpoint(folder)
    return weights(engine)


def resumed(wrapper: str, folder: str) -> float:
    whole = trained_with_schedule(wrapper, f"{folder}/whole", 5, False)
    forget_process_groups()
    trained_with_schedule(wrapper, folder, 3, False)
    forget_process_groups()
    return largest_difference(whole, trained_with_schedule(wrapper, folder, 5, True))


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_schedule_goes_on_after_a_checkpoint(wrapper: str, tmp_path: Path) -> None:
    assert run_on_ranks(2, resumed, wrapper, str(tmp_path)) == [0.0, 0.0]


def loaded_options(folder: str, first: bool) -> list[Any]:
    engine = start("zero1", groups_by("expert"), model_options={"ep_size": 2})
    if first:
        set_group_options(engine, "*.expert.3", frozen=True)
        set_group_options(engine, "blocks.0.moe.expert.0", lr_multiplier=0.25)
        train(engine, 2)
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    before = weights(engine)
    train(engine, 1, first=2)
    after = weights(engine)
    still = sorted(name for name in after if torch.equal(before[name], after[name]))
    norm = float(engine.get_global_grad_norm())
    options = [group.get("step_options") for group in engine.optimizer.param_groups]
    return [options, still, norm, {name: float(value.sum()) for name, value in after.items()}]


def test_options_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Frozen from the first step on: no optimizer state exists there."""
    first = run_on_ranks(2, loaded_options, str(tmp_path), True)
    again = run_on_ranks(2, loaded_options, str(tmp_path), False)
    assert first == again
    assert [len(rank[1]) for rank in first] == [0, 6]
    assert [sum(map(bool, rank[0])) for rank in first] == [1, 2]


def problems(split: str) -> list[str]:
    engine = start("zero1", groups_by(split), model_options={"ep_size": 2})
    calls: list[Callable[[], object]] = [
        lambda: set_group_options(engine, "*.expert.4", frozen=True),
        lambda: set_group_options(engine, "blocks.0.moe.expert.3", frozen=True),
        lambda: set_group_options(engine, "blocks.0.moe.*.gate.*", frozen=True),
        lambda: set_group_options(engine, "*", frozen=1),
        lambda: set_group_options(engine, "*", lr=-1.0),
        lambda: set_group_options(engine, "*", lr_multiplier=float("nan")),
        lambda: set_group_options(engine, "*", momentum=0.5),
        lambda: set_group_options(engine.module, "*", lr=0.5),
        lambda: GroupSchedule(engine, [("*", lambda step: {"rate": 1.0})]).apply(),
    ]
    found = []
    for call in calls:
        try:
            call()
            found.append("")
        except (InvalidArgumentError, OverrideError) as error:
            found.append(str(error))
    given = [group.get("step_options") for group in engine.optimizer.param_groups]
    return [*found, str([options for options in given if options])]


def test_refusals() -> None:
    for split in ("expert", "module"):
        ranks = run_on_ranks(2, problems, split)
        assert ranks[0][:9] == ranks[1][:9]
        nothing, part, gate, *others, given = ranks[1]
        assert gate.endswith("with an override of that pattern, or widen the pattern.")
        assert "'*.expert.4' selects no parameter" in nothing
        assert "blocks.0.moe.expert.0" in nothing
        if split == "expert":
            assert part == ""
            assert given == "[{'frozen': True}]"
            assert ranks[0][-1] == "[]"  # expert 3 is on the other rank
        else:
            assert part.startswith("rank 1: pattern 'blocks.0.moe.expert.3' selects a part of")
            assert "'ep_size_2_blocks.0.moe'" in part
            assert "make the groups with split_by='expert', or" in part
            assert given == "[]"
        for message, expected in zip(
            others,
            ("frozen=1 must be", "lr=-1.0", "lr_multiplier=nan", "'momentum'", "TinyMoE", "'rate'"),
            strict=True,
        ):
            assert expected in message
