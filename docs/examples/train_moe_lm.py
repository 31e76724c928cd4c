"""Train a small byte-level MoE language model with hierarchical param groups on DeepSpeed.

    torchrun --nproc-per-node 2 docs/examples/train_moe_lm.py
    torchrun --nproc-per-node 4 docs/examples/train_moe_lm.py --split-by expert --bf16-optimizer

The text is the source of Python's standard library, or files of your own (--text). After training
the program prints the param groups, and compares one step with DeepSpeed's split and with ours.
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from moe_groups import (
    MoE,
    create_moe_param_groups,
    describe,
    is_norm_or_bias,
    lean_step,
    measure_step_memory,
    verify,
)
from moe_groups.errors import UnsupportedDeepSpeedError

VOCABULARY = 256  # bytes
TILE = "256KiB"  # for a model as small as this; the default of lean_step is 64 MiB


class SwiGLU(nn.Module):
    """One expert: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Causal attention, then a feed-forward network: MoE in every second block."""

    def __init__(self, args: argparse.Namespace, number: int) -> None:
        super().__init__()
        self.heads = args.heads
        self.norm_attention = nn.LayerNorm(args.hidden)
        self.qkv = nn.Linear(args.hidden, 3 * args.hidden)
        self.proj = nn.Linear(args.hidden, args.hidden)
        self.norm_ffn = nn.LayerNorm(args.hidden)
        expert = SwiGLU(args.hidden, args.inner)
        self.is_moe = number % 2 == 1
        if self.is_moe:
            self.ffn: nn.Module = MoE(
                args.hidden,
                expert,
                num_experts=args.experts,
                ep_size=args.ep_size,
                k=2,
                capacity_factor=1.25,
                expert_group_name=f"blocks.{number}",
            )
        else:
            self.ffn = expert

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch, length, hidden = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, hidden / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, hidden))
        if not self.is_moe:
            return x + self.ffn(self.norm_ffn(x)), x.new_zeros(())
        out, aux_loss, _ = self.ffn(self.norm_ffn(x))
        return x + out, aux_loss


class LanguageModel(nn.Module):
    """From bytes to the loss and the mean load-balancing loss, which is 1 if balanced."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, args.hidden)
        self.positions = nn.Embedding(args.length, args.hidden)
        self.blocks = nn.ModuleList(Block(args, number) for number in range(args.blocks))
        self.norm = nn.LayerNorm(args.hidden)
        self.head = nn.Linear(args.hidden, VOCABULARY, bias=False)

    def forward(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = text[:, :-1], text[:, 1:]  # (batch, length)
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        aux_losses = []
        for block in self.blocks:
            x, aux_loss = block(x)
            if block.is_moe:
                aux_losses.append(aux_loss.float())
        logits = self.head(self.norm(x)).float()  # (batch, length, VOCABULARY)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, torch.stack(aux_losses).mean()


def batches(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Random windows of the text, different on each rank: ``(batch, length + 1)`` bytes."""
    files = args.text or sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)
    if len(text) <= args.length + 1:
        raise SystemExit(f"the text has {len(text)} bytes, less than one window: give more --text")
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    while True:
        starts = torch.randint(len(text) - args.length, (args.batch,), generator=generator)
        yield torch.stack([text[s : s + args.length + 1] for s in starts.tolist()]).long()


def deepspeed_config(args: argparse.Namespace, clip: float) -> dict[str, Any]:
    """bf16 with ZeRO-1 or ZeRO-2; with ZeRO-1 and fp32 gradients DeepSpeed uses BF16_Optimizer."""
    return {
        "train_micro_batch_size_per_gpu": args.batch,
        "gradient_clipping": clip,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32" if args.bf16_optimizer else "bf16"},
        "zero_optimization": {
            "stage": 1 if args.bf16_optimizer else args.zero_stage,
            "reduce_bucket_size": 5_000_000,
        },
        "zero_allow_untested_optimizer": True,
    }


def start_engine(
    args: argparse.Namespace, model: nn.Module, groups: list[dict[str, Any]], clip: float = 1.0
) -> Any:
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config(args, clip)
    )
    return engine


def train(args: argparse.Namespace, engine: Any, data: Iterator[torch.Tensor]) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokens_per_step = args.batch * args.length * world
    with tqdm(total=args.steps, disable=rank != 0, unit="step") as bar:
        began = time.perf_counter()
        for step in range(args.steps):
            loss, aux_loss = engine(next(data).to(engine.device))
            engine.backward(loss + args.aux_weight * aux_loss)
            engine.step()
            speed = tokens_per_step * (step + 1) / (time.perf_counter() - began)
            bar.set_postfix(
                loss=f"{loss.item():.3f}",
                balance=f"{aux_loss.item():.3f}",
                tokens_per_s=f"{speed:,.0f}",
            )
            bar.update()


def one_step(
    args: argparse.Namespace, engine: Any, batch: torch.Tensor, label: str
) -> dict[str, Any]:
    """Loss, memory and time of a step, after one that creates the optimizer's state."""
    torch.manual_seed(0)  # the gate draws noise
    peaks, times = [], []
    for _ in range(3):
        loss, aux_loss = engine(batch.to(engine.device))
        engine.backward(loss + args.aux_weight * aux_loss)
        with measure_step_memory(engine.device) as memory:
            engine.step()
        peaks.append(memory.step_peak)
    for _ in range(5):
        engine.backward(engine(batch.to(engine.device))[0])
        torch.distributed.barrier()
        began = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - began)
    # The lower of the last two: gloo may release a bucket only after the step has begun.
    worst = torch.tensor(min(peaks[1:]), device=engine.device)
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    table = describe(engine)
    assert table.largest is not None
    return {
        "param groups": label,
        "number": len(table.rows),
        "largest partition": f"{table.largest.partition_bytes / 1024:,.0f} KiB",
        "step peak T + R": f"{worst.item() / 1024:,.0f} KiB",
        "loss": f"{loss.item():.9g}",
        "time": f"{1e3 * statistics.median(times):.0f} ms",
    }


def make_groups(
    args: argparse.Namespace, model: nn.Module, split_by: Any, cap: int | None
) -> list[dict[str, Any]]:
    return create_moe_param_groups(
        model,
        split_by=split_by,
        max_group_size=cap,
        weight_decay=0.1,
        no_decay=is_norm_or_bias,
    )


def stock_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The same decay rule with DeepSpeed's own split."""
    named = list(model.named_parameters())
    decay = [p for n, p in named if not is_norm_or_bias(n, p)]
    no_decay = [p for n, p in named if is_norm_or_bias(n, p)]
    return split_params_into_different_moe_groups_for_optimizer(
        [
            {"params": decay, "weight_decay": 0.1, "name": "decay"},
            {"params": no_decay, "weight_decay": 0.0, "name": "no_decay"},
        ]
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--zero-stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--bf16-optimizer", action="store_true", help="BF16_Optimizer, not ZeRO")
    parser.add_argument("--ep-size", type=int, default=2, help="ranks that share the experts")
    parser.add_argument(
        "--split-by", choices=("parallel_group", "module", "expert"), default="module"
    )
    parser.add_argument("--max-group-size", type=int, default=250_000, help="elements")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument(
        "--text", type=Path, nargs="+", help="text files; default: Python's library"
    )
    for name, value in {
        "batch": 4,
        "length": 128,
        "blocks": 4,
        "hidden": 128,
        "inner": 256,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--aux-weight", type=float, default=0.01)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    deepspeed.init_distributed()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if args.blocks < 2:
        raise SystemExit("--blocks must be at least 2: every second block has experts")
    if world % args.ep_size or args.experts % args.ep_size:
        raise SystemExit(
            f"--ep-size {args.ep_size} must divide the {world} ranks and {args.experts} experts"
        )
    deepspeed.utils.logger.setLevel("WARNING")
    torch.manual_seed(1234 + rank)  # experts differ; DeepSpeed broadcasts shared parameters
    model = LanguageModel(args)
    data = batches(args)

    trained = copy.deepcopy(model)
    groups = make_groups(args, trained, args.split_by, args.max_group_size)
    engine = start_engine(args, trained, groups)
    verify(engine)
    train(args, engine, data)
    if rank == 0:
        print(f"\nThe param groups, split by {args.split_by}:\n{describe(engine)}\n")

    batch = next(data)
    rows, missing = [], ""
    for label, groups_of, lean in (
        ("DeepSpeed's split", stock_groups, False),
        ("moe-groups", lambda m: make_groups(args, m, args.split_by, args.max_group_size), False),
        ("by expert, lean_step", lambda m: make_groups(args, m, "expert", None), True),
        ("no split, lean_step", lambda m: make_groups(args, m, "parallel_group", None), True),
    ):
        again = copy.deepcopy(model)
        # Without clipping: it divides by the norm, whose last bit depends on the groups' order.
        engine = start_engine(args, again, groups_of(again), clip=0.0)
        if lean:
            try:
                lean_step(engine, TILE)
            except UnsupportedDeepSpeedError as error:  # it is for 0.19.8 and newer
                missing = f"\nNo rows with lean_step: {error}"
                break
        rows.append(one_step(args, engine, batch, label))
    if rank == 0:
        print("One step from the same weights on the same batch (worst rank):")
        print(tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True) + missing)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
