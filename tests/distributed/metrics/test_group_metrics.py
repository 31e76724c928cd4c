"""The numbers of layers and experts beside those of whole gradients and weights."""

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from moe_groups import ExpertTag, MoE, set_expert_tag
from moe_groups.errors import InvalidArgumentError
from moe_groups.metrics.group_metrics import GroupMetrics
from moe_groups.metrics.report import GroupStats, MetricsReport
from tests.support.models import FFN, HIDDEN
from tests.support.old_deepspeed import WRONG_NORM, known_before
from tests.support.ranks import forget_process_groups, run_in_fresh_processes, run_on_ranks
from tests.support.stage_models import Run, start_run, train_run
from tests.support.training import (
    batches,
    config,
    groups_by,
    initialize,
    largest_difference,
    make_groups,
    start,
    train,
    weights,
)

WORLD = 4
_EXPERT = re.compile(r"(blocks\.\d\.moe)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d)\..*")

Key = tuple[str, int | None]
"""A layer and its expert, or a block of dense parameters and None."""


def key_of(name: str, ep_size: int, num_experts: int = 4) -> Key:
    """Written anew from the names of the test's model."""
    if match := _EXPERT.fullmatch(name):
        own = num_experts // ep_size
        return match[1], torch.distributed.get_rank() % ep_size * own + int(match[2])
    parts = name.split(".")
    return (".".join(parts[:2]) if parts[0] == "blocks" else parts[0]), None


def squares(tensors: dict[str, torch.Tensor], ep_size: int) -> dict[Key, float]:
    """Sums of squares by key, over all ranks, each parameter once."""
    own: dict[str, tuple[Key, float]] = {}
    for name, tensor in tensors.items():
        key = key_of(name, ep_size)
        own[f"{key} {name}"] = key, float(tensor.double().square().sum())
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own)
    sums: dict[Key, float] = {}
    for key, value in {name: item for some in everywhere for name, item in some.items()}.values():
        sums[key] = sums.get(key, 0.0) + value
    return sums


def found_in(report: MetricsReport) -> dict[Key, GroupStats]:
    found: dict[Key, GroupStats] = {(block, None): it for block, it in report.dense.items()}
    for label, layer in report.layers.items():
        for number, stats in enumerate(layer.experts):
            if stats is not None:
                found[label, number] = stats
    return found


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        grad = param.grad if engine.optimizer is engine.basic_optimizer else None
        grad = safe_get_full_grad(param) if grad is None else grad
        if grad is not None:
            found[name] = grad.detach().float().clone()
    return found


def steps(engine: Any, count: int, first: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Runs optimizer steps; gives the gradients of each before it."""
    dtype = next(engine.module.parameters()).dtype
    micro = engine.gradient_accumulation_steps()
    for number, (x, y) in enumerate(batches(count * micro, first)):
        engine.backward(engine(x.to(dtype), y.to(dtype)))
        last = (number + 1) % micro == 0
        if last:
            yield gradients(engine)
        else:
            engine.step()


OFFLOADED: dict[str, Any] = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero_force_ds_cpu_optimizer": False,
}


def compare(
    wrapper: str,
    split: str,
    ep_size: int,
    micro: int,
    cap: int | None = None,
    changes: dict[str, Any] | None = None,
) -> list[MetricsReport]:
    engine = start(
        wrapper,
        groups_by(split, cap),
        model_options={"ep_size": ep_size},
        gradient_accumulation_steps=micro,
        **(changes or {}),
    )
    metrics = GroupMetrics(engine, interval=2)
    reports = []
    for number, grads in enumerate(steps(engine, 4), 1):
        before = weights(engine)
        engine.step()
        report = metrics.step()
        assert (report is None) == (number % 2 == 1)
        assert metrics.step() is None
        if report is None:
            continue
        after = weights(engine)
        updates = {name: after[name] - before[name] for name in after}
        found = found_in(report)
        for attribute, tensors in (
            ("grad_norm", grads),
            ("param_norm", after),
            ("update_norm", updates),
        ):
            expected = squares(tensors, ep_size)
            assert set(expected) == set(found)
            for key, stats in found.items():
                value = getattr(stats, attribute)
                assert value == pytest.approx(expected[key] ** 0.5, rel=2e-5), (attribute, key)
            whole = getattr(report.total, attribute)
            assert whole == pytest.approx(sum(expected.values()) ** 0.5, rel=2e-5)
        norm = engine.get_global_grad_norm()
        if norm is not None:
            assert report.total.grad_norm == pytest.approx(float(norm), rel=1e-5)
            assert float(norm) > 0.05  # it is clipped
        assert all(stats.lr == pytest.approx(1e-2) for stats in found.values())
        reports.append(report)
    metrics.close()
    assert "clip_fp32_gradients" not in vars(engine)
    return reports


@pytest.mark.numeric
@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "zero2_fp32_grads", "bf16", "fp32"])
def test_norms_are_those_of_whole_gradients(wrapper: str, ep_size: int) -> None:
    shown = "safe_get_full_grad shows gradients of BF16_Optimizer that are not reduced"
    for split, micro in (("expert", 1), ("parallel_group", 2)):
        with known_before("0.19", shown):
            ranks = run_on_ranks(2, compare, wrapper, split, ep_size, micro)
        assert ranks[0] == ranks[1]
        assert len(ranks[0]) == 2


@pytest.mark.long
def test_experts_shared_by_ranks_of_both_kinds() -> None:
    """2 expert-parallel times 2 expert-data-parallel ranks, groups cut into small tiles."""
    ranks = run_on_ranks(4, compare, "zero2", "expert", 2, 1, 300)
    assert ranks == [ranks[0]] * 4


def test_offloaded_optimizer() -> None:
    ranks = run_on_ranks(2, compare, "zero2", "module", 2, 2, changes=OFFLOADED)
    assert ranks == [ranks[0]] * 2


TWO = (2,) * 8


def staged(runs: list[Run], steps: int) -> list[list[MetricsReport]]:
    found = []
    for run in runs:
        forget_process_groups()
        engine = start_run(run)
        metrics = GroupMetrics(engine, interval=1)
        reports = []
        for step in range(steps):
            train_run(engine, run, 1, first=step)
            report, norm = metrics.step(), engine.get_global_grad_norm()
            assert report is not None
            assert report.total.grad_norm == pytest.approx(float(norm), rel=1e-5)
            parts = [*report.dense.values(), *(one.total for one in report.layers.values())]
            whole = sum(part.grad_norm**2 for part in parts) ** 0.5
            assert whole == pytest.approx(report.total.grad_norm)
            reports.append(report)
        found.append(reports)
    return found


@pytest.mark.long
def test_stages_and_tensor_ranks() -> None:
    runs = [
        Run(plain=True, ep=TWO),
        Run(pp=2, ep=TWO),
        Run(pp=2, ep=TWO, carry="attach", tied=True),
        Run(tp=2, ep=TWO),
        Run(pp=2, tp=2, ep=TWO),
        Run(tp=2, ep=TWO, wrapper="zero1", expert_tp=True),
    ]
    ranks = run_in_fresh_processes(WORLD, staged, runs, 2, timeout=400)
    assert all(found == ranks[0] for found in ranks)
    (reference, _), *others = ranks[0]
    assert list(reference.layers) == [f"block{n}" for n in range(8)]
    for run, (report, _) in zip(runs[1:], others, strict=True):
        assert list(report.layers) == list(reference.layers)
        if run.tied:
            assert report.total.elements == reference.total.elements - HIDDEN * (HIDDEN + 2)
            continue
        assert report.total.elements == reference.total.elements
        for label, layer in report.layers.items():
            whole = reference.layers[label]
            assert layer.total.grad_norm == pytest.approx(whole.total.grad_norm, rel=0.03)
            near = 0.05 * whole.total.grad_norm  # rounding sends a token to another expert
            for stats, expected in zip(layer.experts, whole.experts, strict=True):
                assert stats is not None
                assert expected is not None
                assert stats.elements == expected.elements
                assert stats.param_norm == pytest.approx(expected.param_norm, rel=0.01)
                assert stats.grad_norm == pytest.approx(expected.grad_norm, abs=near)


class Skips(nn.Module):
    """Expert 1 is frozen, the last one is never asked; experts as tensors of the test's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE(HIDDEN, FFN(), num_experts=4, ep_size=2, drop_tokens=False, use_rts=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))
        for expert in self.experts:
            expert.weight.allreduce = False  # type: ignore[union-attr]
            expert.weight.group_name = "ep_size_2"  # type: ignore[union-attr]
        self.experts[1].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, aux, _ = self.moe(self.inp(x))
        asked = 2 if torch.distributed.get_rank() else 1
        for expert in self.experts[:asked]:
            h = h + expert(h)
        loss: torch.Tensor = h.float().square().mean() + 0.01 * aux
        return loss


def skipping(wrapper: str) -> MetricsReport:
    model = Skips()
    optimizer = torch.optim.AdamW(make_groups(model, "expert"), lr=1e-3)
    engine = initialize(model, optimizer, config(wrapper))
    metrics = GroupMetrics(engine, interval=1)
    dtype = next(model.parameters()).dtype
    for _ in range(2):
        engine.backward(engine(torch.randn(4, 6, HIDDEN).to(dtype)))
        engine.step()
        report = metrics.step()
    assert report is not None
    norm = engine.get_global_grad_norm()
    if norm is not None:
        assert report.total.grad_norm == pytest.approx(float(norm), rel=1e-5)
    return report


@pytest.mark.parametrize("wrapper", ["zero2", "bf16", "fp32"])
def test_experts_without_a_gradient(wrapper: str) -> None:
    with known_before("0.19", WRONG_NORM):
        first, other = run_on_ranks(2, skipping, wrapper)
        assert first == other
    experts = first.layers["experts"].experts
    assert [stats is None for stats in experts] == [False, True, False] * 2
    assert [bool(stats and stats.grad_norm) for stats in experts] == [True, False, False] * 2
    for stats in experts:
        assert stats is None or (stats.elements == HIDDEN**2 and stats.param_norm > 0)


class Fused(nn.Module):
    """Two experts on each rank in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(torch.distributed.get_rank())
        self.moe = MoE(HIDDEN, FFN(), num_experts=2, ep_size=2, drop_tokens=False, use_rts=False)
        self.up = nn.Parameter(torch.randn(2, HIDDEN, HIDDEN) * 0.1)
        set_expert_tag(self.up, ExpertTag("ep_size_2", "fused", None, None, True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, aux, _ = self.moe(x)
        loss: torch.Tensor = (h @ self.up[0] @ self.up[1]).float().square().mean() + 0.01 * aux
        return loss


def fused() -> list[list[float]]:
    """Parameter norms as reported, and as the rank's own tensors have them."""
    model = Fused()
    optimizer = torch.optim.AdamW(make_groups(model, "expert"), lr=1e-3)
    engine = initialize(model, optimizer, config("zero2"))
    metrics = GroupMetrics(engine, interval=1)
    engine.backward(engine(torch.randn(4, 6, HIDDEN).bfloat16()))
    engine.step()
    report = metrics.step()
    assert report is not None
    own = weights(engine)["up"].flatten(1).norm(dim=1)
    reported = [stats.param_norm for stats in report.layers["fused"].experts if stats]
    return [reported, own.tolist()]


def test_experts_in_one_tensor() -> None:
    (first, own), (other, others) = run_on_ranks(2, fused)
    assert first == other == pytest.approx([*own, *others], rel=1e-5)


def monitored(folder: Path) -> list[dict[str, float]]:
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
    engine = start("zero1", groups_by("module"), model_options={"ep_size": 2}, csv_monitor=monitor)
    metrics = GroupMetrics(engine, interval=2, per_expert=True, update_ratio=False)
    found = []
    reduce = torch.distributed.all_reduce
    for grads in steps(engine, 4):
        assert grads
        engine.step()
        with mock.patch.object(torch.distributed, "all_reduce", wraps=reduce) as calls:
            report = metrics.step()
        assert calls.call_count == (report is not None)
        if report is not None:
            found.append(report.as_dict(per_expert=True))
    metrics.close()
    assert not engine.basic_optimizer._optimizer_step_pre_hooks
    for _ in steps(engine, 2, first=4):
        engine.step()
        assert metrics.step() is None
    return found


def test_monitor_gets_each_expert(tmp_path: Path) -> None:
    first, other = run_on_ranks(2, monitored, tmp_path)
    assert first == other
    assert not any(key.startswith("update_ratio") for key in first[0])
    for key in ("lr/dense/inp", "grad_norm/total", "param_norm/moe/blocks.1.moe/expert_3"):
        (path,) = tmp_path.rglob(f"Train_{key.replace('/', '_')}.csv")
        rows = list(csv.reader(path.open()))[1:]
        assert [int(row[0]) for row in rows] == [2, 4]
        assert [float(row[1]) for row in rows] == [step[key] for step in first]


def trains_alike(wrapper: str) -> float:
    """Watched, and not."""
    found = []
    for watched in (True, False):
        forget_process_groups()
        engine = start(wrapper, groups_by("expert"), model_options={"ep_size": 2})
        metrics = GroupMetrics(engine, interval=1) if watched else None
        for _ in range(3):
            train(engine, 1, first=engine.global_steps)
            assert metrics is None or metrics.step() is not None
        found.append(weights(engine))
    return largest_difference(*found)


@pytest.mark.parametrize("wrapper", ["zero2", "bf16", "fp32"])
def test_watching_changes_nothing(wrapper: str) -> None:
    assert run_on_ranks(2, trains_alike, wrapper) == [0.0, 0.0]


def refused() -> list[str]:
    found = []
    engine = start("half_unfused", groups_by("expert"))
    for arguments in ((engine,), (engine.module,), (start("zero1", groups_by("expert")), 0)):
        with pytest.raises(InvalidArgumentError) as error:
            GroupMetrics(arguments[0], interval=(*arguments, 50)[1])
        found.append(str(error.value))
    return found


def test_refusals() -> None:
    wrapper, module, interval = run_on_ranks(2, refused)[0]
    assert "not with FP16_UnfusedOptimizer" in wrapper
    assert "engine=<TinyMoE> must be an engine" in module
    assert "interval=0 must be an integer of at least 1" in interval
