"""AutoEP: DeepSpeed distributes the experts of a transformers Mixtral; one group for each layer.

torchrun --nproc-per-node 2 docs/examples/autoep_mixtral.py
"""

import os
from pathlib import Path

import deepspeed
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from moe_groups import describe, is_norm_or_bias, verify
from moe_groups.integrations.autoep import autoep_optimizer

deepspeed.init_distributed()
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = MixtralForCausalLM(
    MixtralConfig(
        vocab_size=256,  # bytes
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
)
config = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "mixtral"},
    "zero_allow_untested_optimizer": True,
}
optimizer = autoep_optimizer(
    model,
    lambda groups: torch.optim.AdamW(groups, lr=3e-3),
    split_by="module",
    weight_decay=0.1,
    no_decay=is_norm_or_bias,
)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
verify(engine)

text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
generator = torch.Generator().manual_seed(rank)
for step in range(20):
    starts = torch.randint(len(text) - 64, (4,), generator=generator)
    tokens = torch.stack([text[start : start + 64] for start in starts])
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    if rank == 0 and step % 19 == 0:
        print(f"step {step}: loss {loss.item():.3f}", flush=True)
table = describe(engine)
if rank == 0:
    print(table)
