"""Groups for Hugging Face's ``Trainer`` and its subclasses."""

import re
import sys
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from moe_groups._common.arguments import Bytes, checked, need
from moe_groups._common.warn import warn
from moe_groups._deepspeed.autoep.early_groups import support_early_groups
from moe_groups._deepspeed.engines import known_engines
from moe_groups._deepspeed.layers import is_autoep_layer
from moe_groups._deepspeed.parts import is_partitioned
from moe_groups._deepspeed.process_groups import tensor_parallel_size
from moe_groups.checkpoints.guard.guard import GUARDS, Regroup, protect_checkpoints
from moe_groups.engine.lean import lean_step
from moe_groups.engine.verification import verify
from moe_groups.errors import InvalidArgumentError
from moe_groups.integrations.autoep import autoep_enabled, support_new_transformers
from moe_groups.param_groups import create_moe_param_groups
from moe_groups.weights.gather import gather_model

need("transformers", "hf", "groups for Trainer")
need("accelerate", "hf", "groups for Trainer")
need("deepspeed", "hf", "groups for Trainer")

from accelerate.utils import DummyOptim  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Trainer  # noqa: E402
from transformers.trainer import SCHEDULER_NAME  # noqa: E402

from moe_groups.integrations.accelerate import deepspeed_config, group_optimizer  # noqa: E402

_TRAINERS = ("params", "weight_decay", "no_decay")
_OPTIONS = [name for name in signature(create_moe_param_groups).parameters if name not in _TRAINERS]


_NUMBER = re.compile(r"(?<=\.deepspeed_experts\.)\d+")
_ADAPTER = re.compile(r"(\.modules_to_save)?\.default(?=\.|$)")  # as PEFT names what it saves


class MoETrainer(Trainer):
    """``Trainer`` whose optimizer has MoE groups.

    Weight decay is Trainer's own (``get_decay_parameter_names``), and so are the type of the
    optimizer and its hyperparameters: those of the training arguments, or those of an
    ``"optimizer"`` block in the DeepSpeed config. The groups are verified on all ranks before
    the first step (:func:`moe_groups.verify`).

    Put it before other subclasses of ``Trainer`` in your own class:
    ``class MoESFTTrainer(MoETrainer, SFTTrainer): ...``.

    Args:
        args: and ``kwargs``: as for the class that it is mixed into.
        group_options: of :func:`moe_groups.create_moe_param_groups`: ``split_by``, the caps,
            ``overrides``, ``step_memory_budget`` and their further arguments.
        regroup: what to do with a checkpoint of other groups, as in
            :func:`moe_groups.protect_checkpoints`.
        lean_step: True, or the size of a tile: step with :func:`moe_groups.lean_step`.

    Raises:
        InvalidArgumentError: an option that Trainer sets, or one that does not exist; an optimizer
            or scheduler in ``optimizers``.

    Example:
        >>> trainer = MoETrainer(model=model, args=args, train_dataset=data,
        ...                      group_options={"split_by": "expert"})    # doctest: +SKIP
    """

    @checked
    def __init__(
        self,
        *args: Any,
        group_options: Mapping[str, Any] | None = None,
        regroup: Regroup = "refuse",
        lean_step: bool | Bytes = False,
        **kwargs: Any,
    ) -> None:
        self.group_options, self.regroup = dict(group_options or {}), regroup
        self.lean_step = lean_step
        if unknown := sorted(self.group_options.keys() - _OPTIONS):
            raise InvalidArgumentError(
                f"group_options has {', '.join(unknown)}: expected some of {', '.join(_OPTIONS)}. "
                "Weight decay is Trainer's: override its get_decay_parameter_names to change it."
            )
        super().__init__(*args, **kwargs)
        if autoep_enabled(deepspeed_config()):
            support_early_groups()  # also for an engine that evaluates, and makes no groups
            support_new_transformers()
            self._warn_of_scaled_loss()
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise InvalidArgumentError(
                "MoETrainer cannot use optimizers=(optimizer, scheduler): it makes groups, and "
                "then a scheduler. Give optimizer_cls_and_kwargs=(AdamW, {...}), or override "
                "create_optimizer to return group_optimizer(your_optimizer, self.model, "
                "**self.group_options), and create_scheduler."
            )

    def _warn_of_scaled_loss(self) -> None:
        """Trainer takes a transformers model's auxiliary loss for a part of a sum over tokens."""
        settings = getattr(self.model, "config", None)
        coefficient = getattr(settings, "router_aux_loss_coef", 0)
        times = self.args.world_size if self.args.average_tokens_across_devices else 1
        times *= self.args.gradient_accumulation_steps
        counted = getattr(settings, "output_router_logits", False) and coefficient
        plain = super().compute_loss.__func__ is Trainer.compute_loss  # TRL's counts it once
        if counted and plain and times > 1:
            warn(
                f"Trainer will count the model's auxiliary loss {times} times, once for each rank "
                "and accumulated batch, as it divides the loss by the tokens of all. For "
                f"router_aux_loss_coef={coefficient} set {coefficient / times:g} in the model's "
                "config.",
                UserWarning,
            )

    def create_optimizer(self, *args: Any) -> Any:
        """Trainer's optimizer, with MoE groups in place of its two."""
        model = args[0] if args else self.model
        before = self.optimizer
        optimizer = super().create_optimizer(*args)
        if isinstance(optimizer, DummyOptim):
            if self.optimizer_cls_and_kwargs is not None:
                raise InvalidArgumentError(
                    "optimizer_cls_and_kwargs and the optimizer block of the DeepSpeed config name "
                    "two optimizers, and DeepSpeed makes that of the block: remove one of them."
                )
            optimizer.params = self._decay_groups(model)
        elif optimizer is before:  # Trainer asks twice
            return optimizer
        return group_optimizer(optimizer, model, **self.group_options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, with the experts of all ranks; on rank 0, which has gathered the model."""
        engine = self.is_deepspeed_enabled and self.deepspeed
        if not engine or tensor_parallel_size() > 1:  # rank 0 has parts of dense layers then
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        state = gather_model(engine, exclude_frozen_parameters=self._saves_adapters(engine))
        if state and self.args.should_save:
            self._save(folder, state_dict=state)
            adapters = Path(folder, "adapter_model.safetensors")
            if adapters.exists():
                _add_experts(adapters, state, engine.module)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _saves_adapters(self, engine: Any) -> bool:
        """Only adapters are saved, of a model whose other weights are not whole on rank 0."""
        peft = sys.modules.get("peft")
        adapters = peft is not None and isinstance(self.model, peft.PeftModel)
        parts = any(map(is_autoep_layer, engine.module.modules()))
        return adapters and (parts or is_partitioned(engine.module))

    def _decay_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """With Trainer's decay rules, where DeepSpeed makes the optimizer and Trainer none."""
        decayed = set(self.get_decay_parameter_names(model))
        parts: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        for name, param in model.named_parameters():
            if param.requires_grad:
                parts[name in decayed].append(param)
        return [{"params": parts[True]}, {"params": parts[False], "weight_decay": 0.0}]

    @property
    def deepspeed(self) -> Any:
        """The engine, which Trainer sets once it is there, before it loads a checkpoint."""
        return self._engine

    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        self._engine = engine
        if not any(one is engine for one in known_engines()):
            return
        mine = getattr(self.optimizer, "optimizer", None)  # in Accelerate's wrapper
        if mine is not None and engine.optimizer is mine:  # not for evaluation only
            protect_checkpoints(engine, regroup=self.regroup)
            GUARDS[engine].own_schedules = True  # in _load_optimizer_and_scheduler
            verify(engine)
            if self.lean_step:
                lean_step(engine, *([] if self.lean_step is True else [self.lean_step]))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer keeps a torch scheduler's state itself, with a rate for each group."""
        scheduler, file = self.lr_scheduler, Path(checkpoint or "", SCHEDULER_NAME)
        converted = self.is_deepspeed_enabled and self.regroup == "auto" and file.is_file()
        if converted and isinstance(scheduler, LRScheduler):
            saved = torch.load(file, weights_only=True)
            scheduler.load_state_dict(saved | _rates_of_groups(scheduler, saved))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)


def _add_experts(adapters: Path, state: Mapping[str, torch.Tensor], module: nn.Module) -> None:
    """Add to PEFT's file what its model does not have under the names of ``state``.

    These are experts of other ranks, and what was trained inside of layers that AutoEP replaced.
    """
    saved = {name: tensor.clone() for name, tensor in load_file(adapters).items()}
    known = {_NUMBER.sub("", name) for name in saved}
    replaced = tuple(f"{path}." for path, part in module.named_modules() if is_autoep_layer(part))
    buffers = {name.rpartition(".")[2] for name, _ in module.named_buffers()}
    more = {}
    for full_name, tensor in state.items():
        name = _ADAPTER.sub("", full_name)
        inside = full_name.startswith(replaced) and name.rpartition(".")[2] not in buffers
        if name not in saved and (inside or _NUMBER.sub("", name) in known):
            more[name] = tensor.clone()
    if more:
        save_file(saved | more, adapters, metadata={"format": "pt"})


def _rates_of_groups(scheduler: LRScheduler, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's lists for the groups as they are now: their rates have been loaded."""
    groups = scheduler.optimizer.param_groups
    lists = {
        "base_lrs": [group["initial_lr"] for group in groups],
        "_last_lr": [group["lr"] for group in groups],
        "lr_lambdas": saved.get("lr_lambdas", [])[:1] * len(groups),  # Trainer has one for all
    }
    return {key: value for key, value in lists.items() if key in saved}
