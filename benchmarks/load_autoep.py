"""How much memory does a rank need to load a Mixtral for AutoEP?

Two ranks with ``autoep_size`` 2 load a checkpoint of 16 layers in bfloat16 with the names of the
hub: ``from_pretrained``, after which AutoEP drops the other rank's experts, and ``load_autoep``.
Memory is all that the process holds, pages of files too, above what it holds after the imports.

    python -m benchmarks.load_autoep
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write
from tests.support.ranks import close_pools, run_in_fresh_processes

SHAPE = {
    "vocab_size": 16000,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
}
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "expert_parallel": {"enabled": True, "autoep_size": 2},
}
OURS = "load_autoep"
PAGE = os.sysconf("SC_PAGE_SIZE")


def held() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def most_held(way: Callable[[], Any]) -> tuple[Any, int]:
    """What ``way`` returns, and the most bytes held while it runs on top of those before."""
    before = peak = held()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, held())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        found = way()
    finally:
        done.set()
        thread.join()
    return found, max(peak, held()) - before


def make(directory: Path, shard: str) -> int:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**SHAPE)).bfloat16()
    model.save_pretrained(directory, max_shard_size=shard)
    return nbytes(model)


def nbytes(model: torch.nn.Module) -> int:
    return sum(param.nbytes for param in model.parameters())


def measure(directory: Path, ours: bool) -> tuple[int, int, float]:
    """Bytes of this rank's model, the peak, and seconds."""
    from deepspeed.module_inject import auto_ep, auto_ep_layer  # noqa: F401
    from transformers import MixtralConfig, MixtralForCausalLM

    from moe_groups.integrations.autoep import load_autoep

    def load() -> Any:
        if not ours:
            return MixtralForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        config = MixtralConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
        load_autoep(model, directory, CONFIG)
        return model

    torch.distributed.barrier()
    begin = time.perf_counter()
    model, peak = most_held(load)
    return nbytes(model), peak, time.perf_counter() - begin


def main() -> None:
    rows = []
    for files, shard in (("one", "10GB"), ("of 200 MB", "200MB")):
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "checkpoint"
            (whole,) = run_in_fresh_processes(1, make, directory, shard, timeout=600)
            runs = {
                way: run_in_fresh_processes(2, measure, directory, way == OURS, timeout=600)
                for way in ("from_pretrained", OURS)
            }
        part = runs[OURS][0][0]
        for way, ranks in runs.items():
            peak, seconds = (max(rank[key] for rank in ranks) for key in (1, 2))
            rows.append(
                {
                    "files": files,
                    "loaded by": way,
                    "model, MiB": round(whole / 2**20),
                    "a rank's part, MiB": round(part / 2**20),
                    "peak, MiB": round(peak / 2**20),
                    "peak / part": f"{peak / part:.2f}",
                    "seconds": f"{seconds:.1f}",
                }
            )
    write("load_autoep", rows)
    close_pools()


if __name__ == "__main__":
    main()
