"""AutoEP models trained through the tools that call ``deepspeed.initialize``, and by one process.

Everything is fp32, so that two ranks and one process differ by the order of sums alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from deepspeed.utils import safe_get_full_fp32_param
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DeepSpeedStrategy
from tokenizers import Tokenizer, models
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast, TrainingArguments

from moe_groups import create_moe_param_groups
from moe_groups.integrations.accelerate import group_optimizer
from moe_groups.integrations.autoep import tag_autoep_experts
from moe_groups.integrations.hf_trainer import MoETrainer
from tests.support.autoep_models import VOCABULARY, make_model
from tests.support.hf_runs import in_order, start_accelerate

RATES = {"SGD": 0.05, "AdamW": 1e-3}
EPS = 1e-4
"""Of AdamW: far above the rounding of gradients, which the update would else amplify."""
BATCH, STEPS, LENGTH = 2, 3, 16


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens; of two ranks, rank ``r`` gets batches ``r``, ``r + 2``, ..."""

    def __len__(self) -> int:
        return 4 * BATCH * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def batches(rank: int, steps: int = STEPS) -> Iterator[dict[str, torch.Tensor]]:
    """Those of one rank."""
    data = Tokens()
    for step in range(steps):
        first = BATCH * (2 * step + rank)
        rows = torch.stack([data[first + row]["input_ids"] for row in range(BATCH)])
        yield {"input_ids": rows, "labels": rows}


def deepspeed_config(wrapper: str, ep_size: int, block: str | None = None) -> dict[str, Any]:
    """Without a preset: the model says its type. ``block`` is an optimizer of torch."""
    cfg: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 by itself
        "zero_optimization": {"stage": int(wrapper[-1])},
        "zero_allow_untested_optimizer": True,
        "expert_parallel": {"enabled": True, "autoep_size": ep_size, "use_grouped_mm": False},
    }
    if block:
        adamw = {"torch_adam": True, "eps": EPS, "weight_decay": 0.0}
        params = {"lr": RATES[block]} | (adamw if block == "AdamW" else {})
        cfg["optimizer"] = {"type": block, "params": params}
    return cfg


def one_process(
    kind: str, name: str, model: nn.Module | None = None
) -> tuple[nn.Module, list[list[float]]]:
    """The model after training on the batches of both ranks, without any parallelism.

    Also the losses of each rank's batches, step by step.

    Args:
        model: goes on with this one.
    """
    model = model or make_model(kind)
    optimizer = torch_optimizer(name, model.parameters())
    losses = []
    for both in zip(batches(0), batches(1), strict=True):
        found = [model(**batch).loss for batch in both]
        (sum(found) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([float(loss.detach()) for loss in found])
    return model, losses


def engine_through(
    tool: str, kind: str, wrapper: str, ep_size: int, block: bool, folder: Path
) -> tuple[Any, list[float]]:
    """The engine after training through a tool, in groups by layer, and this rank's losses.

    SGD without an optimizer block, AdamW of the block with one.
    """
    name = "AdamW" if block else "SGD"
    cfg = deepspeed_config(wrapper, ep_size, name if block else None)
    model = make_model(kind)
    if tool in ("trainer", "trl"):
        trainer = make_trainer(
            folder, cfg, model, tool, block, group_options={"split_by": "module"}
        )
        trainer.train()
        return trainer.deepspeed, [
            row["loss"] for row in trainer.state.log_history if "loss" in row
        ]
    if tool == "lightning":
        return train_with_lightning(model, cfg, block)
    start_accelerate()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=cfg))
    optimizer = torch_optimizer(name, model.parameters())
    if block:
        optimizer = DummyOptim(model.parameters(), lr=RATES[name])
    group_optimizer(optimizer, model, split_by="module")
    loader = DataLoader(Tokens(), batch_size=BATCH)
    engine, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _, batch in zip(range(STEPS), loader, strict=False):
        loss = engine(**batch).loss
        losses.append(float(loss.detach()))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return engine, losses


def torch_optimizer(name: str, params: Any) -> Any:
    if name == "SGD":
        return torch.optim.SGD(params, lr=RATES[name])
    return torch.optim.AdamW(params, lr=RATES[name], eps=EPS, weight_decay=0.0)


def train_with_lightning(
    model: nn.Module, cfg: dict[str, Any], block: bool
) -> tuple[Any, list[float]]:
    losses = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(**batch).loss
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            tag_autoep_experts(self, self.trainer.strategy.config)
            return torch_optimizer("AdamW" if block else "SGD", create_moe_param_groups(self))

    cfg = {
        k: v for k, v in cfg.items() if k not in ("optimizer", "gradient_accumulation_steps")
    }  # Lightning's own, or none
    runner = pl.Trainer(
        devices=2,
        strategy=OnCPU(
            config=cfg,
            parallel_devices=[torch.device("cpu", index) for index in range(2)],
            cluster_environment=TorchElasticEnvironment(),
        ),
        precision="32-true",
        max_steps=STEPS,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data: Any = list(batches(distributed.get_rank()))
    runner.fit(Module(), DataLoader(data, batch_size=None))
    return runner.strategy.model, losses


class OnCPU(DeepSpeedStrategy):
    """Lightning refuses a CPU in ``setup_environment``, and nowhere else."""

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()


def make_trainer(
    folder: Path,
    cfg: dict[str, Any],
    model: nn.Module,
    tool: str = "trainer",
    block: bool = True,
    changes: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Any:
    """A Trainer that has not started; without learning-rate schedule, decay and clipping.

    Args:
        tool: "trainer", or "trl" for its SFTTrainer.
        block: the config has an optimizer block; else SGD is made in code.
        changes: of the training arguments.
        options: of MoETrainer.
    """
    start_accelerate()
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "optim": "adamw_torch",
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATES["AdamW"],
        "adam_epsilon": EPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "deepspeed": cfg,
        "use_cpu": True,
        "accelerator_config": {"use_configured_state": True},
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    if not block:
        options["optimizer_cls_and_kwargs"] = (torch.optim.SGD, {"lr": RATES["SGD"]})
    parents: tuple[type[Any], ...] = (MoETrainer,)
    args: Any = TrainingArguments
    data: Any = Tokens()
    if tool == "trl":
        from datasets import Dataset as Rows
        from trl import SFTConfig, SFTTrainer

        parents, args = (MoETrainer, SFTTrainer), SFTConfig
        arguments |= {"bf16": False, "router_aux_loss_coef": 0.0}
        data = Rows.from_list(
            [{"input_ids": data[row]["input_ids"].tolist()} for row in range(len(data))]
        )
        options["processing_class"] = tokenizer()

    kind = in_order(*parents)
    return kind(model=model, args=args(**arguments), train_dataset=data, **options)


def tokenizer() -> Any:
    """A tokenizer whose words are numbers."""
    words = models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0", eos_token="0")


def full_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Master weights of this rank's trainable parameters, under any ZeRO."""
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    return {name: safe_get_full_fp32_param(param).clone() for name, param in named}


def local_difference(engine: Any, reference: nn.Module) -> tuple[float, dict[str, float]]:
    """Largest difference of this rank's weights from those of ``reference``, and of each one's.

    The tensors of AutoEP have an entry for each of their experts.
    """
    wanted = {name: param.detach() for name, param in reference.named_parameters()}
    found: dict[str, float] = {}
    for name, param in engine.module.named_parameters():
        own = name.removeprefix("model.") if "model.lm_head.weight" in param_names(engine) else name
        value = safe_get_full_fp32_param(param)
        path, _, leaf = own.rpartition(".")
        if not path.endswith(".experts"):
            expected = wanted[own.replace(".router.gate.", ".gate.")]
            found[name] = float((value - expected).abs().max())
            continue
        first = distributed.get_rank() % (4 // len(value)) * len(value)
        fused = wanted[f"{path}.{'down_proj' if leaf == 'w2' else 'gate_up_proj'}"]
        half = fused.shape[1] // 2
        part = {"w1": slice(0, half), "w2": slice(None), "w3": slice(half, None)}[leaf]
        for number, expert in enumerate(value):
            difference = (expert - fused[first + number, part]).abs().max()
            found[f"{name}.{number}"] = float(difference)
    return max(found.values()), found


def param_names(engine: Any) -> set[str]:
    return {name for name, _ in engine.module.named_parameters()}
