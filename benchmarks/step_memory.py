"""How much memory does the optimizer step need, by grouping, wrapper, optimizer and dtype?

Each case runs through unmodified DeepSpeed as the worst rank of 64, with a process group that
moves no data, on Mixtral-8x7B's shape with all widths divided; T, R and T + R are measured.
Step times are those of 2 real ranks on a smaller model, compared with DeepSpeed's own split:
all engines step in turn.

    python -m benchmarks.step_memory [--only memory] [--scale 16] [--world 64]
"""

import argparse
import statistics
from collections import defaultdict
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from benchmarks.models import MODELS
from benchmarks.plots import grouped_bars
from benchmarks.report import write
from benchmarks.timing import milliseconds
from moe_groups import StepConfig, estimate_step_memory
from moe_groups.groups.grouping import DEEPSPEED_MAX_GROUP_SIZE
from tests.support.fake_world import run_as_rank
from tests.support.ranks import close_pools, run_in_fresh_processes
from tests.support.step_runs import OPTIONS, Case, Model, Run, Shape, make_groups, run_all, start

MIB = 2**20
TILE = 2**26 // 16**2
"""Bytes: 64 MiB, divided as the elements are."""
WRAPPERS = {
    "ZeRO-1": StepConfig(zero_stage=1),
    "ZeRO-1, compact": StepConfig(zero_stage=1, compact_gradients=True),
    "ZeRO-2": StepConfig(zero_stage=2),
    "ZeRO-2, compact": StepConfig(zero_stage=2, compact_gradients=True),
    "ZeRO-1, lean": StepConfig(zero_stage=1, lean_step=TILE),
    "ZeRO-2, lean": StepConfig(zero_stage=2, lean_step=TILE),
    "ZeRO-2, fp32 gradients": StepConfig(zero_stage=2, grad_accum_dtype="fp32"),
    "BF16_Optimizer": StepConfig(zero_stage=1, grad_accum_dtype="fp32"),
    "BF16_Optimizer, immediate": StepConfig(
        zero_stage=1, grad_accum_dtype="fp32", immediate_grad_update=True
    ),
    "BF16_Optimizer, immediate, lean": StepConfig(
        zero_stage=1, grad_accum_dtype="fp32", immediate_grad_update=True, lean_step=TILE
    ),
}
TIMED = {
    **{name: WRAPPERS[name] for name in ("ZeRO-2", "ZeRO-2, compact")},
    "ZeRO-2, lean": StepConfig(lean_step="64MiB"),
    "ZeRO-2, lean, 65,536 elements": StepConfig(lean_step="768KiB"),
    **{name: WRAPPERS[name] for name in ("ZeRO-2, fp32 gradients", "BF16_Optimizer")},
}
STOCK = "stock, default cap"


def groupings(shape: Shape, step: StepConfig, world: int, cap: int) -> dict[str, Case]:
    """The ways to group, by name; planned ones have at most as many groups as one per layer."""
    return {
        "no cap": Case(step, "stock", None, shape),
        STOCK: Case(step, "stock", cap, shape),
        "stock, best cap": Case(step, "stock", best_cap(shape, step, world), shape),
        "per layer": Case(step, "module", None, shape),
        "per expert": Case(step, "expert", None, shape),
        "planned": Case(step, "planned mixed", shape.layers + 1, shape),
    }


def on_meta(shape: Shape) -> torch.nn.Module:
    with torch.device("meta"):
        return Model(shape)


def best_cap(shape: Shape, step: StepConfig, world: int) -> int:
    """The cap with which a step needs the least memory under DeepSpeed's split."""
    model, expert = on_meta(shape), max(shape.expert)
    sharers = world // shape.ep_size
    whole = shape.layers * shape.local * sum(shape.expert)
    caps = {expert * sharers * k for k in range(1, 13)} | {whole // k for k in range(1, 9)}

    def peak(cap: int) -> int:
        groups = make_groups(model, Case(step, "stock", cap, shape), world)
        return estimate_step_memory(groups, step=step, data_parallel_size=world).step_peak

    return min(sorted(caps, reverse=True), key=peak)


def worst_rank(case: Case, world: int) -> int:
    groups = make_groups(on_meta(case.shape), case, world)
    return estimate_step_memory(groups, step=case.step, data_parallel_size=world).worst_rank


def row(wrapper: str, grouping: str, case: Case, rank: int, run: Run) -> dict[str, Any]:
    measured = run.later[-1]
    return {
        "wrapper": wrapper,
        "optimizer": case.step.optimizer,
        "groups": grouping,
        "number of groups": run.group_count,
        "rank": rank,
        "T": measured.transient,
        "R": measured.held,
        "T + R": measured.step_peak,
        "predicted T + R": run.expected.step_peak,
        "first step": run.first.step_peak,
        "predicted first step": run.expected_first.step_peak,
    }


def memory_rows(shape: Shape, world: int, cap: int) -> list[dict[str, Any]]:
    """Run one process for each rank that is the worst rank of some cases."""
    cases = [
        (wrapper, grouping, case)
        for (wrapper, step), kind in product(WRAPPERS.items(), OPTIONS)
        for grouping, case in groupings(
            shape,
            replace(step, optimizer=kind),  # type: ignore[arg-type]
            world,
            cap,
        ).items()
    ]
    by_rank = defaultdict(list)
    for index, (_, _, case) in enumerate(cases):
        by_rank[worst_rank(case, world)].append(index)
    rows: dict[int, dict[str, Any]] = {}
    for rank, indices in by_rank.items():
        runs = run_as_rank(rank, world, run_all, [cases[i][2] for i in indices], 2, timeout=3600)
        rows |= {i: row(*cases[i], rank, run) for i, run in zip(indices, runs, strict=True)}
    return [rows[index] for index in range(len(cases))]


def times_in_turn(cases: list[Case], count: int) -> list[float]:
    """Median ratio of each case's step to the first's; all engines step in turn.

    The order rotates and reverses, because later engines find warmer caches.
    """
    engines, rows = [start(case)[0] for case in cases], []
    for turn in range(count + 3):
        order = [(index + turn) % len(engines) for index in range(len(engines))]
        times: dict[int, float] = {}
        for index in order if turn % 2 else reversed(order):
            engines[index].backward(engines[index]())
            times[index] = milliseconds(engines[index].step)
        rows.append(times)
    return [statistics.median(row[i] / row[0] for row in rows[3:]) for i in range(len(cases))]


def as_many(stock: Case, step: StepConfig, cap: int) -> Case:
    """Our groups with the smallest cap that gives at most as many groups as DeepSpeed's split."""
    model = on_meta(stock.shape)
    most = len(make_groups(model, stock, 2))
    while len(make_groups(model, made := Case(step, "parallel_group", cap, stock.shape), 2)) > most:
        cap += cap // 50
    return made


def time_rows(shape: Shape, cap: int, count: int) -> list[dict[str, Any]]:
    rows = []
    for wrapper, config in TIMED.items():
        step = replace(config, optimizer="fused")
        ways = groupings(shape, step, 2, cap)
        stock = Case(replace(step, compact_gradients=False, lean_step=None), *ways[STOCK][1:])
        ways["ours, as many as stock's"] = as_many(stock, step, cap)
        cases = [stock, *ways.values()]
        ratios = run_in_fresh_processes(2, times_in_turn, cases, count, timeout=3600)[0]
        rows.append(
            {"step time / stock's": wrapper}
            | {name: round(ratio, 2) for name, ratio in zip(ways, ratios[1:], strict=True)}
        )
    return rows


def pivot(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each wrapper and optimizer, with measured T + R in MiB."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for one in rows:
        key = one["wrapper"], one["optimizer"]
        line = lines.setdefault(key, {"T + R, MiB": key[0], "AdamW": key[1], "off by, bytes": 0})
        line[one["groups"]] = f"{one['T + R'] / MIB:.1f}"
        away = abs(one["T + R"] - one["predicted T + R"])
        line["off by, bytes"] = max(away, line.pop("off by, bytes"))
    return list(lines.values())


def memory(world: int, scale: int) -> None:
    rows = memory_rows(
        MODELS["Mixtral-8x7B"].shape(world, scale), world, DEEPSPEED_MAX_GROUP_SIZE // scale**2
    )
    write("step_memory", rows, pivot(rows))
    bars: dict[str, dict[str, float]] = {wrapper: {} for wrapper in WRAPPERS}
    for one in rows:
        if one["optimizer"] == "foreach":
            bars[one["wrapper"]][one["groups"]] = one["T + R"] / MIB
    what = f"Mixtral-8x7B's shape / {scale}, worst of {world} ranks, foreach"
    grouped_bars("step_memory", bars, f"Step peak T + R, MiB: {what}")


def times(scale: int, count: int) -> None:
    small = MODELS["Mixtral-8x7B"].shape(2, scale)._replace(ep_size=1, local=1)
    rows = time_rows(small, DEEPSPEED_MAX_GROUP_SIZE // scale**2, count)
    close_pools()
    write("step_memory_times", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=int, default=16)
    parser.add_argument("--world", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=("memory", "times"))
    given = parser.parse_args()
    if given.only != "times":
        memory(given.world, given.scale)
    if given.only != "memory":
        times(2 * given.scale, given.steps)


if __name__ == "__main__":
    main()
