"""Train a transformers Mixtral through Trainer; AutoEP distributes the experts of each layer.

torchrun --nproc-per-node 2 docs/examples/autoep_trainer.py
"""

import os
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate import PartialState
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments

from moe_groups import describe
from moe_groups.integrations.hf_trainer import MoETrainer

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}


def rows_of_text(length: int = 64) -> list[dict[str, torch.Tensor]]:
    """The source of a module of Python, as bytes."""
    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    rows = text[: len(text) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_DEEPSPEED"], gpu = "true", torch.cuda.is_available()
    PartialState(backend=None if gpu else "gloo")  # Accelerate chooses no backend without a GPU
    options: dict[str, Any] = {"accelerator_config": {"use_configured_state": True}}
    options |= {"max_steps": 20, "logging_steps": 5, "save_strategy": "no", "disable_tqdm": True}
    options |= {"learning_rate": 3e-3, "weight_decay": 0.1, "bf16": True, "use_cpu": not gpu}
    trainer = MoETrainer(
        model=MixtralForCausalLM(MixtralConfig(vocab_size=256, **SIZES, **HEADS)),
        args=TrainingArguments(mkdtemp(), deepspeed=DEEPSPEED, **options),
        train_dataset=rows_of_text(),
        group_options={"split_by": "module"},  # a group for each layer's experts
    )
    trainer.train()
    trainer.accelerator.print(describe(trainer.deepspeed))
    trainer.save_model()  # the whole model, for from_pretrained
