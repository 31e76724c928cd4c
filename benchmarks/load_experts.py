"""How fast does a rank read its experts compared with plain reads, and in how much memory?

One rank of a world of 4 with EP=4 fills a model from checkpoints of both styles. Plain reads of
the same bytes (``seek`` and ``readinto`` at the offsets in the files' headers, into allocated
memory) and ``load_experts`` run in turn: from the page cache, and after the files were dropped
from it. Memory is that of the process besides the model while it loads, without pages of files.

    python -m benchmarks.load_experts [--rounds 7] [--directory DIR]
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.regroup_checkpoint import anonymous
from benchmarks.report import write
from tests.support.fake_world import run_as_rank
from tests.support.hf_checkpoints import PROJECTIONS, GatedFFN

RANK, WORLD = 2, 4


class Shape(NamedTuple):
    """A model of MoE layers in bfloat16."""

    layers: int
    experts: int
    hidden: int
    inner: int


CASES = (
    ("Mixtral-8x7B's widths / 2", Shape(layers=1, experts=8, hidden=2048, inner=7168)),
    ("Qwen3-30B-A3B's widths", Shape(layers=1, experts=128, hidden=2048, inner=768)),
    ("very small experts", Shape(layers=8, experts=64, hidden=512, inner=256)),
)


def make(directory: Path, shape: Shape, fused: bool) -> None:
    """Write a checkpoint with one file for each layer."""
    from safetensors.torch import save_file

    directory.mkdir()
    index: dict[str, str] = {}
    sizes = {
        "gate_proj": (shape.inner, shape.hidden),
        "up_proj": (shape.inner, shape.hidden),
        "down_proj": (shape.hidden, shape.inner),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}.mlp"
        tensors = {f"{prefix}.gate.weight": _random(shape.experts, shape.hidden)}
        if fused:
            both = (shape.experts, 2 * shape.inner, shape.hidden)
            tensors[f"{prefix}.experts.gate_up_proj"] = _random(*both)
            down = (shape.experts, shape.hidden, shape.inner)
            tensors[f"{prefix}.experts.down_proj"] = _random(*down)
        else:
            for expert in range(shape.experts):
                for name, size in sizes.items():
                    tensors[f"{prefix}.experts.{expert}.{name}.weight"] = _random(*size)
        file = f"model-{layer + 1:05}-of-{shape.layers:05}.safetensors"
        save_file(tensors, directory / file)
        index |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _random(*size: int) -> torch.Tensor:
    return torch.randint(2**14, size, dtype=torch.int16).view(torch.bfloat16)


def build(shape: Shape) -> nn.Module:
    from moe_groups import MoE

    expert = GatedFFN(PROJECTIONS, shape.hidden, shape.inner).bfloat16()
    layers = (
        MoE(shape.hidden, expert, num_experts=shape.experts, ep_size=WORLD)
        for _ in range(shape.layers)
    )
    model = nn.Module()
    model.blocks = nn.ModuleList(layers)
    return model.bfloat16()


Range = tuple[Path, int, torch.Tensor]


def ranges(directory: Path, shape: Shape) -> list[Range]:
    """File, first byte and memory of each part that the rank needs."""
    found = []
    local = shape.experts // WORLD
    matrix = 2 * shape.hidden * shape.inner
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            parts = name.split(".")
            if parts[-1] in ("gate_up_proj", "down_proj"):  # one tensor of all experts
                each = (end - begin) // shape.experts
                begin += each * local * RANK
                pieces = [(begin + at, matrix) for at in range(0, each * local, matrix)]
            elif parts[-2] == "gate" or local * RANK <= int(parts[-3]) < local * (RANK + 1):
                pieces = [(begin, end - begin)]
            else:
                continue
            for first, size in pieces:
                memory = torch.zeros(size, dtype=torch.uint8)
                found.append((path, 8 + length + first, memory))
    return found


def plain(wanted: list[Range]) -> None:
    opened: dict[Path, Any] = {}
    for path, first, memory in wanted:
        if path not in opened:
            opened[path] = open(path, "rb", buffering=0)  # noqa: SIM115
        opened[path].seek(first)
        read = opened[path].readinto(memory.numpy().data)
        assert read == len(memory)
    for file in opened.values():
        file.close()


def drop(directory: Path) -> None:
    """Drop the files from the page cache."""
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(way: Callable[[], object]) -> float:
    begin = time.perf_counter()
    way()
    return time.perf_counter() - begin


def most_held(way: Callable[[], object]) -> int:
    """The most anonymous bytes while ``way`` runs, on top of those before."""
    before = peak = anonymous(os.getpid())
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous(os.getpid()))

    thread = threading.Thread(target=watch)
    thread.start()
    way()
    done.set()
    thread.join()
    return peak - before


def measure(directory: Path, shape: Shape, rounds: int) -> dict[str, Any]:
    """Measure as one rank."""
    from moe_groups.weights.load import load_experts

    torch.set_num_threads(1)
    model = build(shape)
    wanted = ranges(directory, shape)
    size = sum(len(memory) for _, _, memory in wanted)

    def load() -> None:
        assert load_experts(model, directory).bytes_read == size

    def read() -> None:
        plain(wanted)

    load()  # imports
    held = most_held(load)
    warm = [(seconds(read), seconds(load)) for _ in range(rounds)]
    cold = []
    for _ in range(rounds):
        drop(directory)
        first = seconds(read)
        drop(directory)
        cold.append((first, seconds(load)))
    whole = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return {
        "checkpoint, MB": round(whole / 1e6),
        "rank's part, MB": round(size / 1e6),
        "plain reads, MB/s": round(size / 1e6 / statistics.median(one for one, _ in warm)),
        "load_experts, MB/s": round(size / 1e6 / statistics.median(own for _, own in warm)),
        "load_experts / plain": f"{statistics.median(one / own for one, own in warm):.2f}",
        "the same, not cached": f"{statistics.median(one / own for one, own in cold):.2f}",
        "memory beside the weights, MiB": f"{held / 2**20:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="of the disk to use")
    args = parser.parse_args()
    rows = []
    for (name, shape), fused in itertools.product(CASES, (False, True)):
        with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
            directory = Path(scratch) / "checkpoint"
            make(directory, shape, fused)
            found = run_as_rank(RANK, WORLD, measure, directory, shape, args.rounds)
        style = "one for all" if fused else "each its own"
        rows.append({"experts": name, "tensors": style, **found})
    write("load_experts", rows)


if __name__ == "__main__":
    main()
