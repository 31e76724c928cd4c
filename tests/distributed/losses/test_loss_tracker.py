"""The tracker's figures beside those of the layers themselves, under every topology."""

import csv
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from moe_groups import LossTracker, MoE
from moe_groups.errors import InvalidArgumentError
from tests.support.models import FFN, HIDDEN
from tests.support.ranks import forget_process_groups, run_in_fresh_processes, run_on_ranks
from tests.support.stage_models import COEFFICIENT, Run, start_run, train_run
from tests.support.training import config, initialize, make_groups

WORLD = 4
TWO = (2,) * 8


def tracked(runs: list[Run], steps: int) -> list[list[Any]]:
    """Reports of each step: total, lm, aux, and by layer its loss, imbalance and drops."""
    found = []
    for run in runs:
        forget_process_groups()
        engine = start_run(run)
        in_loss = run.carry != "attach" or run.plain
        tracker = LossTracker(engine, coefficient=COEFFICIENT, interval=1, in_loss=in_loss)
        reports = []
        for step in range(steps):
            with mock.patch.object(
                torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce
            ) as calls:
                (loss,) = train_run(engine, run, 1, first=step)
                before = calls.call_count
                report = tracker.step(loss)
                assert calls.call_count == before + 1
            assert report is not None
            given = report.total if in_loss else report.lm
            assert given == pytest.approx(loss, rel=1e-3)
            reports.append(report)
        found.append(reports)
    return found


@pytest.mark.long
def test_topologies_report_the_same() -> None:
    runs = [
        Run(plain=True, ep=TWO),
        Run(pp=2, ep=TWO),
        Run(pp=2, ep=TWO, carry="attach"),
        Run(pp=2, tp=2, ep=TWO),
        Run(pp=2, ep=TWO, carry="attach", checkpoint=1),
        Run(pp=2, ep=TWO, carry="attach", checkpoint=1, reentrant=False),
    ]
    ranks = run_in_fresh_processes(WORLD, tracked, runs, 3)
    assert all(found == ranks[0] for found in ranks)
    reference, *others = ranks[0]
    assert [*reference[0].layers] == [f"block{n}" for n in range(8)]
    assert reference[0].aux > 0.2
    for found in others:
        for report, expected in zip(found, reference, strict=True):
            assert [*report.layers] == [*expected.layers]
            for what in ("total", "lm", "aux"):
                assert getattr(report, what) == pytest.approx(getattr(expected, what), rel=0.02)
            for name, layer in report.layers.items():
                assert layer.loss == pytest.approx(expected.layers[name].loss, rel=0.05)
                assert layer.shares == pytest.approx(expected.layers[name].shares, abs=0.02)


class Drops(nn.Module):
    """A layer whose experts have room for a part of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp = nn.Linear(HIDDEN, HIDDEN)
        options = {"k": 1, "capacity_factor": 0.5, "min_capacity": 1, "use_rts": False}
        self.moe = MoE(HIDDEN, FFN(), num_experts=4, ep_size=2, **options)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, aux, self.counts = self.moe(self.inp(x))
        loss: torch.Tensor = y.float().square().mean() + 0.01 * aux
        return loss


def drops(folder: Path) -> list[Any]:
    reports: list[Any] = []
    model = Drops()
    optimizer = torch.optim.AdamW(make_groups(model, "expert"), lr=1e-3)
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "run"}
    engine = initialize(model, optimizer, config("zero2", csv_monitor=monitor))
    tracker = LossTracker(engine, coefficient=0.01, interval=2, per_expert=True)
    counts, dropped, losses = torch.zeros(4), 0, []
    for step in range(4):
        generator = torch.Generator().manual_seed(100 * step + torch.distributed.get_rank())
        x = torch.randn(4, 8, HIDDEN, generator=generator).bfloat16()
        loss = engine(x)
        own = engine.module.counts
        counts += own
        dropped += int((own - 4).clamp(min=0).sum())  # 0.5 * 32 tokens / 4 experts
        losses.append(float(loss.detach()))
        engine.backward(loss)
        engine.step()
        engine.eval()
        engine(x)  # is not counted
        engine.train()
        reports.append(tracker.step(loss))
        if step % 2 == 0:
            assert reports[-1] is None
        else:
            both = torch.cat([counts, torch.tensor([dropped, sum(losses)])])
            torch.distributed.all_reduce(both)
            assert reports[-1] is not None
            layer = reports[-1].layers["moe"]
            total = float(both[:4].sum())
            assert layer.shares == pytest.approx((both[:4] / total).tolist())
            assert layer.dropped == pytest.approx(float(both[4]) / total)
            assert layer.imbalance == pytest.approx(float(both[:4].max()) / total * 4)
            assert reports[-1].total == pytest.approx(float(both[5]) / 4)
            counts, dropped, losses = torch.zeros(4), 0, []
    tracker.close()
    return [reports[1].as_dict(per_expert=True), reports[3].as_dict(per_expert=True)]


def test_drops_loads_and_monitor(tmp_path: Path) -> None:
    first, other = run_on_ranks(2, drops, tmp_path)
    assert first == other
    for key, (one, two) in {
        "loss_lm": (first[0]["loss/lm"], first[1]["loss/lm"]),
        "dropped_moe": (first[0]["dropped/moe"], first[1]["dropped/moe"]),
        "share_moe_expert_3": (first[0]["share/moe/expert_3"], first[1]["share/moe/expert_3"]),
    }.items():
        (path,) = tmp_path.rglob(f"*{key}.csv")
        rows = list(csv.reader(path.open()))[1:]
        assert [int(row[0]) for row in rows] == [2, 4]
        assert [float(row[1]) for row in rows] == pytest.approx([one, two])
    assert 0 < first[0]["dropped/moe"] < 1


def engine_around(model: nn.Module) -> Any:
    """Has what the tracker looks at."""
    engine = mock.Mock(spec=DeepSpeedEngine, module=model, device="cpu", global_steps=1)
    engine.monitor = mock.Mock(enabled=False)
    return engine


def refusals() -> list[str]:
    found = []
    for interval in (1, 0):
        engine = engine_around(nn.Linear(2, 2))
        with pytest.raises(InvalidArgumentError) as error:
            LossTracker(engine, coefficient=1, interval=interval)
        found.append(str(error.value))
    return found


def test_refusals() -> None:
    none, interval = run_on_ranks(2, refusals)[0]
    assert "no MoE layer" in none
    assert "interval=0 must be an integer of at least 1" in interval


def own_router() -> Any:
    engine = engine_around(nn.Linear(2, 2))
    tracker = LossTracker(engine, coefficient=0.1, interval=1, experts={"router": 3})
    rank = torch.distributed.get_rank()
    loss, counts = torch.tensor([1.0 + rank]), torch.tensor([rank, 2, 1])
    tracker.record("router", loss, counts, dropped=rank)
    with engine.module.eval() and torch.no_grad():
        tracker.record("router", loss, counts)
    engine.module.train()
    for wrong in (("other", loss, counts), ("router", torch.ones(2), counts)):
        with pytest.raises(InvalidArgumentError, match=r"no layer 'other'|shape \(2,\)"):
            tracker.record(*wrong)
    with pytest.raises(InvalidArgumentError, match="2 counts for the 3 experts of 'router'"):
        tracker.record("router", loss, counts[:2])
    report = tracker.step(torch.tensor([5.0]))
    assert tracker.step(5.0) is None, "twice in a step"
    return report


class OneLabel(nn.Module):
    """Of a pipeline, with the same label on both stages."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(HIDDEN, FFN(), num_experts=2, expert_group_name="moe")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.moe(x)[0]
        return y


def one_label_on_two_stages() -> str:
    model = PipelineModule([LayerSpec(OneLabel), LayerSpec(OneLabel)], num_stages=2)
    engine = engine_around(model)
    with pytest.raises(InvalidArgumentError) as error:
        LossTracker(engine, coefficient=1)
    return str(error.value)


def test_one_label_on_two_stages_is_refused() -> None:
    for text in run_on_ranks(2, one_label_on_two_stages):
        assert "rank 1: two MoE layers are called 'moe'" in text


def test_any_router() -> None:
    report = run_on_ranks(2, own_router)[0]
    layer = report.layers["router"]
    assert layer.loss == pytest.approx(1.5)
    assert layer.shares == pytest.approx((1 / 7, 4 / 7, 2 / 7))
    assert layer.dropped == pytest.approx(1 / 7)
    assert (report.total, report.aux) == pytest.approx((5.0, 0.15))
