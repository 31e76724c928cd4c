"""How much memory does the optimizer step of today's models need on 16 to 1,024 ranks?

Predicted for the full sizes, worst rank, ZeRO-2 with bf16 gradients and AdamW (foreach). A sample
also runs through unmodified DeepSpeed as its worst rank, with a process group that moves no data.
There the elements of every parameter, and so all figures, are divided by ``--divisor``.

    python -m benchmarks.large_world [--divisor 256] [--run-at 64 1024]
"""

import argparse
import shutil
from collections.abc import Iterator
from typing import Any

from benchmarks.models import MODELS, Architecture
from benchmarks.plots import lines
from benchmarks.report import HERE, RESULTS, write
from benchmarks.step_memory import on_meta
from moe_groups import StepConfig, estimate_step_memory
from moe_groups.groups.grouping import DEEPSPEED_MAX_GROUP_SIZE
from moe_groups.memory import StepMemory
from tests.support.fake_world import run_as_rank
from tests.support.step_runs import Case, Shape, make_groups, run_all

GIB = 2**30
WORLDS = (16, 32, 64, 128, 256, 512, 1024)
PLAIN, COMPACT = StepConfig(), StepConfig(compact_gradients=True)


def ways(shape: Shape, divisor: int) -> dict[str, Case]:
    """The groupings; planned ones may mix layers, and have at most as many groups as layers."""
    most = shape.layers + 1
    return {
        "no cap": Case(PLAIN, "stock", None, shape),
        "stock, default cap": Case(PLAIN, "stock", DEEPSPEED_MAX_GROUP_SIZE // divisor, shape),
        "per layer": Case(PLAIN, "module", None, shape),
        "planned": Case(PLAIN, "planned mixed", most, shape),
        "planned, compact": Case(COMPACT, "planned mixed", most, shape),
        "per expert, lean": Case(StepConfig(lean_step=2**26 // divisor), "expert", None, shape),
    }


def predicted(case: Case, world: int) -> StepMemory:
    groups = make_groups(on_meta(case.shape), case, world)
    return estimate_step_memory(groups, step=case.step, data_parallel_size=world)


def row(model: str, architecture: Architecture, world: int) -> dict[str, Any]:
    """Predicted T + R in GiB on the worst rank at full size."""
    shape = architecture.shape(world)
    found: dict[str, Any] = {"model": model, "ranks": world, "EP": shape.ep_size}
    for way, case in ways(shape, 1).items():
        memory = predicted(case, world)
        found[way] = round(memory.step_peak / GIB, 3)
        found[f"groups, {way}"] = len(memory.groups)
    return found


def runs(model: str, architecture: Architecture, world: int, divisor: int) -> Iterator[Any]:
    """Measured T + R of a smaller model, and the predictions for it and for the full size."""
    large = ways(architecture.shape(world), 1)
    for way, case in ways(architecture.shape(world).over(divisor), divisor).items():
        memory = predicted(case, world)
        rank = memory.worst_rank
        (run,) = run_as_rank(rank, world, run_all, [case], 2, timeout=1800)
        measured = run.later[-1].step_peak
        yield {
            "model": f"{model} / {divisor}",
            "ranks": world,
            "groups": way,
            "rank": rank,
            "measured, bytes": measured,
            "predicted, bytes": memory.step_peak,
            "measured at full size, GiB": round(measured * divisor / GIB, 3),
            "predicted at full size, GiB": round(predicted(large[way], world).step_peak / GIB, 3),
        }


def plot(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> None:
    names = list(ways(MODELS["Mixtral-8x7B"].shape(16), 1))
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {
        model: {
            name: [(one["ranks"], one[name]) for one in rows if one["model"] == model]
            for name in names
        }
        for model in MODELS
    }
    points = {
        model: [
            (one["ranks"], one["measured at full size, GiB"])
            for one in measured
            if one["model"].startswith(model)
        ]
        for model in MODELS
    }
    lines(
        "large_world",
        curves,
        "Step peak T + R of the worst rank: ZeRO-2, bf16 gradients, foreach",
        ("ranks", "GiB"),
        points,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--divisor", type=int, default=256)
    parser.add_argument("--run-at", type=int, nargs="*", default=[64, 1024])
    given = parser.parse_args()
    rows = [row(*model, world) for model in MODELS.items() for world in WORLDS]
    shown = [
        {key: value for key, value in one.items() if not key.startswith("groups,")} for one in rows
    ]
    write("large_world", rows, shown)
    measured = [
        one
        for model in MODELS.items()
        for world in given.run_at
        for one in runs(*model, world, given.divisor)
    ]
    plot(rows, measured)
    shutil.copy(RESULTS / "large_world.png", HERE.parent / "docs" / "assets")  # a page shows it
    write("large_world_runs", measured)


if __name__ == "__main__":
    main()
