"""A pipeline of MoE blocks on real DeepSpeed, with the auxiliary loss as a second activation."""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import nn

from moe_groups import MoE, create_moe_param_groups
from tests.support.models import FFN, HIDDEN
from tests.support.training import config, initialize

Pair = tuple[torch.Tensor, torch.Tensor]


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> Pair:
        y = self.linear(x)
        return y, y.float().sum() * 0  # attached to the graph, as PipelineEngine requires


class Block(nn.Module):
    def __init__(self, name: str, ep_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = MoE(
            HIDDEN,
            FFN(),
            num_experts=4,
            ep_size=ep_size,
            k=1,
            use_rts=False,
            expert_group_name=name,
        )

    def forward(self, pair: Pair) -> Pair:
        x, total = pair
        y, loss, _ = self.moe(self.norm(x))
        return x + y, total + loss


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, pair: Pair) -> Pair:
        return self.linear(pair[0]), pair[1]


def both_losses(output: Pair, wanted: torch.Tensor) -> torch.Tensor:
    return (output[0] - wanted).square().float().mean() + 0.01 * output[1]


def start_pipeline(
    wrapper: str, split: str, stages: int, blocks: int = 4, ep_size: int = 2, **options: Any
) -> Any:
    """An engine over ``stages`` stages; the other ranks are data-parallel.

    Args:
        options: further options of the ``PipelineModule``.
    """
    torch.manual_seed(0)
    specs = [LayerSpec(Block, f"block{i}", ep_size) for i in range(blocks)]
    model = PipelineModule(
        layers=[LayerSpec(First), *specs, LayerSpec(Last)],
        loss_fn=both_losses,
        topology=PipeDataParallelTopology(
            num_pp=stages, num_dp=torch.distributed.get_world_size() // stages
        ),
        partition_method="uniform",
        **options,
    )
    groups = create_moe_param_groups(model, split_by=split)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    changes = {"gradient_clipping": 0.0, "gradient_accumulation_steps": 2}
    return initialize(model, optimizer, config(wrapper, **changes))


def train_pipeline(engine: Any, steps: int, first: int = 0) -> list[float]:
    """Train ``steps`` steps, and return the losses; data depend on the step and the DP rank."""
    batches = _batches(first * engine.gradient_accumulation_steps(), engine)
    return [float(engine.train_batch(batches)) for _ in range(steps)]


def _batches(first: int, engine: Any) -> Iterator[Pair]:
    place = engine.grid.get_data_parallel_rank()
    while True:
        generator = torch.Generator().manual_seed(1000 * first + place)
        x = torch.randn(4, 6, HIDDEN, generator=generator).bfloat16()
        yield x, torch.tanh(x.flip(-1))
        first += 1
