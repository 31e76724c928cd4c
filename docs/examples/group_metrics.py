"""Print the norms of every layer and expert, and draw them as a map of experts over layers.

torchrun --nproc-per-node 2 docs/examples/group_metrics.py experts.png
"""

import sys

import deepspeed
import torch
from torch import nn

from moe_groups import GroupMetrics, MoE, create_moe_param_groups
from moe_groups.metrics import write_expert_map


class Model(nn.Module):
    """MoE layers with residual connections."""

    def __init__(self, hidden: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.inp = nn.Linear(hidden, hidden)
        self.layers = nn.ModuleList(
            MoE(hidden, nn.Linear(hidden, hidden), num_experts=8, ep_size=2, use_rts=False)
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        target, x, loss = x.flip(-1).tanh(), self.inp(x), torch.zeros(())
        for layer in self.layers:
            out, aux_loss, _ = layer(x)
            x, loss = x + out, loss + 0.01 * aux_loss.float()
        return loss + (x - target).float().square().mean()


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(create_moe_param_groups(model, split_by="module"), lr=1e-3)
config = {
    "train_micro_batch_size_per_gpu": 8,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
metrics = GroupMetrics(engine, interval=10)

torch.manual_seed(torch.distributed.get_rank())
for _ in range(30):
    engine.backward(engine(torch.randn(8, 16, 32, device=engine.device).bfloat16()))
    engine.step()
    report = metrics.step()
    if report and torch.distributed.get_rank() == 0:
        layer = report.layers["layers.3"]
        moved = " ".join(f"{100 * expert.update_ratio:.2f}" for expert in layer.experts if expert)
        print(f"step {report.step}: gradient norm {report.total.grad_norm:.3f}; in layers.3")
        print(f"  {layer.total.grad_norm:.3f}, and experts moved by {moved} %", flush=True)
        if sys.argv[1:]:
            write_expert_map(report, sys.argv[1], "grad_norm")
torch.distributed.destroy_process_group()
