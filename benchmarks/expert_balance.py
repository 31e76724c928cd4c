"""What does a bias in the choice of experts do to their loads?

The Mixtral of ``docs/examples/autoep_mixtral.py`` with 8 experts (AutoEP, ZeRO-2, no auxiliary
loss) on 2 gloo ranks, trained on the source of ``os.py`` with three seeds, with and without
``balance_experts``. The imbalance is that of the worse of two layers over the last 50 steps.

    python -m benchmarks.expert_balance [--steps 200]
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.report import write
from moe_groups import LossTracker, balance_experts
from moe_groups.integrations.autoep import autoep_optimizer
from tests.support.ranks import close_pools, forget_process_groups, run_in_fresh_processes
from tests.support.training import initialize

RATES = (0.0, 1e-3, 1e-2)
SEEDS = (0, 1, 2)
LAST = 50


def train(seed: int, rate: float, steps: int) -> dict[str, float]:
    """Imbalance and loss of the last steps."""
    forget_process_groups()
    torch.manual_seed(seed)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
        )
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "mixtral"},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = autoep_optimizer(model, lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    engine = initialize(model, optimizer, config)
    if rate:
        balance_experts(engine, rate)
    tracker = LossTracker(engine, interval=LAST)
    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(2 * seed + torch.distributed.get_rank())
    for _ in range(steps):
        starts = torch.randint(len(text) - 64, (4,), generator=generator)
        tokens = torch.stack([text[start : start + 64] for start in starts])
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        report = tracker.step(loss.detach())
    assert report is not None
    return {"imbalance": report.as_dict()["moe/imbalance"], "loss": report.total}


def train_all(steps: int) -> list[dict[str, Any]]:
    """A row for each seed."""
    rows = []
    for seed in SEEDS:
        row: dict[str, Any] = {"seed": seed}
        for rate in RATES:
            end = f"rate {rate:g}" if rate else "no bias"
            found = train(seed, rate, steps)
            row |= {f"{name}, {end}": round(value, 3) for name, value in found.items()}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 50")
    steps = parser.parse_args().steps
    write("expert_balance", run_in_fresh_processes(2, train_all, steps, timeout=1800)[0])
    close_pools()


if __name__ == "__main__":
    main()
