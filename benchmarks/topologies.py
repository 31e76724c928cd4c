"""Do all topologies train the same, and what does it cost to watch them?

A model of 8 MoE blocks (4 experts, top-2, no token dropped, BF16_Optimizer) on 4 gloo ranks, with
the same weights and data in every topology: language-model loss (here a regression's), the
load-balancing losses and their sum, step by step, drawn in one plot. Then the time of a step
with a tracker that reports every 50 steps beside the same engine without it.

    python -m benchmarks.topologies [--steps 30] [--rounds 200]
"""

import argparse
import statistics
from typing import Any

from benchmarks.plots import curves
from benchmarks.report import write
from benchmarks.timing import milliseconds
from moe_groups import LossTracker
from tests.ranks import close_pools, forget_process_groups, run_in_fresh_processes
from tests.stage_models import COEFFICIENT, Run, start_run, train_run

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
    """The losses of each step, over all ranks."""
    forget_process_groups()
    engine = start_run(run)
    in_loss = run.plain or run.carry != "attach"
    tracker = LossTracker(engine, coefficient=COEFFICIENT, interval=1, in_loss=in_loss)
    reports = [tracker.step(train_run(engine, run, 1, first=step)[0]) for step in range(steps)]
    return [{what: getattr(report, what) for what in LOSSES} for report in reports]


def train_all(runs: list[Run], steps: int) -> list[list[dict[str, float]]]:
    return [train(run, steps) for run in runs]


def tracker_cost(rounds: int) -> dict[str, Any]:
    """Milliseconds of a step without and with a tracker, in turn."""
    engine = start_run(run := Run(pp=2, ep=TWO))
    train_run(engine, run, 3)
    plain, watched = [], []
    for _ in range(0, rounds, 50):
        plain += [milliseconds(lambda: train_run(engine, run, 1)) for _ in range(50)]
        tracker = LossTracker(engine, coefficient=COEFFICIENT, interval=50)

        def tracked(tracker: LossTracker = tracker) -> None:
            tracker.step(train_run(engine, run, 1)[0])

        watched += [milliseconds(tracked) for _ in range(50)]
        tracker.close()
    return {
        "step, ms": round(statistics.median(plain), 2),
        "watched, ms": round(statistics.median(watched), 2),
        "ratio of medians": round(statistics.median(watched) / statistics.median(plain), 3),
        "ratio of means": round(statistics.mean(watched) / statistics.mean(plain), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=200)
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
    cost = run_in_fresh_processes(WORLD, tracker_cost, given.rounds, timeout=1800)[0]
    write("loss_tracker", [cost])
    close_pools()


if __name__ == "__main__":
    main()
