"""Train a byte-level GPT with an MoE in every second block over pipeline, tensor, expert and data
parallel ranks, and print its load-balancing losses from all stages.

    torchrun --nproc-per-node 4 docs/examples/pipeline_moe.py --pp 2 --ep 2
    torchrun --nproc-per-node 4 docs/examples/pipeline_moe.py --pp 2 --tp 2 --ep 2 --attach

DP size: ranks / (--pp x --tp). The text is the source of Python's standard library.
"""

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from tabulate import tabulate
from torch import distributed, nn

from moe_groups import (
    CarriedLoss,
    CarryLoss,
    LossTracker,
    MoE,
    attach_loss,
    create_moe_param_groups,
    verify,
)

VOCABULARY = 256  # bytes


class Copied(torch.autograd.Function):
    """Forward: a copy on all tensor-parallel ranks; backward: the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class Summed(torch.autograd.Function):
    """Forward: the sum of the tensor-parallel ranks' parts; backward: a copy of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class Attention(nn.Module):
    """Causal attention; each tensor-parallel rank has some of the heads."""

    def __init__(self, args: argparse.Namespace, grid: PipelineParallelGrid) -> None:
        super().__init__()
        self.group, self.heads = grid.get_slice_parallel_group(), args.heads // args.tp
        width = args.hidden // args.tp
        self.norm = nn.LayerNorm(args.hidden)
        self.qkv = nn.Linear(args.hidden, 3 * width, bias=False)
        self.proj = nn.Linear(width, args.hidden, bias=False)
        cut: list[Any] = [self.qkv.weight, self.proj.weight] if args.tp > 1 else []
        seed = int(torch.randint(2**31, ()))  # the same on all ranks of the stage
        own = torch.Generator().manual_seed(seed + grid.get_slice_parallel_rank())
        for weight in cut:
            nn.init.normal_(weight, std=0.06, generator=own)  # heads differ between ranks
            weight.model_parallel = True  # so that the norm counts each rank's part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        inputs = Copied.apply(self.norm(x), self.group)
        q, k, v = self.qkv(inputs).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + Summed.apply(self.proj(mixed.transpose(1, 2).flatten(2)), self.group)


class Block(nn.Module):
    """Attention and a feed-forward network; in every second block an MoE, with its loss."""

    def __init__(self, args: argparse.Namespace, grid: PipelineParallelGrid, number: int) -> None:
        super().__init__()
        self.attach = args.coefficient if args.attach else None
        self.attention, self.norm = Attention(args, grid), nn.LayerNorm(args.hidden)
        inner = 4 * args.hidden
        ffn = nn.Sequential(nn.Linear(args.hidden, inner), nn.GELU(), nn.Linear(inner, args.hidden))
        if number % 2 == 1:
            ffn = MoE(
                args.hidden,
                ffn,
                num_experts=args.experts,
                ep_size=args.ep,
                k=2,
                expert_group_name=f"blocks.{number}",
            )
        self.ffn = ffn

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.attention(x)
        made = self.ffn(self.norm(x))
        if isinstance(made, torch.Tensor):
            return x + made
        out, loss, _ = made
        if self.attach is not None:
            return x + attach_loss(out, self.attach * loss)
        return x + out, loss


class Embedding(nn.Module):
    """Embeddings of bytes and positions."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, args.hidden)
        self.positions = nn.Embedding(args.length, args.hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]


class Head(nn.Module):
    """Logits over bytes."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(args.hidden)
        self.out = nn.Linear(args.hidden, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def pipeline(args: argparse.Namespace) -> PipelineModule:
    data = distributed.get_world_size() // args.pp // args.tp
    topology = PipeModelDataParallelTopology(args.pp, args.tp, data)
    grid = PipelineParallelGrid(topology=topology)
    layers = [(Embedding, args), *((Block, args, grid, n) for n in range(args.blocks))]
    layers += [(Head, args)]
    wrap: list[Any] = [] if args.attach else [CarryLoss]
    loss_fn = cross_entropy if args.attach else CarriedLoss(cross_entropy, args.coefficient)
    torch.manual_seed(distributed.get_rank() // (args.tp * data))  # equal on the ranks of a stage
    specs = [LayerSpec(*wrap, *layer) for layer in layers]
    return PipelineModule(specs, topology=topology, loss_fn=loss_fn)


def batches(args: argparse.Namespace, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Bytes, and the byte that follows each: both (batch, length)."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(rank)
    while True:
        starts = torch.randint(len(text) - args.length, (args.batch,), generator=generator)
        windows = torch.stack([text[s : s + args.length + 1] for s in starts.tolist()]).long()
        yield windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def start_engine(args: argparse.Namespace) -> Any:
    model = pipeline(args)
    groups = create_moe_param_groups(model, split_by="module", weight_decay=0.1)
    config = {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_accumulation_steps": args.micro_batches,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},  # with ZeRO-1: BF16_Optimizer
        "zero_optimization": {"stage": 1},
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints a lot
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    verify(engine)
    return engine


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "pp": 2,
        "tp": 1,
        "ep": 2,
        "blocks": 4,
        "experts": 4,
        "hidden": 64,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"heads": 4, "length": 64, "batch": 4, "steps": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--coefficient", type=float, default=0.01)
    parser.add_argument("--attach", action="store_true", help="attach the loss, do not carry it")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    deepspeed.init_distributed()
    deepspeed.utils.logger.setLevel("WARNING")
    engine = start_engine(args)
    tracker = LossTracker(
        engine, coefficient=args.coefficient, interval=10, in_loss=not args.attach
    )
    data = batches(args, engine.grid.get_data_parallel_rank())
    for _ in range(args.steps):
        report = tracker.step(engine.train_batch(data))
        if report and distributed.get_rank() == 0:
            print(f"step {report.step}: LM loss {report.lm:.3f}, auxiliary {report.aux:.4f}")
            rows = [
                [name, layer.loss, layer.imbalance, layer.dropped, *layer.shares]
                for name, layer in report.layers.items()
            ]
            experts = [f"expert {n}" for n in range(args.experts)]
            names = ["layer", "balance loss", "imbalance", "dropped", *experts]
            print(tabulate(rows, headers=names, floatfmt=".3f"), flush=True)


if __name__ == "__main__":
    main()
