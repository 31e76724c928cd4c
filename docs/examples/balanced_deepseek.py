"""Train a transformers DeepSeek-V3 under AutoEP; a bias keeps the loads of its experts even.

torchrun --nproc-per-node 2 docs/examples/balanced_deepseek.py
"""

import os
from pathlib import Path

import deepspeed
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moe_groups import LossTracker, balance_experts, is_norm_or_bias
from moe_groups.integrations.autoep import autoep_optimizer

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "expert_parallel": {"enabled": True, "autoep_size": 2},
}
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
CHOICE = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
WIDTHS = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}

deepspeed.init_distributed()
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **EXPERTS, **CHOICE, **HEADS, **WIDTHS))
optimizer = autoep_optimizer(
    model,
    lambda groups: torch.optim.AdamW(groups, lr=3e-3),
    split_by="module",
    weight_decay=0.1,
    no_decay=is_norm_or_bias,
)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
balance_experts(engine, rate=1e-2)
tracker = LossTracker(engine, interval=20)

text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
generator = torch.Generator().manual_seed(rank)
for step in range(1, 61):
    starts = torch.randint(len(text) - 64, (4,), generator=generator)
    tokens = torch.stack([text[start : start + 64] for start in starts])
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()
    report = tracker.step(loss)
    if report and rank == 0:
        worst = max(layer.imbalance for layer in report.layers.values())
        print(f"step {step}: loss {loss.item():.3f}, imbalance {worst:.2f}", flush=True)
