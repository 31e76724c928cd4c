"""Tiny checkpoints that transformers writes, and our models to fill from them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_groups import MoE

HIDDEN, INNER, EXPERTS, LAYERS = 16, 12, 4, 2
_SHARED = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.5,
}
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3")
DENSE_LAYERS = {"deepseek_v3": 1}
"""Number of decoder layers of a family before the first with experts."""


def hf_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model of the family with 4 experts per layer, 2 of them for each token."""
    torch.manual_seed(seed)
    if family == "mixtral":
        config = MixtralConfig(**_SHARED, intermediate_size=INNER, num_local_experts=EXPERTS)
        model: Any = MixtralForCausalLM(config)
    elif family == "qwen3_moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **_SHARED,
                intermediate_size=24,
                moe_intermediate_size=INNER,
                num_experts=EXPERTS,
                head_dim=8,
                norm_topk_prob=True,
            )
        )
    else:
        sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
        heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
        model = DeepseekV3ForCausalLM(
            DeepseekV3Config(
                **_SHARED,
                **sizes,
                **heads,
                intermediate_size=24,
                moe_intermediate_size=INNER,
                n_routed_experts=EXPERTS,
                n_shared_experts=1,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=DENSE_LAYERS[family],
            )
        )
        for layer in model.model.layers[DENSE_LAYERS[family] :]:
            layer.mlp.gate.e_score_correction_bias.data.uniform_(0, 0.5)
    return model.to(dtype)  # type: ignore[no-any-return]


def save(model: Any, directory: Path, *, fused: bool = False, shard: str = "8KB") -> Path:
    """Save with ``save_pretrained``: by default one tensor per expert, in several shards."""
    model.save_pretrained(directory, save_original_format=not fused, max_shard_size=shard)
    return directory


class GatedFFN(nn.Module):
    """One expert, with the parameter names of Qwen3-MoE and DeepSeek or of Mixtral."""

    def __init__(self, names: tuple[str, str, str], hidden: int = HIDDEN, inner: int = INNER):
        super().__init__()
        self.names = names
        for name, sizes in zip(
            names, ((hidden, inner), (hidden, inner), (inner, hidden)), strict=True
        ):
            self.add_module(name, nn.Linear(*sizes, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        out: torch.Tensor = down(nn.functional.silu(gate(x)) * up(x))
        return out


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NUMBERED = ("w1", "w3", "w2")


def moe_layer(ep_size: int, names: tuple[str, str, str] = PROJECTIONS, **options: Any) -> MoE:
    """DeepSpeed's layer with the routing of Mixtral and Qwen3-MoE: top 2, nothing dropped."""
    options = {"num_experts": EXPERTS, "k": 2, "drop_tokens": False} | options
    expert = GatedFFN(names, inner=options.pop("inner", INNER))
    return MoE(HIDDEN, expert, ep_size=ep_size, top2_2nd_expert_sampling=False, **options)


class Decoder(nn.Module):
    """The MoE layers of our model, as ``blocks.<n>.moe``."""

    def __init__(self, ep_size: int = 1, first: int = 0, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {
                str(number): nn.ModuleDict({"moe": moe_layer(ep_size, **options)})
                for number in range(first, LAYERS)
            }
        )


def true_experts(model: Any, number: int) -> list[dict[str, torch.Tensor]]:
    """The matrices of each expert of a decoder layer, from transformers' model."""
    experts = model.model.layers[number].mlp.experts
    found = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = gate_up.detach().chunk(2)
        found.append({"gate_proj": gate, "up_proj": up, "down_proj": down.detach()})
    return found
