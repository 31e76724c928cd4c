"""What does a bias in the choice of experts do to their loads?

The demo's model (``docs/examples/train_moe_lm.py``: DeepSpeed's gate, top-2 of 8 experts with a
capacity of 1.25) on 2 gloo ranks, trained on the demo's text, the source of Python's library, with
three seeds: without any balancing, with the demo's load-balancing loss, and with
``balance_experts`` in place of the loss. One picture shows the imbalance of each step in the worse
of two layers; the table has means of the last 50 steps.

    python -m benchmarks.expert_balance [--steps 200]
"""

import argparse
import shutil
import statistics
from typing import Any, NamedTuple

import torch

from benchmarks.demo_memory import demo_arguments
from benchmarks.plots import bands
from benchmarks.report import RESULTS, write
from tests.support import ROOT
from tests.support.ranks import close_pools, forget_process_groups, run_in_fresh_processes

SEEDS = (0, 1, 2)
LAST = 50
WINDOW = 10


class Way(NamedTuple):
    """How loads are balanced: the rate of ``balance_experts``, or the coefficient of the loss."""

    rate: float = 0.0
    coefficient: float = 0.0


WAYS = {
    "nothing": Way(),
    "auxiliary loss, coefficient 0.01": Way(coefficient=0.01),
    "bias, rate 0.001": Way(rate=1e-3),
    "bias, rate 0.01": Way(rate=1e-2),
    "bias, rate 0.1": Way(rate=1e-1),
}


def train(seed: int, way: Way, steps: int) -> dict[str, list[float]]:
    """By name a number of each step: imbalance, language-model loss, share of dropped tokens."""
    args = demo_arguments()
    import deepspeed
    import train_moe_lm as demo

    from moe_groups import LossTracker, balance_experts

    deepspeed.utils.logger.setLevel("ERROR")
    forget_process_groups()
    torch.manual_seed(100 * seed + torch.distributed.get_rank())
    model = demo.LanguageModel(args)
    groups = demo.make_groups(args, model, args.split_by, args.max_group_size)
    engine = demo.start_engine(args, model, groups)
    if way.rate:
        balance_experts(engine, way.rate)
    tracker = LossTracker(engine, interval=1)
    data = demo.batches(args)
    for _ in range(seed * steps):
        next(data)
    found: dict[str, list[float]] = {"imbalance": [], "loss": [], "dropped": []}
    for _ in range(steps):
        loss, aux_loss = engine(next(data))
        engine.backward(loss + way.coefficient * aux_loss)
        engine.step()
        report = tracker.step(loss.detach())
        assert report is not None
        values = report.as_dict()
        found["loss"].append(report.total)
        for name in ("imbalance", "dropped"):
            found[name].append(values[f"moe/{name}"])
    return found


def train_all(steps: int) -> list[list[dict[str, list[float]]]]:
    """The runs of each way, one for each seed."""
    return [[train(seed, way, steps) for seed in SEEDS] for way in WAYS.values()]


def end(run: dict[str, list[float]], name: str) -> float:
    """Mean of the last steps."""
    return statistics.fmean(run[name][-LAST:])


def row(way: str, runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    """The last steps: mean over the seeds, and the lowest and the highest."""
    cells: dict[str, Any] = {"balanced by": way}
    for name, form in (("imbalance", ".2f"), ("dropped", ".1%"), ("loss", ".3f")):
        ends = [end(run, name) for run in runs]
        low, mean, high = (format(f(ends), form) for f in (min, statistics.fmean, max))
        cells[name] = f"{mean} ({low} to {high})"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    every = run_in_fresh_processes(2, train_all, steps, timeout=3600)[0]
    ways = dict(zip(WAYS, every, strict=True))
    write("expert_balance", [row(way, runs) for way, runs in ways.items()])
    ends = {way: statistics.fmean(end(run, "loss") for run in runs) for way, runs in ways.items()}
    bands(
        "expert_balance",
        {
            f"{way} (language-model loss {ends[way]:.3f})": [run["imbalance"] for run in runs]
            for way, runs in ways.items()
        },
        "The demo's model: load of the busiest expert in the worse of two layers, three seeds",
        ("optimizer step", f"load / mean load (mean of {WINDOW} steps)"),
        WINDOW,
    )
    shutil.copy(RESULTS / "expert_balance.png", ROOT / "docs" / "assets")
    close_pools()


if __name__ == "__main__":
    main()
