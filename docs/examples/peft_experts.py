"""LoRA adapters inside of experts: each expert's adapters are a group, the base is frozen.

torchrun --nproc-per-node 2 docs/examples/peft_experts.py
"""

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.optim.lr_scheduler import LinearLR

from moe_groups import MoE, create_moe_param_groups, describe, verify

CONFIG = {"train_batch_size": 512, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}


class FFN(nn.Module):
    """An expert."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class Model(nn.Module):
    """A model that learns to reverse its input."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.inp = nn.Linear(hidden, hidden)
        self.moe = nn.ModuleList(MoE(hidden, FFN(hidden), 4, ep_size=2) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, total = self.inp(x), x.new_zeros(())
        for moe in self.moe:
            out, aux_loss, _ = moe(h)
            h, total = h + out, total + aux_loss
        return nn.functional.mse_loss(h.float(), x.flip(-1).float()) + 0.01 * total


if __name__ == "__main__":
    deepspeed.init_distributed()
    lora = LoraConfig(r=4, target_modules=["inp", "up", "down"])
    model = get_peft_model(Model(), lora)  # before the groups
    groups = create_moe_param_groups(model, split_by="expert")
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = LinearLR(optimizer, total_iters=10)
    options = {"optimizer": optimizer, "lr_scheduler": schedule, "config": CONFIG}
    engine, *_ = deepspeed.initialize(model=model, **options)
    verify(engine)
    for step in range(40):
        engine.backward(loss := engine(torch.randn(256, 64, device=engine.device).bfloat16()))
        engine.step()
        if step % 10 == 9 and distributed.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if distributed.get_rank() == 0:
        print(describe(engine))
