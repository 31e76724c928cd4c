"""Do all topologies train the same, and what does a loss tracker cost?

A model of 8 MoE blocks (4 experts, top-2, no token dropped, BF16_Optimizer) on 4 gloo ranks, with
the same weights and data in every topology. One plot shows for each step the language-model loss
(here a regression's), the load-balancing losses and their sum. Then the part of a step's time
that a tracker takes which reports every 50 steps.

    python -m benchmarks.topologies [--steps 30] [--tracked 200]
"""

import argparse
import time
from typing import Any

from benchmarks.plots import curves
from benchmarks.report import write
from moe_groups import LossTracker
from moe_groups.losses import BalanceReport
from tests.support.ranks import close_pools, forget_process_groups, run_in_fresh_processes
from tests.support.stage_models import COEFFICIENT, Run, start_run, train_run

WORLD = 4
TWO = (2,) * 8
TOPOLOGIES = {
    "no pipeline, DP 4": Run(plain=True),
    "PP 2": Run(pp=2),
    "PP 2, attached": Run(pp=2, carry="attach"),
    "TP 2": Run(tp=2),
    "EP 2": Run(ep=TWO),
    "PP 2, EP 2": Run(pp=2, ep=TWO),
    "TP 2, EP 2": Run(tp=2, ep=TWO),
    "PP 2, TP 2": Run(pp=2, tp=2),
    "PP 2, TP 2, EP 2, attached": Run(pp=2, tp=2, ep=TWO, carry="attach"),
}
LOSSES = ("total", "lm", "aux")


def train(run: Run, steps: int) -> list[dict[str, float]]:
    """Train, and return the losses of each step over all ranks."""
    forget_process_groups()
    engine = start_run(run)
    in_loss = run.plain or run.carry != "attach"
    tracker = LossTracker(engine, coefficient=COEFFICIENT, interval=1, in_loss=in_loss)
    reports = [tracker.step(train_run(engine, run, 1, first=step)[0]) for step in range(steps)]
    return [{what: getattr(report, what) for what in LOSSES} for report in reports]


def train_all(runs: list[Run], steps: int) -> list[list[dict[str, float]]]:
    return [train(run, steps) for run in runs]


class Timed(LossTracker):
    """Adds up the seconds of its own calls, reports included."""

    spent = 0.0

    def _record(self, *args: Any) -> None:
        begin = time.perf_counter()
        super()._record(*args)
        self.spent += time.perf_counter() - begin

    def step(self, *args: Any, **kwargs: Any) -> BalanceReport | None:
        begin = time.perf_counter()
        report = super().step(*args, **kwargs)
        self.spent += time.perf_counter() - begin
        return report


def tracker_cost(steps: int) -> dict[str, Any]:
    """The part of a step's time that the tracker takes; on a CPU the clock sees all of it."""
    engine = start_run(run := Run(pp=2, ep=TWO))
    train_run(engine, run, 3)
    tracker = Timed(engine, coefficient=COEFFICIENT, interval=50)
    begin = time.perf_counter()
    for _ in range(steps):
        tracker.step(train_run(engine, run, 1)[0])
    whole = time.perf_counter() - begin
    return {
        "steps": steps,
        "step, ms": round(1e3 * whole / steps, 1),
        "of it tracker, ms": round(1e3 * tracker.spent / steps, 2),
        "part": f"{tracker.spent / whole:.2%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tracked", type=int, default=200)
    given = parser.parse_args()
    runs = list(TOPOLOGIES.values())
    histories = run_in_fresh_processes(WORLD, train_all, runs, given.steps, timeout=1800)[0]
    reference, rows = histories[0], []
    for name, history in zip(TOPOLOGIES, histories, strict=True):
        away = {
            f"{what}, most away": max(
                abs(one[what] / other[what] - 1)
                for one, other in zip(history, reference, strict=True)
            )
            for what in LOSSES
        }
        last = {f"{what} at the end": round(history[-1][what], 4) for what in LOSSES}
        rows.append({"topology": name, **last, **{k: f"{v:.2%}" for k, v in away.items()}})
    write("topologies", rows)
    curves(
        "topologies",
        {
            what: {
                name: [step[what] for step in history]
                for name, history in zip(TOPOLOGIES, histories, strict=True)
            }
            for what in LOSSES
        },
        "The same model under 9 topologies",
        "optimizer step",
    )
    cost = run_in_fresh_processes(WORLD, tracker_cost, given.tracked, timeout=1800)[0]
    write("loss_tracker", [cost])
    close_pools()


if __name__ == "__main__":
    main()
