"""Small transformers models that AutoEP knows, with random weights."""

from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 64
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
_DEEPSEEK = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
PRESETS = {
    "mixtral": "mixtral",
    "qwen2": "qwen3_moe",
    "qwen3": "qwen3_moe",
    "deepseek": "deepseek_v3",
    "deepseek2": "deepseek_v2",
    "qwen3.5": "qwen3_5_moe",
    "minimax": "minimax_m3",
}


def make_model(kind: str) -> Any:
    """A model with 4 experts in each MoE layer, and the same weights on every rank."""
    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**_SHAPE, num_local_experts=4))
    if kind == "qwen3":
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**_SHAPE, head_dim=16, moe_intermediate_size=24, num_experts=4)
        )
    if kind == "qwen2":  # has a shared expert with a gate; one tensor for tokens in and out
        sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
        return Qwen2MoeForCausalLM(
            Qwen2MoeConfig(**_SHAPE, **sizes, num_experts=4, tie_word_embeddings=True)
        )
    if kind == "qwen3.5":
        return _qwen3_5()
    if kind == "minimax":
        return _minimax()
    if kind == "deepseek2":
        return DeepseekV2ForCausalLM(DeepseekV2Config(**_SHAPE, **_DEEPSEEK))
    return DeepseekV3ForCausalLM(DeepseekV3Config(**_SHAPE, **_DEEPSEEK, n_group=2, topk_group=1))


def _qwen3_5() -> Any:
    from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    sizes = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "head_dim": 16}
    layers = ["full_attention"] * 2
    return Qwen3_5MoeForCausalLM(
        Qwen3_5MoeTextConfig(**_SHAPE, **sizes, num_experts=4, layer_types=layers)
    )


def _minimax() -> Any:
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as minimax

    config = minimax.MiniMaxM3VLTextConfig(**_SHAPE, head_dim=16, num_local_experts=4)
    return minimax.MiniMaxM3VLForCausalLM(config)


def autoep_config(kind: str, wrapper: str, autoep_size: int = 2) -> dict[str, Any]:
    """A DeepSpeed config; ``wrapper`` is "zero1", "zero2", "zero3" or "bf16"."""
    stage = 1 if wrapper == "bf16" else int(wrapper[-1])
    return {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32" if wrapper == "bf16" else "bf16"},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # the norm's last bit depends on the groups
        "zero_allow_untested_optimizer": True,
        "expert_parallel": {
            "enabled": True,
            "autoep_size": autoep_size,
            "preset_model": PRESETS[kind],
        },
    }


def train_autoep(engine: Any, steps: int) -> list[float]:
    """Train on data that differs per step and rank, and return the losses."""
    losses = []
    for step in range(steps):
        seed = 100 * step + torch.distributed.get_rank()
        tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses
