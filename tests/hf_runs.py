"""Training runs through Hugging Face's Trainer and Accelerate, and the same through DeepSpeed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

from moe_groups import MoE
from moe_groups.integrations.hf_trainer import MoETrainer
from tests.models import HIDDEN, TinyMoE

LR, BETAS, EPS, DECAY, CLIP, BATCH = 1e-2, (0.8, 0.95), 1e-6, 0.1, 0.05, 4


class HFConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    model_type = "tiny-moe"


class HFModel(PreTrainedModel):  # type: ignore[misc, unused-ignore]
    """A model of transformers with MoE layers of ours; its loss has the auxiliary one."""

    config_class = HFConfig

    def __init__(self, config: HFConfig) -> None:
        super().__init__(config)
        self.body = TinyMoE(MoE, ep_size=2)
        self.post_init()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.body(x, labels)}


def make_model() -> HFModel:
    return HFModel(HFConfig())


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows that differ; on two ranks, rank ``r`` gets batches ``r``, ``r + 2``, ..."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": torch.tanh(x.flip(-1))}


def batches(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Those that Trainer and Accelerate hand to this rank."""
    data, rank = Data(), torch.distributed.get_rank()
    for step in range(steps):
        first = BATCH * (2 * step + rank)
        rows = [data[index] for index in range(first, first + BATCH)]
        yield torch.stack([r["x"] for r in rows]), torch.stack([r["labels"] for r in rows])


WRAPPERS: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "bf16"}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "bf16": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
}
BLOCKS: dict[str, dict[str, Any]] = {
    # torch's AdamW, as DeepSpeed's own kernel takes minutes to compile
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
        | {"torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
        | {"total_num_steps": "auto"},
    },
}


def config(wrapper: str, blocks: tuple[str, ...] = ()) -> dict[str, Any]:
    """A DeepSpeed config whose values are left to Trainer or Accelerate."""
    auto = ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    return {
        **dict.fromkeys(auto, "auto"),
        "bf16": {"enabled": "auto"},
        **WRAPPERS[wrapper],
        **{block: BLOCKS[block] for block in blocks},
    }


def start_accelerate() -> None:
    """The state of a new process, on gloo: without a GPU Accelerate chooses no backend."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def trainer(
    output: Path, cfg: dict[str, Any], model: nn.Module | None = None, steps: int = 4, **more: Any
) -> MoETrainer:
    start_accelerate()
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPS,
        max_grad_norm=CLIP,
        warmup_steps=2,
        deepspeed=cfg,
        bf16=True,
        use_cpu=True,
        accelerator_config={"use_configured_state": True},
        train_sampling_strategy="sequential",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    return MoETrainer(model=model or make_model(), args=args, train_dataset=Data(), **more)


def accelerator(cfg: dict[str, Any]) -> Accelerator:
    start_accelerate()
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=cfg), mixed_precision="bf16")
