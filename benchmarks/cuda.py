"""What do groups cost on a GPU? The benchmarks that ``tests/gpu/run.sh`` runs, within 6 minutes.

Each part runs in processes of its own, with a time limit. After each part ``OUT/cuda.json`` has the
rows that were found, and the reason if the part failed; ``OUT/log.txt`` has what was printed.
Without a GPU all of it runs on the CPU with small sizes, and the JSON says so.

    python -m benchmarks.cuda run OUT [--only PART]
    python -m benchmarks.cuda_tables OUT/cuda.json
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.parts import LIMIT, Rows, run_parts

GIB = 2**30


class Sizes:
    """What is measured: on a GPU, or small enough for two cores."""

    def __init__(self, cuda: bool) -> None:
        self.unit = 7_576 if cuda else 379  # elements; the groups have 7,681 units together
        self.divisor = 1 if cuda else 256  # of the elements of Mixtral's parameters
        self.repeats = 15 if cuda else 3
        large = {"hidden": 2048, "inner": 5632, "blocks": 8, "heads": 16, "length": 1024}
        small = {"hidden": 128, "inner": 256, "blocks": 4, "heads": 4, "length": 128}
        self.demo = (large | {"batch": 4}) if cuda else (small | {"batch": 4})
        self.demo["max-group-size"] = 100_000_000 if cuda else 250_000


def sizes() -> Sizes:
    from deepspeed.accelerator import get_accelerator

    return Sizes(get_accelerator().device_name() == "cuda")


def machine(rows: Rows) -> None:
    """The device, the versions of what is used, and whether a world of one starts."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator().device_name()
    cuda = accelerator == "cuda"
    found: dict[str, Any] = {
        "accelerator": accelerator,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found["memory, GiB"] = round(properties.total_memory / GIB, 1)
        found["CUDA"] = torch.version.cuda
    if cuda and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name in ("numpy", "moe-groups"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    rows.add(**found)
    # On the CPU this compiles an operation first, within this part's limit.
    deepspeed.init_distributed(verbose=False)
    torch.distributed.all_reduce(torch.ones(1, device=get_accelerator().current_device_name()))
    torch.distributed.destroy_process_group()


def tests(rows: Rows) -> None:
    """Those of tests/gpu, on the CPU too where they can run there."""
    import pytest

    report = rows.file + ".xml"
    os.environ["MOE_GROUPS_TRY_GPU_TESTS"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of the machine may not fit
    options = ["-vv", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", "tests/gpu"]
    code = pytest.main(options)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = [one for one in case if one.tag in ("failure", "error", "skipped")]
        why = outcome[0].get("message", "")[:300] if outcome else ""
        rows.add(test=case.get("name"), outcome=outcome[0].tag if outcome else "passed", why=why)
    if code:
        raise SystemExit(f"pytest ended with {code!r}")


GROUP_COUNTS = {1: None, 33: 240, 500: 16}
"""Caps, in units, that give so many groups of 500 parameters: one has no experts, or it would be
two; of the others one is dense, and 32 groups of experts have 240 units each."""
WRAPPERS: dict[str, dict[str, Any]] = {
    "ZeRO-2": {},
    "ZeRO-2, compact": {"compact_gradients": True},
    "BF16_Optimizer": {"zero_stage": 1, "grad_accum_dtype": "fp32"},
}


def group_price(way: str) -> Callable[[Rows], None]:
    def part(rows: Rows) -> None:
        from tests.support.fake_world import run_as_rank

        run_as_rank(0, 2, price_groups, way, rows.file, timeout=LIMIT)

    return part


def price_groups(way: str, file: str) -> None:
    """Start-up and step with 1, 33 and 500 groups, as a rank of 2 that exchanges no data."""
    from tests.support.ranks import check_stock, forget_process_groups

    price_of("ZeRO-2", way, 1, Rows(os.devnull))  # the first engine fills caches
    for wrapper, count in product(WRAPPERS, GROUP_COUNTS):
        # BF16_Optimizer alone reports on memory twice a group, and would start for minutes.
        if way == "ours" or wrapper == "ZeRO-2" or (wrapper == "BF16_Optimizer" and count < 500):
            forget_process_groups()
            price_of(wrapper, way, count, Rows(file))
    if way == "stock":
        check_stock()


def price_of(wrapper: str, way: str, count: int, rows: Rows) -> None:
    import torch
    from deepspeed.accelerator import get_accelerator

    from moe_groups import StepConfig, compact_gradients
    from tests.support.step_runs import Case, Model, Shape, deepspeed_config, make_groups
    from tests.support.training import initialize

    step, size = StepConfig(optimizer="fused", **WRAPPERS[wrapper]), sizes()
    unit = size.unit
    dense, experts = (unit,), (15 * unit,) * 304 + (16 * unit,) * 195
    shape = Shape(dense, experts, layers=1, local=1, ep_size=1, hidden=1)
    if count == 1:
        shape = Shape(dense + experts, layers=0)
    cap = GROUP_COUNTS[count]
    case = Case(step, "parallel_group" if way == "ours" else way, cap and cap * unit)
    with torch.device(get_accelerator().current_device_name()):
        model = Model(shape)
    for name, param in model.named_parameters():
        param.requires_grad = ".gate." not in name
    groups = make_groups(model, case, 2)
    if len(groups) != count:
        raise AssertionError(f"{len(groups)} groups, not {count}")
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    started, engine = timed(lambda: initialize(model, optimizer, deepspeed_config(case)))
    if step.compact_gradients:
        compact_gradients(engine)
    steps = [step_time(engine) for _ in range(2 + size.repeats)][2:]
    rows.add(
        wrapper=wrapper,
        split=way,
        groups=count,
        elements=sum(dense + experts),
        **{
            "initialize, s": round(started / 1e3, 2),
            "step, ms": round(statistics.median(steps), 2),
        },
    )


def step_time(engine: Any) -> float:
    engine.backward(engine())
    return timed(engine.step)[0]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds until it is done on the device too, and what it returned."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().synchronize()
    begin = time.perf_counter()
    result = function()
    get_accelerator().synchronize()
    return 1e3 * (time.perf_counter() - begin), result


def shard(rows: Rows) -> None:
    """Step memory of one rank of 64 with its real shard of Mixtral-8x7B: the worst of each way."""
    from benchmarks.large_world import predicted, ways
    from benchmarks.models import MODELS
    from tests.support.fake_world import run_as_rank

    divisor, world = sizes().divisor, 64
    shape = MODELS["Mixtral-8x7B"].shape(world)
    cases = ways(shape if divisor == 1 else shape.over(divisor), divisor)
    by_rank = defaultdict(list)
    for way, case in cases.items():
        by_rank[predicted(case, world).worst_rank].append((way, case))
    for rank, some in by_rank.items():
        run_as_rank(rank, world, run_shards, some, divisor, rows.file, timeout=LIMIT)


def run_shards(cases: list[Any], divisor: int, file: str) -> None:
    import torch

    from tests.support.ranks import forget_process_groups
    from tests.support.step_runs import expected_figures, start, steps

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for way, case in cases:
        forget_process_groups()  # else an engine's tensors would be released in the next one's step
        engine, groups = start(case)
        (first, _), *later = steps(engine, case, 5)
        expected_first, expected = (
            expected_figures(groups, case.step, rank, world, first=first) for first in (True, False)
        )
        Rows(file).add(
            groups=way,
            number=len(groups),
            rank=rank,
            divisor=divisor,
            **{
                "predicted T + R, bytes": expected.step_peak,
                "measured T + R, bytes": later[-1][0].step_peak,
                "predicted first step, bytes": expected_first.step_peak,
                "measured first step, bytes": first.step_peak,
                "step, ms": round(1e3 * statistics.median(seconds for _, seconds in later[1:]), 2),
            },
            **whole_iteration(engine, engine),
        )
        del engine, groups


def whole_iteration(engine: Any, forward: Callable[[], Any]) -> dict[str, Any]:
    """The peak above what was allocated before, and the phase that sets it."""
    from moe_groups.memory import measure_iteration_memory

    with measure_iteration_memory(engine.device) as whole:
        with whole.phase("forward"):
            loss = forward()
        with whole.phase("backward"):
            engine.backward(loss)
            del loss
        with whole.phase("step"):
            engine.step()
    return {
        "peak of an iteration, bytes": whole.peak - whole.before,
        "set by": whole.peak_phase.name,
        "by phase": {use.name: use.peak - whole.before for use in whole.phases},
    }


def iteration(rows: Rows) -> None:
    """Peak of a whole iteration of the demo's language model and the phase that sets it."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    from benchmarks.demo_memory import WAYS, demo_arguments
    from tests.support.ranks import forget_process_groups

    deepspeed.init_distributed(verbose=False)
    size = sizes()
    args = demo_arguments(*(f"--{key}={value}" for key, value in size.demo.items()), "--ep-size=1")
    import train_moe_lm as demo

    batch = next(demo.batches(args))
    for way in WAYS:
        torch.manual_seed(0)
        with torch.device(get_accelerator().current_device_name()):
            model = demo.LanguageModel(args)
        iteration_of(way, model, args, batch, size.repeats, rows)
        del model
        forget_process_groups()
    torch.distributed.destroy_process_group()


def iteration_of(way: str, model: Any, args: Any, batch: Any, count: int, rows: Rows) -> None:
    import train_moe_lm as demo

    from benchmarks.demo_memory import groups_of, iteration as run, resident
    from moe_groups import compact_gradients, measure_step_memory

    engine = demo.start_engine(args, model, groups_of(way, demo, args, model))
    if "compact" in way:
        compact_gradients(engine)
    for _ in range(2):
        run(engine, batch)

    def forward() -> Any:
        loss, aux_loss = engine(batch.to(engine.device))
        return loss + 0.01 * aux_loss

    whole = whole_iteration(engine, forward)
    engine.backward(forward())
    with measure_step_memory(engine.device) as step:
        engine.step()
    wholes = [timed(lambda: run(engine, batch))[0] for _ in range(count)]
    steps = []
    for _ in range(count):
        engine.backward(forward())
        steps.append(timed(engine.step)[0])
    rows.add(
        groups=way,
        number=len(engine.optimizer.param_groups),
        **{
            "weights and states, bytes": resident(engine),
            "T + R, bytes": step.step_peak,
            "iteration, ms": round(statistics.median(wholes), 2),
            "step, ms": round(statistics.median(steps), 2),
        },
        **whole,
    )


PARTS: dict[str, tuple[Callable[[Rows], None], float]] = {
    "machine": (machine, 180),
    "tests": (tests, 120),
    "group price, ours": (group_price("ours"), 70),
    "step memory": (shard, 110),
    "iteration": (iteration, 90),
    "group price, stock": (group_price("stock"), 90),
}
"""With the seconds that each may take: six minutes besides the machine and the tests."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("--only", action="append", choices=PARTS, default=[])
    part = commands.add_parser("part")
    part.add_argument("name", choices=PARTS)
    part.add_argument("rows")
    given = parser.parse_args()
    if given.command == "part":
        PARTS[given.name][0](Rows(given.rows))
        return
    limits = {
        name: limit
        for name, (_, limit) in PARTS.items()
        if name == "machine" or not given.only or name in given.only
    }
    sys.exit(not run_parts("benchmarks.cuda", limits, given.out))


if __name__ == "__main__":
    main()
