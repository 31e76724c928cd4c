"""Supervised fine-tuning with TRL: LoRA on attention, all experts frozen, ZeRO-3.

torchrun --nproc-per-node 2 docs/examples/trl_lora_zero3.py
"""

import os
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from moe_groups import describe
from moe_groups.integrations.hf_trainer import MoETrainer

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3},
    "expert_parallel": {"enabled": True, "autoep_size": 2},
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}


class MoESFTTrainer(MoETrainer, SFTTrainer):
    """TRL's trainer with MoE groups."""


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_DEEPSPEED"], gpu = "true", torch.cuda.is_available()
    PartialState(backend=None if gpu else "gloo")  # Accelerate chooses no backend without a GPU
    words = Tokenizer(models.WordLevel({str(word): word for word in range(64)}, unk_token="0"))
    options: dict[str, Any] = {"accelerator_config": {"use_configured_state": True}}
    options |= {"max_steps": 20, "logging_steps": 5, "save_strategy": "no", "disable_tqdm": True}
    options |= {"learning_rate": 3e-2, "bf16": True, "use_cpu": not gpu}
    starts = torch.randint(64, (160, 1))
    rows = ((torch.arange(32) + starts) % 64).tolist()  # numbers that count up
    trainer = MoESFTTrainer(
        model=MixtralForCausalLM(MixtralConfig(vocab_size=64, **SIZES, **HEADS)),
        args=SFTConfig(mkdtemp(), deepspeed=DEEPSPEED, **options),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0"),
        peft_config=LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    trainer.train()
    trainer.accelerator.print(describe(trainer.deepspeed))
    trainer.save_model()  # the adapters
