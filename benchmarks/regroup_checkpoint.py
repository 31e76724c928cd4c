"""How fast is the conversion of a checkpoint compared with a copy, and in how much memory?

Checkpoints of real engines on 2 gloo ranks, EP=2, saved with one group for each EP size, are
converted to groups by layer, from these by expert, from these with a cap. ``cp -r``,
``shutil.copytree`` and the conversion run in turn; all read from the page cache, and end when
the written files are on the disk. Memory is that of a process that only converts.

    python -m benchmarks.regroup_checkpoint [--rounds 3] [--directory DIR]
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import write
from moe_groups import StepConfig, regroup_checkpoint
from tests.support import ROOT
from tests.support.ranks import run_in_fresh_processes
from tests.support.step_runs import Case, Shape, start

ZERO_2 = StepConfig(zero_stage=2, optimizer="fused")
BF16 = StepConfig(zero_stage=1, grad_accum_dtype="fp32", optimizer="fused")
QUARTER = Shape(dense=(500_000,) * 8, expert=(160_000,) * 3, layers=4, local=4, hidden=640)
WHOLE = QUARTER.times(4)
SMALL = Shape(dense=(25_000,) * 1000, expert=(25_000,) * 10, layers=20, local=5, hidden=640)
CAP = 2_000_000

Saved = dict[str, Path]


class Target(NamedTuple):
    """Groups to convert to, and their name in the table."""

    label: str
    to: str
    cap: int | None = None


CHAIN = (
    Target("parallel_group to module", "module"),
    Target("module to expert", "expert"),
    Target("expert to capped", "expert", CAP),
)
CASES = {
    "ZeRO-2": (ZERO_2, WHOLE, CHAIN),
    "BF16_Optimizer": (BF16, WHOLE, CHAIN),
    "ZeRO-2, small parameters": (ZERO_2, SMALL, CHAIN[:2]),
}


def save(step: StepConfig, shape: Shape, directory: Path) -> None:
    """Train one step with one group for each EP size, and save."""
    engine, _ = start(Case(step, "parallel_group", None, shape))
    engine.backward(engine())
    engine.step()
    engine.save_checkpoint(directory)


def files_of(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def megabytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in files_of(directory)) / 1e6


def to_disk(directory: Path) -> None:
    for path in (directory, *directory.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def cp(source: Path, made: Path) -> None:
    subprocess.run(["cp", "-r", source, made], check=True)
    to_disk(made)


def copytree(source: Path, made: Path) -> None:
    shutil.copytree(source, made)
    to_disk(made)


def seconds(way: Callable[[Path, Path], object], source: Path, made: Path) -> float:
    shutil.rmtree(made, ignore_errors=True)
    begin = time.perf_counter()
    way(source, made)
    return time.perf_counter() - begin


def compare(source: Path, made: Path, target: Target, rounds: int) -> dict[str, Any]:
    """Copy and convert in turn; keep the converted checkpoint."""

    def convert(source: Path, made: Path) -> None:
        regroup_checkpoint(source, made, target.to, max_group_size=target.cap)

    for path in files_of(source):
        path.read_bytes()  # into the page cache
    copy = made.with_name("copy")
    times = []
    for _ in range(rounds):
        ways = ((cp, copy), (copytree, copy), (convert, made))
        times.append([seconds(way, source, place) for way, place in ways])
    shutil.rmtree(copy)
    size = megabytes(source)
    median, best = ([f(way) for way in zip(*times, strict=True)] for f in (statistics.median, min))
    ratio = statistics.median(min(copies) / own for *copies, own in times)
    return {
        "files": len(files_of(source)),
        "MB": round(size),
        "cp -r, MB/s": round(size / median[0]),
        "copytree, MB/s": round(size / median[1]),
        "conversion, MB/s": round(size / median[2]),
        "conversion / faster copy": f"{ratio:.2f}",
        "of the fastest rounds": f"{min(best[:2]) / best[2]:.2f}",
    }


def speed_rows(saved: Saved, directory: Path, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, (_, _, chain) in CASES.items():
        source = saved[name]
        for number, target in enumerate(chain):
            made = directory / f"{source.name}-{number}"
            found = compare(source, made, target, rounds)
            rows.append({"checkpoint": name, "groups": target.label, **found})
            if source != saved[name]:
                shutil.rmtree(source)
            source = made
        shutil.rmtree(source)
    return rows


WATCHED = """
import sys
import deepspeed
from moe_groups import regroup_checkpoint
sys.stdin.readline()
regroup_checkpoint(*sys.argv[1:])
"""


def anonymous(pid: int) -> int:
    """Bytes of a process in memory without pages of files."""
    status = Path(f"/proc/{pid}/status").read_text()
    kinds = (status.partition(f"{kind}:")[2].split() for kind in ("RssAnon", "RssShmem"))
    return sum(1024 * int(found[0]) for found in kinds if found)


def memory_of(source: Path, made: Path, target: Target) -> tuple[int, int]:
    """Anonymous bytes of a process before a conversion, and at its peak."""
    command = [sys.executable, "-c", WATCHED, str(source), str(made), target.to]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        before, same = 0, 0
        while same < 10:  # until the imports are done
            time.sleep(0.1)
            now = anonymous(process.pid)
            before, same = now, same + 1 if now == before else 0
        process.stdin.write("\n")
        process.stdin.flush()
        peak = before
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.002)
    assert process.returncode == 0
    shutil.rmtree(made)
    return before, peak


def memory_rows(saved: Saved, made: Path) -> list[dict[str, Any]]:
    rows = []
    for name in ("a quarter", "ZeRO-2", "ZeRO-2, small parameters"):
        before, peak = memory_of(saved[name], made, CHAIN[0])
        rows.append(
            {
                "checkpoint": name,
                "MB": round(megabytes(saved[name])),
                "before, MiB": round(before / 2**20),
                "peak, MiB": round(peak / 2**20),
                "conversion, MiB": round((peak - before) / 2**20),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="of the disk to use")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        directory = Path(scratch)
        saved: Saved = {}
        for name, (step, shape, _) in {"a quarter": (ZERO_2, QUARTER, ()), **CASES}.items():
            saved[name] = directory / f"saved-{len(saved)}"
            run_in_fresh_processes(2, save, step, shape, saved[name], timeout=600)
        memory = memory_rows(saved, directory / "made")
        speed = speed_rows(saved, directory, args.rounds)
    write("regroup_checkpoint", speed)
    write("regroup_checkpoint_memory", memory)


if __name__ == "__main__":
    main()
