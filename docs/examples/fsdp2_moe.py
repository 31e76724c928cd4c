"""FSDP2 without DeepSpeed: groups by expert, and no group mixes device meshes.

torchrun --nproc-per-node 2 docs/examples/fsdp2_moe.py
"""

import sys

import torch
import torch.distributed._functional_collectives as functional
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_groups import create_moe_param_groups, describe, tag_experts

HIDDEN, EXPERTS = 32, 4


class MoE(nn.Module):
    """Each rank has some of the experts, and gets the tokens of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        count = EXPERTS // distributed.get_world_size()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        group = list(range(distributed.get_world_size()))
        tokens = functional.all_gather_tensor_autograd(x, 0, group)
        probs = self.gate(tokens).softmax(-1)  # (tokens, experts)
        chosen = probs * nn.functional.one_hot(probs.argmax(-1), EXPERTS)
        mine = chosen.split(len(self.experts), -1)[distributed.get_rank()].unbind(-1)
        out = sum(w[:, None] * expert(tokens) for w, expert in zip(mine, self.experts, strict=True))
        return x + functional.reduce_scatter_tensor_autograd(out, "sum", 0, group)


distributed.init_process_group("gloo")
world = distributed.get_world_size()
model = nn.Sequential(MoE(), MoE())
meshes = init_device_mesh("cpu", (1, world), mesh_dim_names=("same_experts", "all_experts"))
for layer in model.children():
    for expert in layer.get_submodule("experts").children():
        shard = fully_shard(expert, mesh=meshes["same_experts"])
        shard.set_gradient_divide_factor(world)  # it gets the tokens of all ranks
fully_shard(model, mesh=meshes["all_experts"])

tag_experts(model, "*.experts", ep_size=world)  # after fully_shard, which makes new parameters
groups = create_moe_param_groups(model, split_by="expert", weight_decay=0.1)
optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=True)
for _ in range(20):
    x = torch.randn(64, HIDDEN)
    loss = (model(x) - x.flip(-1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
if distributed.get_rank() == 0:
    print(f"loss {loss.item():.3f}\n{describe(groups)}")
    print("DeepSpeed was imported:", "deepspeed" in sys.modules)
