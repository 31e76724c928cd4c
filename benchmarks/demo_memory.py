"""The demo's language model: peak memory, allocated memory and run time, beside DeepSpeed's.

The table that users of MoE training publish. Two gloo ranks; the
same weights and batches in all runs, worst rank. Memory is that of the whole iteration, whose
peak may be in the backward pass, and of the step alone; times are medians of steps in turn.

    python -m benchmarks.demo_memory [--steps 10]
"""

import argparse
import copy
import statistics
import sys
from functools import partial
from typing import Any

import torch

from benchmarks.report import write
from benchmarks.timing import milliseconds
from tests.support import ROOT
from tests.support.ranks import close_pools, run_in_fresh_processes

WAYS = (
    "DeepSpeed's split",
    "moe-groups, by layer",
    "planned",
    "planned, compact gradients",
    "by expert, lean_step",
)


def demo_arguments(*options: str) -> argparse.Namespace:
    """Those of the demo, which can be imported from now on."""
    sys.path.insert(0, str(ROOT / "docs" / "examples"))
    import train_moe_lm as demo

    before, sys.argv = sys.argv, [demo.__name__, *options]
    try:
        return demo.parse_args()
    finally:
        sys.argv = before


def groups_of(way: str, demo: Any, args: argparse.Namespace, model: torch.nn.Module) -> Any:
    from moe_groups import (
        StepConfig,
        create_moe_param_groups,
        is_norm_or_bias,
        plan_param_groups,
    )

    if way == "DeepSpeed's split":
        return demo.stock_groups(model)
    rules: dict[str, Any] = {"weight_decay": 0.1, "no_decay": is_norm_or_bias}
    if way == "by expert, lean_step":
        return create_moe_param_groups(model, split_by="expert", **rules)
    if way == "moe-groups, by layer":
        return create_moe_param_groups(model, max_group_size=args.max_group_size, **rules)
    step = StepConfig(
        optimizer="fused",
        compact_gradients="compact" in way,
        gather_copies=torch.distributed.get_backend() == "gloo",
    )
    plan = plan_param_groups(model, max_groups=12, step=step, **rules)
    return plan.groups_of(model)


def measure(steps: int) -> list[tuple[int, int, int, int, float]]:
    """By way: groups, peak of the iteration, of the step, bytes that stay, milliseconds."""
    args = demo_arguments("--hidden=256", "--inner=512")  # its weights should matter
    import deepspeed
    import train_moe_lm as demo

    from moe_groups import compact_gradients, lean_step

    deepspeed.utils.logger.setLevel("ERROR")
    torch.manual_seed(torch.distributed.get_rank())
    model = demo.LanguageModel(args)
    batch = next(demo.batches(args))
    engines = []
    for way in WAYS:
        again = copy.deepcopy(model)
        engine = demo.start_engine(args, again, groups_of(way, demo, args, again))
        if "compact" in way:
            compact_gradients(engine)
        elif "lean" in way:
            lean_step(engine, "1MiB")
        engines.append(engine)
    for engine in engines:
        iteration(engine, batch)
    times = [
        [milliseconds(partial(iteration, engine, batch)) for engine in engines]
        for _ in range(steps)
    ]
    return [
        (
            len(engine.optimizer.param_groups),
            *memory_of(engine, batch),
            statistics.median(row[index] for row in times),
        )
        for index, engine in enumerate(engines)
    ]


def iteration(engine: Any, batch: torch.Tensor) -> None:
    loss, aux_loss = engine(batch.to(engine.device))
    engine.backward(loss + 0.01 * aux_loss)
    engine.step()


def memory_of(engine: Any, batch: torch.Tensor) -> tuple[int, int, int]:
    """Peaks of an iteration and of its step above the bytes that stay, and these."""
    from moe_groups import measure_step_memory
    from moe_groups.memory import measure_iteration_memory

    with measure_iteration_memory(engine.device) as whole:
        iteration(engine, batch)
    peaks = []
    for _ in range(2):  # gloo may release a bucket only after the step has begun
        loss, aux_loss = engine(batch.to(engine.device))
        engine.backward(loss + 0.01 * aux_loss)
        del loss, aux_loss
        with measure_step_memory(engine.device) as step:
            engine.step()
        peaks.append(step.step_peak)
    return whole.peak - whole.before, min(peaks), resident(engine)


def resident(engine: Any) -> int:
    """Bytes of weights, master weights and optimizer state on this rank."""
    optimizer = engine.optimizer
    tensors = [*optimizer.bit16_groups_flat, *optimizer.single_partition_of_fp32_groups]
    for state in optimizer.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors)


def less(ours: float, stock: float) -> str:
    return f"{100 * (1 - ours / stock):.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    ranks = run_in_fresh_processes(2, measure, parser.parse_args().steps, timeout=900)
    close_pools()
    worst = [tuple(map(max, zip(*rows, strict=True))) for rows in zip(*ranks, strict=True)]
    _, peak, step_peak, _, stock_time = worst[0]
    write(
        "demo_memory",
        [
            {
                "param groups": way,
                "number": found[0],
                "peak memory of an iteration, MiB": f"{found[1] / 2**20:.1f}",
                "less by": less(found[1], peak),
                "of the step, MiB": f"{found[2] / 2**20:.1f}",
                "step less by": less(found[2], step_peak),
                "allocated between steps, MiB": f"{found[3] / 2**20:.1f}",
                "iteration, ms": f"{found[4]:.0f}",
                "time / DeepSpeed's": f"{found[4] / stock_time:.2f}",
            }
            for way, found in zip(WAYS, worst, strict=True)
        ],
    )


if __name__ == "__main__":
    main()
