"""What does activation checkpointing cost, with and without all-to-alls in the recomputation?

One model of MoE blocks on 2 gloo ranks (or 2 GPUs if there are two), EP=2: without checkpointing,
each block by torch's checkpoint, each block by ours. The three run in turn. Reported are the
milliseconds of forward and backward pass together, ratios as medians over the rounds, and the
peak memory of a pass on top of the model and its gradients.

    python -m benchmarks.checkpointing [--rounds 15]
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.report import write
from benchmarks.timing import milliseconds
from moe_groups import MoE, measure_step_memory
from tests.support.checkpointed_models import WAYS, Way, communication, initialized
from tests.support.ranks import close_pools, run_in_fresh_processes

LAYERS, EXPERTS = 2, 4
SHAPES = {"hidden 128, 2,048 tokens": (128, 2048), "hidden 512, 512 tokens": (512, 512)}
LABELS = {"plain": "none", "torch": "torch's", "ours": "ours"}


class Block(nn.Module):
    """A norm, and an MoE layer whose experts have an inner width of 4 x hidden."""

    def __init__(self, hidden: int, k: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        expert = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.SiLU(), nn.Linear(4 * hidden, hidden)
        )
        self.moe = MoE(hidden, expert, num_experts=EXPERTS, ep_size=2, k=k)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, aux, _ = self.moe(self.norm(x))
        return x + out, aux


def step_of(blocks: nn.ModuleList, x: torch.Tensor, way: Way) -> Callable[[], None]:
    def step() -> None:
        y, total = x, x.float().sum() * 0
        for block in blocks:
            y, aux = way(block, y)
            total = total + aux
        (y.float().square().mean() + 0.01 * total).backward()

    return step


def activations(step: Callable[[], None]) -> int:
    """Bytes at the peak on top of those before."""
    with measure_step_memory() as memory:
        step()
    return memory.transient


def measure(shape: str, k: int, rounds: int) -> dict[str, dict[str, float]]:
    """By way: all-to-alls of a step, median milliseconds, ratio to torch's, peak."""
    hidden, tokens = SHAPES[shape]
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = nn.ModuleList(Block(hidden, k) for _ in range(LAYERS)).to(device)
    initialized(blocks)
    x = torch.randn(tokens, hidden, device=device, requires_grad=True)
    steps = {name: step_of(blocks, x, way) for name, way in WAYS.items()}
    times = [{name: milliseconds(step) for name, step in steps.items()} for _ in range(rounds + 2)]
    return {
        name: {
            "all-to-alls": communication(step)[0],
            "ms": statistics.median(row[name] for row in times[2:]),
            "ratio": statistics.median(row[name] / row["torch"] for row in times[2:]),
            "peak": activations(step),
        }
        for name, step in steps.items()
    }


def rows_of(shape: str, k: int, rounds: int) -> list[dict[str, Any]]:
    found = run_in_fresh_processes(2, measure, shape, k, rounds, timeout=1800)[0]
    return [
        {
            "model": f"{shape}, k={k}",
            "checkpointing": LABELS[name],
            "all-to-alls per layer": round(result["all-to-alls"] / LAYERS),
            "forward and backward, ms": round(result["ms"], 1),
            "time / torch's": round(result["ratio"], 2),
            "peak, MiB": round(result["peak"] / 2**20, 1),
            "peak / none's": round(result["peak"] / found["plain"]["peak"], 2),
        }
        for name, result in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows = [row for shape in SHAPES for k in (1, 2) for row in rows_of(shape, k, rounds)]
    close_pools()
    write("checkpointing", rows)


if __name__ == "__main__":
    main()
