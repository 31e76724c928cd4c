"""How long does grouping a module take, beside DeepSpeed's own split of its parameters?

Models of DeepSeek-V3's shape on the meta device, all experts on one rank: 58 MoE layers of 256
experts of 3 matrices (60,000 modules, 45,000 parameters), as DeepSpeed's layers and as hand-made,
tagged experts; and smaller models. Both start from the module: ours takes the module, DeepSpeed's
split takes ``list(model.parameters())``. Figures are CPU time; a ratio is the median of the ratios
of pairs, which run one after the other.

    python -m benchmarks.grouping_time [--repeats 7]
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from torch import nn

from benchmarks.report import write
from moe_groups import ExpertTag, MoE, create_moe_param_groups, set_expert_tag
from moe_groups.groups.grouping import DEEPSPEED_MAX_GROUP_SIZE

HIDDEN, INNER = 7168, 2048
SIZES = ((58, 256), (58, 32), (4, 8))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)


def experts_by_hand(layer: int, experts: int) -> nn.Module:
    made = nn.ModuleList(Expert() for _ in range(experts))
    for number, one in enumerate(made):
        for param in one.parameters():
            set_expert_tag(param, ExpertTag("ep_size_1", f"layers.{layer}.moe", number, experts))
    return made


def moe_layer(layer: int, experts: int) -> nn.Module:
    return MoE(HIDDEN, Expert(), num_experts=experts, expert_group_name=f"layers.{layer}.moe")


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "MoE layers": moe_layer,
    "by hand": experts_by_hand,
}


def model(kind: str, layers: int, experts: int) -> nn.Module:
    """Attention matrices, norms, and experts in ``layers`` layers."""
    root = nn.Module()
    with torch.device("meta"):
        root.layers = nn.ModuleList()
        for layer in range(layers):
            block = nn.Module()
            block.attention = nn.Linear(HIDDEN, HIDDEN, bias=False)
            block.norm = nn.LayerNorm(HIDDEN)
            block.experts = KINDS[kind](layer, experts)
            root.layers.append(block)
    return root


def seconds(function: Callable[[], Any]) -> float:
    """CPU time of a call, without freeing its result."""
    gc.collect()
    start = time.process_time()
    result = function()
    elapsed = time.process_time() - start
    del result
    return elapsed


def stock(root: nn.Module, cap: int | None) -> Any:
    params = {"params": list(root.parameters()), "name": "dense"}
    return stock_split(params, cap or DEEPSPEED_MAX_GROUP_SIZE << 20)


def measure(kind: str, root: nn.Module, repeats: int) -> list[dict[str, Any]]:
    create_moe_param_groups(root)  # imports DeepSpeed's wrappers once
    rows = []
    for split_by in ("parallel_group", "module", "expert"):
        for cap in (None, DEEPSPEED_MAX_GROUP_SIZE):
            options: Any = {"split_by": split_by, "max_group_size": cap}
            pairs = [
                (
                    seconds(lambda: stock(root, cap)),  # noqa: B023
                    seconds(lambda: create_moe_param_groups(root, **options)),  # noqa: B023
                )
                for _ in range(repeats)
            ]
            theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
            rows.append(
                {
                    "experts": kind,
                    "modules": sum(1 for _ in root.modules()),
                    "parameters": sum(1 for _ in root.parameters()),
                    "split_by": split_by,
                    "cap": cap or "none",
                    "DeepSpeed's split, ms": round(1e3 * theirs, 1),
                    "ours, ms": round(1e3 * ours, 1),
                    "ours / DeepSpeed's": round(statistics.median(b / a for a, b in pairs), 2),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    rows = []
    for kind in KINDS:
        for size in SIZES:
            rows += measure(kind, model(kind, *size), repeats)
    write("grouping_time", rows)


if __name__ == "__main__":
    main()
