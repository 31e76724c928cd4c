"""Train a small MoE language model with Accelerate, in groups by expert.

torchrun --nproc-per-node 2 docs/examples/accelerate_moe.py
"""

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import get_scheduler

from moe_groups import MoE, describe, is_norm_or_bias, verify
from moe_groups.integrations.accelerate import group_optimizer

BATCH = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
DEEPSPEED = {**BATCH, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}


class Model(nn.Module):
    """Predicts the next byte with two MoE layers; its loss includes their auxiliary losses."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, hidden), nn.Linear(hidden, 256)
        expert = nn.Sequential(nn.Linear(hidden, 128), nn.SiLU(), nn.Linear(128, hidden))
        self.moe = nn.ModuleList(MoE(hidden, expert, 4, ep_size=2) for _ in range(2))

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        x, aux = self.embedding(data), torch.zeros((), device=data.device)
        for moe in self.moe:
            out, aux_loss, _ = moe(x)
            x, aux = x + out, aux + aux_loss
        logits = self.head(x[:, :-1]).flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, data[:, 1:].flatten()) + 0.01 * aux


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_DEEPSPEED"], gpu = "true", torch.cuda.is_available()
    PartialState(backend=None if gpu else "gloo")  # Accelerate chooses no backend without a GPU
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=DEEPSPEED))
    model = Model()
    # If the config has an "optimizer" block, use accelerate.utils.DummyOptim instead of AdamW.
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    group_optimizer(optimizer, model, split_by="expert", no_decay=is_norm_or_bias)
    schedule = get_scheduler("constant", optimizer)  # after the groups
    data = (torch.arange(64) + torch.randint(256, (480, 1))) % 256  # bytes that count up
    loader = DataLoader(TensorDataset(data), batch_size=8)
    engine, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    verify(engine)
    for step, (batch,) in enumerate(loader, 1):
        accelerator.backward(loss := engine(batch))
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
    accelerator.print(describe(engine))
