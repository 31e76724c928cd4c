"""What does a step cost with 1 to 1,000 groups of one constant total size?

The same dense parameters in more and more groups on 2 gloo ranks:
milliseconds of a step, and for compact gradients and the lean step the ratio to DeepSpeed alone
with the same number of groups; both engines step in turn.

    python -m benchmarks.group_count_cost [--steps 7]
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.plots import lines
from benchmarks.report import write
from benchmarks.timing import milliseconds
from moe_groups import StepConfig, compact_gradients, create_moe_param_groups, lean_step
from tests.support.ranks import close_pools, run_in_fresh_processes
from tests.support.step_runs import Case, deepspeed_config
from tests.support.training import initialize

COUNTS = (1, 4, 10, 50, 100, 250, 1000)  # divisors of the last
ELEMENTS = 6_000_000
BF16 = StepConfig(optimizer="fused", zero_stage=1, grad_accum_dtype="fp32")
STEPS = {
    "ZeRO-2": StepConfig(optimizer="fused"),
    "ZeRO-2, compact": StepConfig(optimizer="fused", compact_gradients=True),
    "ZeRO-2, lean": StepConfig(optimizer="fused", lean_step="64MiB"),
    "ZeRO-2, lean, small tiles": StepConfig(optimizer="fused", lean_step="768KiB"),
    "BF16_Optimizer": BF16,
    "BF16_Optimizer, lean": replace(BF16, lean_step="64MiB"),
}
"""A small tile has 65,536 elements."""


class Weights(torch.nn.Module):
    """As many parameters as the largest number of groups, so that only the grouping differs."""

    def __init__(self) -> None:
        super().__init__()
        device = get_accelerator().current_device_name()
        size = ELEMENTS // COUNTS[-1]
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device=device))
            for _ in range(COUNTS[-1])
        )

    def forward(self) -> torch.Tensor:
        total: torch.Tensor = torch.stack([weight.sum() for weight in self.weights]).float().sum()
        return total


def engine(step: StepConfig, count: int) -> Any:
    model = Weights()
    cap = ELEMENTS // count
    groups = create_moe_param_groups(model, split_by="parallel_group", max_group_size=cap)
    assert len(groups) == count
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    made = initialize(model, optimizer, deepspeed_config(Case(step)))
    if step.lean_step:
        lean_step(made, step.lean_step)
    elif step.compact_gradients:
        compact_gradients(made)
    return made


def timed_step(made: Any) -> float:
    made.backward(made())
    return milliseconds(made.step)


def measure(step: StepConfig, count: int, steps: int) -> tuple[float, float]:
    """Median milliseconds of a step, and the median ratio to DeepSpeed's alone."""
    pair = [engine(step, count)]
    if (plain := replace(step, compact_gradients=False, lean_step=None)) != step:
        pair.append(engine(plain, count))
    times = [[timed_step(made) for made in pair] for _ in range(steps + 2)][2:]
    median = statistics.median(both[0] for both in times)
    return median, statistics.median(both[0] / both[-1] for both in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7)
    steps = parser.parse_args().steps
    rows = []
    curves: dict[str, list[tuple[float, float]]] = {label: [] for label in STEPS}
    for count in COUNTS:
        row: dict[str, Any] = {"groups": count}
        for label, step in STEPS.items():
            results = run_in_fresh_processes(2, measure, step, count, steps, timeout=1800)
            median, ratio = results[0]
            row[f"{label}, ms"] = round(median, 1)
            if step.compact_gradients or step.lean_step:
                row[f"{label} / plain"] = round(ratio, 2)
            curves[label].append((count, median))
        rows.append(row)
    close_pools()
    write("group_count_cost", rows)
    lines(
        "group_count_cost",
        {f"{ELEMENTS:,} elements, 2 ranks": curves},
        "Time of a step",
        ("groups", "ms"),
        base=10,
    )


if __name__ == "__main__":
    main()
