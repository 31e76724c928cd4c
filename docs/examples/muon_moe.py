"""Muon for the matrices of an MoE model, with groups by expert, and Adam for the rest.

torchrun --nproc-per-node 2 docs/examples/muon_moe.py
"""

import deepspeed
import torch
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import Tensor, nn

from moe_groups import MoE, create_moe_param_groups, describe, split_for_muon, verify


class Model(nn.Module):
    """Predicts the next token."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, hidden)
        self.norm = nn.LayerNorm(hidden)
        ffn = nn.Sequential(nn.Linear(hidden, 64), nn.SiLU(), nn.Linear(64, hidden))
        self.moe = nn.ModuleList(MoE(hidden, ffn, num_experts=4, ep_size=2) for _ in range(2))
        self.head = nn.Linear(hidden, 64)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x, total = self.embed(tokens), torch.zeros((), device=tokens.device)
        for layer in self.moe:
            out, aux_loss, _ = layer(self.norm(x))
            x, total = x + out, total + 0.01 * aux_loss
        return total + nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


deepspeed.init_distributed()
if not torch.cuda.is_available():
    torch.compiler.set_stance("force_eager")  # compiling Muon for a CPU takes a minute
torch.manual_seed(0)
model = Model()
halves = split_for_muon(
    model, muon={"lr": 0.02, "weight_decay": 0.01}, adam={"lr": 3e-3, "betas": (0.9, 0.95)}
)
groups = create_moe_param_groups(halves, split_by="module")
config = {"train_batch_size": 16, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
engine, *_ = deepspeed.initialize(model=model, optimizer=MuonWithAuxAdam(groups), config=config)
verify(engine)
if engine.global_rank == 0:
    print(describe(engine))
start = torch.arange(8, device=engine.device)[:, None] * 7
for step in range(20):
    tokens = (start + step + torch.arange(17, device=engine.device)) % 64
    loss = engine(tokens[:, :-1], tokens[:, 1:])
    engine.backward(loss)
    engine.step()
    if step % 5 == 4 and engine.global_rank == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}")
