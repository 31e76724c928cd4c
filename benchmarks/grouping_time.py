"""How long does grouping take, beside DeepSpeed's own split over the same parameters?

A model of DeepSeek-V3's shape on the meta device, all experts on one rank: 58 MoE layers
of 256 experts of 3 matrices (44,544 expert parameters), and a quarter of the experts for
the scaling. Ratios are medians of paired runs.

    python benchmarks/grouping_time.py [--repeats 7]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from torch import nn

from benchmarks.report import write
from moe_groups import ExpertTag, create_moe_param_groups, set_expert_tag
from moe_groups.param_groups import DEEPSPEED_MAX_GROUP_SIZE

HIDDEN, INNER = 7168, 2048


def model(layers: int, experts: int) -> nn.Module:
    """Attention matrices, norms, and ``layers`` lists of ``experts`` SwiGLU experts."""
    root = nn.Module()
    with torch.device("meta"):
        for layer in range(layers):
            block = nn.Module()
            block.attention = nn.Linear(HIDDEN, HIDDEN, bias=False)
            block.norm = nn.LayerNorm(HIDDEN)
            block.experts = nn.ModuleList()
            for number in range(experts):
                expert = nn.Module()
                tag = ExpertTag("ep_size_1", f"layers.{layer}.moe", number, experts)
                for name in ("gate", "up", "down"):
                    linear = nn.Linear(HIDDEN, INNER, bias=False)
                    set_expert_tag(linear.weight, tag)
                    expert.add_module(name, linear)
                block.experts.append(expert)
            root.add_module(f"layer{layer}", block)
    return root


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result  # to free it is not what is measured
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    large, small = model(58, 256), model(58, 64)
    create_moe_param_groups(small.parameters())  # imports DeepSpeed's wrappers once
    rows = []
    for split_by in ("parallel_group", "module", "expert"):
        for cap in (None, DEEPSPEED_MAX_GROUP_SIZE):
            times: dict[str, list[float]] = {"stock": [], "ours": [], "quarter": [], "module": []}
            for _ in range(repeats):
                stock = {"params": list(large.parameters()), "name": "dense"}
                options: Any = {"split_by": split_by, "max_group_size": cap}
                ours, quarter = list(large.parameters()), list(small.parameters())
                times["stock"].append(seconds(lambda: stock_split(stock, cap)))  # noqa: B023
                times["ours"].append(seconds(lambda: create_moe_param_groups(ours, **options)))  # noqa: B023
                times["quarter"].append(
                    seconds(lambda: create_moe_param_groups(quarter, **options))  # noqa: B023
                )
                times["module"].append(seconds(lambda: create_moe_param_groups(large, **options)))  # noqa: B023
            median = {key: statistics.median(values) for key, values in times.items()}
            ratio = statistics.median(
                a / b for a, b in zip(times["ours"], times["stock"], strict=True)
            )
            rows.append(
                {
                    "split_by": split_by,
                    "cap": cap or "none",
                    "parameters": len(ours),
                    "DeepSpeed's split, ms": round(1e3 * median["stock"], 1),
                    "ours, ms": round(1e3 * median["ours"], 1),
                    "ours / DeepSpeed's": round(ratio, 2),
                    "4x parameters / 1x": round(median["ours"] / median["quarter"], 2),
                    "ours from the module, ms": round(1e3 * median["module"], 1),
                }
            )
    write("grouping_time", rows)


if __name__ == "__main__":
    main()
