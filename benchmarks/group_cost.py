"""What does one more group cost: seconds of start-up and milliseconds of each step?

Trains the same model with more and more groups on 2 gloo ranks and reports the slope between
the fewest and the most groups. BF16_Optimizer also starts as in DeepSpeed alone, with a memory
report before and after each group.

    python -m benchmarks.group_cost [--steps 10]
"""

import argparse
import contextlib
import io
import statistics
import time
from typing import Any

import torch
from torch import nn

from benchmarks.report import write
from tests.support.ranks import close_pools, run_in_fresh_processes

HIDDEN, LAYERS, EXPERTS = 16, 8, 32


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.relu(self.up(x)))
        return out


def model() -> nn.Module:
    from moe_groups import MoE

    torch.manual_seed(0)
    options: dict[str, Any] = {"k": 1, "drop_tokens": False, "use_rts": False}
    root = nn.Module()
    root.inp = nn.Linear(HIDDEN, HIDDEN)
    root.layers = nn.ModuleList(
        MoE(HIDDEN, Expert(), num_experts=EXPERTS, ep_size=1, **options) for _ in range(LAYERS)
    )
    return root


def measure(wrapper: str, split_by: str, steps: int, stock: bool, lean: bool) -> list[float]:
    """Number of groups, seconds of ``initialize``, median milliseconds of ``engine.step``."""
    import deepspeed

    import moe_groups
    from moe_groups._deepspeed import start as set_up
    from tests.support.training import config

    if stock:
        set_up.MANY_GROUPS = 10**9  # let DeepSpeed report its memory for every group
    net: nn.Module = nn.Linear(
        HIDDEN, HIDDEN
    )  # the first engine of a process includes imports and fills caches
    warm = torch.optim.AdamW(net.parameters())
    deepspeed.initialize(model=net, optimizer=warm, config=config(wrapper))
    net = model()
    groups = moe_groups.create_moe_param_groups(net, split_by=split_by)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config(wrapper))
    started = time.perf_counter() - start
    if lean:
        moe_groups.lean_step(engine)
    times = []
    for _ in range(steps):
        x = engine.module.inp(torch.randn(8, 4, HIDDEN, dtype=torch.bfloat16))
        for layer in engine.module.layers:
            x = x + layer(x)[0]
        engine.backward(x.float().pow(2).mean())
        torch.distributed.barrier()
        start = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - start))
    return [len(optimizer.param_groups), started, statistics.median(times[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    rows = []
    for label, wrapper, stock, lean in (
        ("ZeRO-1", "zero1", False, False),
        ("ZeRO-2", "zero2", False, False),
        ("ZeRO-2, lean", "zero2", False, True),
        ("BF16_Optimizer", "bf16", False, False),
        ("BF16_Optimizer, lean", "bf16", False, True),
        ("BF16_Optimizer, reports on", "bf16", True, False),
    ):
        found = [
            run_in_fresh_processes(2, measure, wrapper, split_by, steps, stock, lean, timeout=900)[
                0
            ]
            for split_by in ("module", "module", "module", "expert")
        ]
        found[:3] = [min(found[:3], key=lambda run: run[1])]  # the first fills caches
        (few, start_few, step_few), (many, start_many, step_many) = found
        rows.append(
            {
                "wrapper": label,
                "groups": f"{few:.0f} and {many:.0f}",
                "initialize, s": f"{start_few:.2f} and {start_many:.2f}",
                "step, ms": f"{step_few:.1f} and {step_many:.1f}",
                "start-up per group, ms": round(1e3 * (start_many - start_few) / (many - few), 2),
                "step per group, ms": round((step_many - step_few) / (many - few), 2),
            }
        )
    close_pools()
    write("group_cost", rows)


if __name__ == "__main__":
    main()
