"""Continue training a Mixtral checkpoint with its experts distributed over two ranks.

    torchrun --nproc-per-node 2 docs/examples/load_mixtral_experts.py

The program makes a tiny checkpoint of random weights: replace it by your own folder.
"""

import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import distributed
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralMLP

from moe_groups import MoE, create_moe_param_groups, load_experts, save_experts


class Block(MoE):
    """DeepSpeed's layer in place of Mixtral's, which returns only its output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(x)[0]
        return out


deepspeed.init_distributed()
rank, box = distributed.get_rank(), [tempfile.mkdtemp()]
distributed.broadcast_object_list(box)  # one directory for all ranks
source, target = Path(box[0], "mixtral"), Path(box[0], "trained")
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=4)
if rank == 0:
    MixtralForCausalLM(config).save_pretrained(source)
distributed.barrier()

# Mixtral's own blocks are replaced; with one expert each, no rank allocates all experts.
config.num_local_experts = 1
model = MixtralForCausalLM(config)
routing: dict[str, Any] = {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False}
for layer in model.model.layers:
    layer.mlp = Block(64, MistralMLP(config), num_experts=8, ep_size=2, **routing)
print(f"rank {rank}: {load_experts(model, source)}", flush=True)

optimizer = torch.optim.AdamW(create_moe_param_groups(model), lr=1e-3)
settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
tokens = torch.randint(256, (4, 32), device=engine.device)
for _ in range(3):
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
files = save_experts(engine, target, family="mixtral")
print(f"rank {rank} wrote {', '.join(file.name for file in files)}", flush=True)
