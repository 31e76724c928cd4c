"""Train a transformers Qwen3-MoE with Accelerate and AutoEP; the experts have their own rate.

torchrun --nproc-per-node 2 docs/examples/autoep_accelerate.py
"""

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin
from torch.utils.data import DataLoader, TensorDataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, get_scheduler

from moe_groups import describe, is_norm_or_bias, verify
from moe_groups.integrations.accelerate import group_optimizer

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_DEEPSPEED"], gpu = "true", torch.cuda.is_available()
    PartialState(backend=None if gpu else "gloo")  # Accelerate chooses no backend without a GPU
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=DEEPSPEED))
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=256, **SIZES, **HEADS, **EXPERTS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    overrides = [("*.mlp.experts", {"lr": 1e-3}), ("*.mlp.gate", {"lr": 3e-4})]
    group_optimizer(optimizer, model, overrides=overrides, no_decay=is_norm_or_bias)
    schedule = get_scheduler("constant", optimizer)  # after the groups
    data = (torch.arange(64) + torch.randint(256, (320, 1))) % 256  # bytes that count up
    loader = DataLoader(TensorDataset(data), batch_size=8)
    engine, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    verify(engine)
    for step, (tokens,) in enumerate(loader, 1):
        accelerator.backward(loss := engine(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        schedule.step()
        if step % 5 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.3f}")
    accelerator.print(describe(engine))
