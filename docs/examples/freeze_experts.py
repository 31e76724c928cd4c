"""In the middle of a run, freeze all experts of a layer but two.

torchrun --nproc-per-node 2 docs/examples/freeze_experts.py
"""

import deepspeed
import torch
from torch import nn

from moe_groups import GroupMetrics, MoE, create_moe_param_groups, set_group_options


class Model(nn.Module):
    """One MoE layer."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.inp = nn.Linear(hidden, hidden)
        self.moe = MoE(hidden, nn.Linear(hidden, hidden), num_experts=8, ep_size=2, use_rts=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, aux_loss, _ = self.moe(self.inp(x))
        return (out - x.flip(-1).tanh()).float().square().mean() + 0.01 * aux_loss


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(create_moe_param_groups(model, split_by="expert"), lr=1e-3)
config = {
    "train_micro_batch_size_per_gpu": 8,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
metrics = GroupMetrics(engine, interval=1)
torch.manual_seed(torch.distributed.get_rank())


def train(when: str, steps: int = 10) -> None:
    """Train, and print which of the 8 experts moved."""
    moved: set[int] = set()
    for _ in range(steps):
        engine.backward(engine(torch.randn(8, 16, 32, device=engine.device).bfloat16()))
        engine.step()
        report = metrics.step()
        experts = report.layers["moe"].experts if report else ()
        moved |= {n for n, expert in enumerate(experts) if expert and expert.update_norm}
    if torch.distributed.get_rank() == 0:
        print(f"{when} moved: {sorted(moved)}", flush=True)


train("at first")
set_group_options(engine, "moe.expert.*", frozen=True)
for number in (2, 5):  # global numbers: each of the two ranks has one
    set_group_options(engine, f"moe.expert.{number}", frozen=False)
train("all but two frozen")
torch.distributed.destroy_process_group()
