"""Training runs with Hugging Face's Trainer and Accelerate, and the same with DeepSpeed alone."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments, get_scheduler

from moe_groups import MoE, create_moe_param_groups
from moe_groups.integrations.accelerate import group_optimizer
from moe_groups.integrations.hf_trainer import MoETrainer
from tests.support.models import HIDDEN, TinyMoE
from tests.support.training import initialize

LR, BETAS, EPS, DECAY, CLIP, BATCH = 1e-2, (0.8, 0.95), 1e-6, 0.1, 0.05, 4


class HFConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]
    model_type = "tiny-moe"


class HFModel(PreTrainedModel):  # type: ignore[misc, unused-ignore]
    """A model of transformers with our MoE layers; its loss includes the auxiliary loss."""

    config_class = HFConfig

    def __init__(self, config: HFConfig, ep_size: int = 2) -> None:
        super().__init__(config)
        self.body = TinyMoE(MoE, ep_size=ep_size)
        self.post_init()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.body(x, labels)}


def make_model() -> HFModel:
    return HFModel(HFConfig())


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Different rows; of two ranks, rank ``r`` gets batches ``r``, ``r + 2``, ..."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(index))
        return {"x": x, "labels": torch.tanh(x.flip(-1))}


def batches(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches that Trainer and Accelerate give to this rank."""
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
    # torch's AdamW, because DeepSpeed's own kernel takes minutes to compile
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
    """A DeepSpeed config with values that Trainer or Accelerate fill in."""
    auto = ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"]
    return {
        **dict.fromkeys(auto, "auto"),
        "bf16": {"enabled": "auto"},
        **WRAPPERS[wrapper],
        **{block: BLOCKS[block] for block in blocks},
    }


def start_accelerate() -> None:
    """Reset Accelerate's state, on gloo: without a GPU it chooses no backend."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")


def trainer(
    output: Path,
    cfg: dict[str, Any],
    model: nn.Module | None = None,
    kind: type[Any] = MoETrainer,
    clip: float = CLIP,
    data: Any = None,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A Trainer that saves after two of its four steps; ``changes`` are of its arguments."""
    start_accelerate()
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 4,
        "optim": "adamw_torch_fused",  # the default of new releases
        "per_device_train_batch_size": BATCH,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "adam_epsilon": EPS,
        "max_grad_norm": clip,
        "warmup_steps": 2,
        "deepspeed": cfg,
        "bf16": True,
        "use_cpu": True,
        "accelerator_config": {"use_configured_state": True},
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    args = TrainingArguments(**settings | (changes or {}))

    made = model or make_model()
    return in_order(kind)(model=made, args=args, train_dataset=data or Data(), **options)


def in_order(*kinds: type[Any]) -> Any:
    """A subclass of these Trainers that takes the rows in their order.

    TrainingArguments can ask for it only since transformers 5.
    """

    def sampler(self: Any, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    return type(kinds[0].__name__, kinds, {"_get_train_sampler": sampler})


AcceleratedRun: TypeAlias = tuple[Accelerator, Any, Any, Any, Any]
"""The accelerator, and its prepared engine, optimizer, batches and learning-rate scheduler."""


def prepare_with_accelerate(
    wrapper: str,
    blocks: tuple[str, ...],
    model: nn.Module | None = None,
    steps: int = 4,
    split_by: str = "expert",
    clip: float = CLIP,
) -> AcceleratedRun:
    start_accelerate()
    cfg = config(wrapper, blocks) | {"gradient_clipping": clip}
    if "optimizer" in blocks:  # Accelerate fills in lr and weight_decay
        params = cfg["optimizer"]["params"] | {"betas": BETAS, "eps": EPS}
        cfg["optimizer"] = cfg["optimizer"] | {"params": params}
    plugin = DeepSpeedPlugin(hf_ds_config=cfg)
    accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="bf16")
    model = model or make_model()
    optimizer: Any = DummyOptim(model.parameters(), lr=LR, weight_decay=DECAY)
    if "optimizer" not in blocks:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )
    optimizer = group_optimizer(
        optimizer, model, split_by=split_by, no_decay=lambda name, _: is_undecayed(name)
    )
    # Accelerate steps a scheduler once for each rank, so the counts are those of all ranks
    counts = {"total_num_steps": 2 * steps, "warmup_num_steps": 2}
    scheduler: Any = DummyScheduler(optimizer, **counts)
    if "scheduler" not in blocks and "optimizer" in blocks:
        scheduler = DummyScheduler(
            optimizer, lr_scheduler_callable=lambda made: get_scheduler("linear", made, 2, steps)
        )
    elif "scheduler" not in blocks:
        scheduler = get_scheduler("linear", optimizer, 4, 2 * steps)
    loader = torch.utils.data.DataLoader(Data(), batch_size=BATCH)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def run_accelerate(run: AcceleratedRun, steps: int) -> None:
    """Train ``steps`` steps, from the first batch on."""
    accelerator, model, optimizer, loader, scheduler = run
    for _, batch in zip(range(steps), loader, strict=False):
        loss = model(**{key: value.bfloat16() for key, value in batch.items()})["loss"]
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def plain_config(wrapper: str, blocks: tuple[str, ...], steps: int) -> dict[str, Any]:
    """The config that :func:`config` should become, without an optimizer block."""
    cfg: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        **WRAPPERS[wrapper],
    }
    if "scheduler" in blocks:
        params = {"warmup_min_lr": 0, "warmup_max_lr": LR, "warmup_num_steps": 2}
        params["total_num_steps"] = steps
        cfg["scheduler"] = {"type": "WarmupDecayLR", "params": params}
    return cfg


def train_plainly(
    wrapper: str,
    blocks: tuple[str, ...],
    groups_of: Callable[[nn.Module], list[dict[str, Any]]],
    model: nn.Module | None = None,
    steps: int = 4,
    decay: float = DECAY,
) -> Any:
    """Train with DeepSpeed alone, without Trainer and Accelerate, and return the engine."""
    model = model or make_model()
    fused = {"foreach": None} if "optimizer" in blocks else {"fused": True}  # as they choose
    optimizer = torch.optim.AdamW(
        groups_of(model), lr=LR, betas=BETAS, eps=EPS, weight_decay=decay, **fused
    )
    schedule = get_scheduler("linear", optimizer, 2, steps) if "scheduler" not in blocks else None
    engine = initialize(model, optimizer, plain_config(wrapper, blocks, steps))
    for x, labels in batches(steps):
        engine.backward(engine(x.bfloat16(), labels.bfloat16())["loss"])
        engine.step()
        if schedule is not None:
            schedule.step()
    return engine


def is_undecayed(name: str) -> bool:
    """Trainer's rules for weight decay, as far as they affect :class:`HFModel`."""
    return "bias" in name or ".norm." in name


def by_expert(model: nn.Module) -> list[dict[str, Any]]:
    """The groups of all runs."""
    return create_moe_param_groups(
        model, split_by="expert", no_decay=lambda name, _: is_undecayed(name)
    )
