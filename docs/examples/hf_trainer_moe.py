"""Train a small Llama with MoE layers through Hugging Face's Trainer, in groups by expert.

torchrun --nproc-per-node 2 docs/examples/hf_trainer_moe.py
"""

import os
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from moe_groups import MoE, describe
from moe_groups.integrations.hf_trainer import MoETrainer

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BATCH = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
CONFIG = {**BATCH, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}


class FFN(MoE):
    """Replaces Llama's MLP; keeps the load-balancing loss for the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, self.aux_loss, _ = super().forward(x)
        return out


class MoELlama(LlamaForCausalLM):
    """Its loss includes the auxiliary losses of all layers."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            expert = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
            layer.mlp = FFN(64, expert, num_experts=4, ep_size=2, k=2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        out = super().forward(input_ids=input_ids, labels=labels)
        out.loss = out.loss + 0.01 * sum(layer.mlp.aux_loss for layer in self.model.layers)
        return out


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_DEEPSPEED"], gpu = "true", torch.cuda.is_available()
    PartialState(backend=None if gpu else "gloo")  # Accelerate chooses no backend without a GPU
    data = (torch.arange(64) + torch.randint(256, (200, 1))) % 256  # bytes that count up
    options: dict[str, Any] = {"accelerator_config": {"use_configured_state": True}}
    options |= {"max_steps": 20, "logging_steps": 5, "save_strategy": "no", "disable_tqdm": True}
    options |= {"learning_rate": 3e-3, "weight_decay": 0.1, "lr_scheduler_type": "constant"}
    trainer = MoETrainer(
        model=MoELlama(LlamaConfig(vocab_size=256, **SIZES)),
        args=TrainingArguments(mkdtemp(), deepspeed=CONFIG, bf16=True, use_cpu=not gpu, **options),
        train_dataset=[{"input_ids": row, "labels": row} for row in data],
        group_options={"split_by": "expert", "overrides": [("*.expert.0", {"lr": 1e-3})]},
    )
    trainer.train()
    trainer.accelerator.print(describe(trainer.deepspeed))
