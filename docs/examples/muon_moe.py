"""Muon for the matrices of a MoE model, each expert's of its own, and Adam for the rest.

torchrun --nproc-per-node 2 docs/examples/muon_moe.py
"""

import deepspeed
import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import nn

from moe_groups import MoE, create_moe_param_groups, describe, verify
from moe_groups.muon import split_for_muon


class Block(nn.Module):
    """A norm and an MoE layer, with a residual."""

    def __init__(self, hidden=32):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        ffn = nn.Sequential(nn.Linear(hidden, 64), nn.SiLU(), nn.Linear(64, hidden))
        self.moe = MoE(hidden, ffn, num_experts=4, ep_size=2, k=2)

    def forward(self, x):
        out, aux_loss, _ = self.moe(self.norm(x))
        return x + out, 0.01 * aux_loss


class Model(nn.Module):
    """Says which token comes next."""

    def __init__(self, hidden=32):
        super().__init__()
        self.embed = nn.Embedding(64, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(2))
        self.head = nn.Linear(hidden, 64)

    def forward(self, tokens, targets):
        x, total = self.embed(tokens), 0.0
        for block in self.blocks:
            x, aux_loss = block(x)
            total = total + aux_loss
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten()) + total


deepspeed.init_distributed()
torch.compiler.set_stance("default" if torch.cuda.is_available() else "force_eager")
torch.manual_seed(0)
model = Model()
halves = split_for_muon(model, muon={"lr": 0.02, "weight_decay": 0.01}, adam={"lr": 3e-3})
groups = create_moe_param_groups(halves, split_by="module")
config = {"train_batch_size": 16, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
engine, *_ = deepspeed.initialize(model=model, optimizer=MuonWithAuxAdam(groups), config=config)
verify(engine)
if engine.global_rank == 0:
    print(describe(engine))
for step in range(20):
    tokens = torch.arange(8, device=engine.device)[:, None] * 7 + torch.arange(17).to(engine.device)
    loss = engine(tokens[:, :-1] % 64, tokens[:, 1:] % 64)
    engine.backward(loss)
    engine.step()
    if step % 5 == 4 and engine.global_rank == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
