"""What part of a step's time do the metrics of every layer and expert take?

Times all calls and hooks of a :class:`GroupMetrics` at its default interval, reports included, on 2
gloo ranks with EP=2: many small experts, for which metrics cost the most, and few larger ones. Then
draws a map of 64 experts over 32 layers.

    python -m benchmarks.group_metrics [--steps 100]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.report import RESULTS, write
from moe_groups import MoE
from moe_groups.metrics.group_metrics import GroupMetrics
from moe_groups.metrics.plot import write_expert_map
from tests.support.ranks import close_pools, forget_process_groups, run_in_fresh_processes
from tests.support.training import config, initialize, make_groups


class Size(NamedTuple):
    layers: int
    experts: int
    hidden: int
    split: str


SIZES = (
    Size(layers=8, experts=64, hidden=16, split="module"),
    Size(layers=4, experts=16, hidden=16, split="expert"),
    Size(layers=4, experts=8, hidden=128, split="module"),
)
WRAPPERS = {"ZeRO-2": "zero2", "BF16_Optimizer": "bf16"}


class Model(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_experts": size.experts, "ep_size": 2, "use_rts": False}
        self.layers = nn.ModuleList(
            MoE(size.hidden, nn.Linear(size.hidden, size.hidden), **options)
            for _ in range(size.layers)
        )
        self.out = nn.Linear(size.hidden, size.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: Any = 0.0
        for layer in self.layers:
            out, loss, _ = layer(x)
            x, total = x + out, total + loss
        whole: torch.Tensor = self.out(x).float().square().mean() + 0.01 * total
        return whole


class Timed(GroupMetrics):
    """Adds up the seconds of its own calls."""

    spent = 0.0

    def _time(self, function: Callable[..., Any], *args: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args)
        self.spent += time.perf_counter() - begin
        return result

    def _before(self, *args: Any) -> None:
        self._time(super()._before, *args)

    def _after(self, *args: Any) -> None:
        self._time(super()._after, *args)

    def step(self) -> Any:
        return self._time(super().step)


def train(engine: Any, metrics: Timed | None, size: Size, steps: int) -> float:
    """Train, and return the seconds."""
    begin = time.perf_counter()
    for step in range(steps):
        x = torch.randn(8, 16, size.hidden, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x.bfloat16()))
        engine.step()
        if metrics:
            metrics.step()
    return time.perf_counter() - begin


def measure(steps: int) -> list[dict[str, Any]]:
    rows = []
    for label, wrapper in WRAPPERS.items():
        for size in SIZES:
            forget_process_groups()
            model = Model(size)
            optimizer = torch.optim.AdamW(make_groups(model, size.split), fused=True)
            engine = initialize(model, optimizer, config(wrapper))
            train(engine, None, size, 5)
            metrics = Timed(engine)
            whole = train(engine, metrics, size, steps)
            reports = engine.global_steps // metrics.interval
            rows.append(
                {
                    "wrapper": label,
                    "model": f"{size.layers} layers of {size.experts} experts of {size.hidden}^2",
                    "groups": len(optimizer.param_groups),
                    "step, ms": round(1e3 * whole / steps, 1),
                    "of it metrics, ms": round(1e3 * metrics.spent / steps, 3),
                    "one report, ms": round(1e3 * metrics.spent / reports, 1),
                    "part": f"{metrics.spent / whole:.2%}",
                }
            )
    return rows


def experts(steps: int) -> Any:
    """The report after a few steps of 32 layers of 64 experts."""
    model = Model(Size(layers=32, experts=64, hidden=16, split="module"))
    optimizer = torch.optim.AdamW(make_groups(model, "module"), fused=True)
    engine = initialize(model, optimizer, config("zero2"))
    metrics = GroupMetrics(engine, interval=steps)
    train(engine, None, Size(32, 64, 16, "module"), steps)
    return metrics.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args().steps
    rows = run_in_fresh_processes(2, measure, steps, timeout=1800)[0]
    write("group_metrics", rows)
    report = run_in_fresh_processes(2, experts, 5, timeout=1800)[0]
    write_expert_map(report, RESULTS / "expert_map.png", "grad_norm")
    close_pools()


if __name__ == "__main__":
    main()
