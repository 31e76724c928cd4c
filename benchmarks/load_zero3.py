"""How much memory does a rank need to load and save a Mixtral under ZeRO-3?

Two ranks partition a model of 16 layers in bfloat16: ``from_pretrained`` makes and loads it, or it
is made from its config and ``load_experts`` loads it. It is saved by ``gather_model`` with
``save_pretrained``, and by ``save_experts``. Memory is all that the process holds, pages of files
too, above what it held before and its partitions.

    python -m benchmarks.load_zero3
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.load_autoep import make, most_held
from benchmarks.report import write
from tests.support.ranks import close_pools, run_in_fresh_processes

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}
FILE = "200MB"
Measured = dict[str, tuple[int, float]]
"""Bytes at the peak and seconds of each way."""


def measure(directory: Path, ours: bool) -> tuple[int, Measured]:
    """Bytes of this rank's partitions, and what making, loading and saving need beside them."""
    import deepspeed
    from transformers import AutoConfig, MixtralForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from moe_groups import gather_model, load_experts, save_experts

    keep = HfDeepSpeedConfig(CONFIG)

    found: Measured = {}

    def measured(name: str, way: Callable[[], Any]) -> Any:
        torch.distributed.barrier()
        begin = time.perf_counter()
        result, peak = most_held(way)
        found[name] = peak, time.perf_counter() - begin
        return result

    def gather_and_save() -> None:
        if weights := gather_model(engine):
            engine.module.save_pretrained(directory / "whole", state_dict=weights)

    kind: Any = MixtralForCausalLM
    config = AutoConfig.from_pretrained(directory)
    if ours:
        made = "the model is made from its config"
        model = measured(made, lambda: kind._from_config(config, dtype=torch.bfloat16))
        measured("load_experts", lambda: load_experts(model, directory))
    else:
        made = "from_pretrained"
        model = measured(made, lambda: kind.from_pretrained(directory, dtype=torch.bfloat16))
    part = sum(param.ds_tensor.nbytes for param in model.parameters())
    found[made] = found[made][0] - part, found[made][1]
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG)
    if ours:
        for size in ("50MB", FILE):
            out = directory / size
            measured(
                f"save_experts, files of {size}",
                lambda: save_experts(engine, out, family="mixtral", max_shard_size=size),  # noqa: B023
            )
    else:
        measured("gather_model, save_pretrained", gather_and_save)
    del keep
    return part, found


def main() -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"  # freed tensors do not count as held
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "in"
        (whole,) = run_in_fresh_processes(1, make, directory, FILE, timeout=600)
        for ours in (False, True):
            ranks = run_in_fresh_processes(2, measure, directory, ours, timeout=600)
            for way in ranks[0][1]:
                peak, seconds = (max(found[way][key] for _, found in ranks) for key in range(2))
                rows.append(
                    {
                        "way": way,
                        "model, MiB": round(whole / 2**20),
                        "a rank's part, MiB": round(ranks[0][0] / 2**20),
                        "peak beside it, MiB": round(peak / 2**20),
                        "seconds": f"{seconds:.1f}",
                    }
                )
    write("load_zero3", rows)
    close_pools()


if __name__ == "__main__":
    main()
