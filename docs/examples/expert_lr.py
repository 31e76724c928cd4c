"""Learning-rate multipliers for experts beside a scheduler; that of one expert grows.

torchrun --nproc-per-node 2 docs/examples/expert_lr.py
"""

import deepspeed
import torch
from torch import nn

from moe_groups import GroupMetrics, GroupSchedule, MoE, create_moe_param_groups


class Model(nn.Module):
    """One MoE layer."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.inp = nn.Linear(hidden, hidden)
        self.moe = MoE(hidden, nn.Linear(hidden, hidden), num_experts=4, ep_size=2, use_rts=False)

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
cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
engine, *_ = deepspeed.initialize(
    model=model, optimizer=optimizer, lr_scheduler=cosine, config=config
)
schedules = [
    ("moe.expert.*", lambda step: {"lr_multiplier": 0.5}),
    ("moe.expert.3", lambda step: {"lr_multiplier": min(1.0, step / 20)}),  # warms up again
]
schedule = GroupSchedule(engine, schedules)
metrics = GroupMetrics(engine, interval=10)

torch.manual_seed(torch.distributed.get_rank())
for _ in range(30):
    schedule.apply()  # before the forward pass of each step
    engine.backward(engine(torch.randn(8, 16, 32, device=engine.device).bfloat16()))
    engine.step()
    report = metrics.step()
    if report and torch.distributed.get_rank() == 0:
        rates = [f"{expert.lr:.2e}" for expert in report.layers["moe"].experts if expert]
        print(
            f"step {report.step}: dense {report.dense['inp'].lr:.2e}, experts", *rates, flush=True
        )
torch.distributed.destroy_process_group()
