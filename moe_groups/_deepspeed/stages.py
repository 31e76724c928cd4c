"""Stages of a pipeline exchange their layers' sizes before the engine makes process groups."""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from moe_groups._deepspeed.engines import is_pipeline
from moe_groups._deepspeed.layers import moe_layer_types
from moe_groups._deepspeed.ports import PORTS
from moe_groups.errors import InvalidArgumentError


def wrap_configure(original: Callable[..., None]) -> Callable[..., None]:
    """Make the same process groups in the same order on all stages of a pipeline.

    In DeepSpeed a layer makes the missing groups, a collective of all ranks: with a stage
    without MoE layers, or with other ep_sizes, it would hang.
    """

    def _configure_distributed_model(self: Any, model: Any) -> None:
        if is_pipeline(model):
            _agree_with_other_stages(self, model)
        original(self, model)

    return _configure_distributed_model


def _agree_with_other_stages(engine: Any, model: Any) -> None:
    from deepspeed.utils import groups

    layers: list[Any] = [m for m in model.modules() if isinstance(m, moe_layer_types())]
    here = [(layer.ep_size, layer.enable_expert_tensor_parallelism) for layer in layers]
    stages: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, (here, *_carrying(engine, model)))
    problems = [problem for _, _, problem in stages if problem]
    if problems and any(carries for _, carries, _ in stages):
        raise InvalidArgumentError(problems[0])
    groups.mpu = engine.mpu
    wanted = dict.fromkeys(itertools.chain.from_iterable(layers for layers, _, _ in stages))
    order = engine._config.use_data_before_expert_parallel_
    for ep_size, expert_tensor_parallelism in wanted:
        if f"ep_size_{ep_size}" in groups._EXPERT_PARALLEL_GROUP:
            continue
        if expert_tensor_parallelism and groups.mpu is not None:
            groups._create_expert_data_and_model_parallel(ep_size, groups.mpu, order)
        else:
            groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=order)


def _carrying(engine: Any, model: Any) -> tuple[bool, str | None]:
    """Does the stage carry a loss, and what would prevent that if any stage does?

    Reads the config, because the module does not have its activation checkpointing options yet.
    """
    pipeline = engine._config.pipeline
    partitioned = model.topology().get_dim("model") > 1 and (
        pipeline["pipe_partitioned"] or pipeline["grad_partitioned"]
    )
    interval = pipeline["activation_checkpoint_interval"] or model.activation_checkpoint_interval
    own = getattr(model.activation_checkpoint_func, "__module__", "").startswith("deepspeed.")
    once = own and pipeline.get("use_reentrant") is not False
    recomputed = interval > 0 and model.num_stages > 1 and once
    stage, layers = f"pipeline stage {model.stage_id}", model.forward_funcs
    return PORTS.stage_problem(layers, model.loss_fn, partitioned, recomputed, stage)
