"""What a DeepSpeed config says about the optimizer step, and what in it has no known cost."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from moe_groups._common.arguments import check_one_of, need
from moe_groups.errors import InvalidArgumentError

_T = TypeVar("_T")

ZERO3 = (
    "the cost of ZeRO-3's step is not predicted. It follows from sub_group_size, not from the "
    "groups: measure it with measure_step_memory."
)

WITHOUT_EFFECT = {
    "zero_optimization": (
        "allgather_bucket_size",
        "allgather_partitions",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "ignore_unused_parameters",
        "leaf_module",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "overlap_comm",
        "override_module_apply",
        "pipeline_loading_checkpoint",
        "reduce_bucket_size",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
    ),
    "offload_optimizer": (
        "buffer_count",
        "cpuadam_cores_perc",
        "fast_init",
        "nvme_path",
        "pin_memory",
        "pipeline_read",
        "pipeline_write",
    ),
    "bf16": ("check_grad_overflow",),
}
"""Settings with which ZeRO-1 and ZeRO-2 step as without them, by section."""
READ = {
    "zero_optimization": ("stage", "offload_optimizer"),
    "offload_optimizer": ("device",),
    "bf16": (
        "enabled",
        "immediate_grad_update",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ),
}
"""Settings that decide the cost, by section; the others must have their default."""
MUST_BE: dict[str, tuple[object, ...]] = {
    "fp16.enabled": (False,),
    "amp.enabled": (False,),
    "torch_autocast.enabled": (False,),
    "compile.deepcompile": (False,),
    "compression_training": ({},),
    "eigenvalue.enabled": (False,),
    "graph_harvesting": (False,),
    "hybrid_engine.enabled": (False,),
    "managed_gradient_accumulation": (True,),
    "progressive_layer_drop.enabled": (False,),
    "quantize_training.enabled": (False,),
    "sequence_parallel_size": (1,),
    "sparse_gradients": (False,),
    "tensor_parallel.autotp_size": (0, 1),
    "use_data_before_expert_parallelism": (False,),
}
"""Settings outside of these sections that change the step, and the values with a known cost."""


class StepSettings(NamedTuple):
    """What the config decides.

    Attributes:
        zero_stage: 1 or 2.
        grad_accum_dtype: "bf16" or "fp32".
        immediate_grad_update: of the ``bf16`` section.
        bf16_optimizer_states: master weights, gradients and moments are bf16.
        offloads: the optimizer runs on the host.
        optimizer: type of the optimizer that DeepSpeed makes, in lower case; None for none.
        optimizer_params: its parameters.
    """

    zero_stage: int
    grad_accum_dtype: Any
    immediate_grad_update: bool
    bf16_optimizer_states: bool
    offloads: bool
    optimizer: str | None
    optimizer_params: Mapping[str, Any]


def read_step_settings(given: Mapping[str, Any] | str | os.PathLike[str]) -> StepSettings:
    """Read a config, or the file with it, by DeepSpeed's own models of its sections.

    Raises:
        InvalidArgumentError: DeepSpeed cannot read it, or the cost of its step is not known.
        MissingPackageError: DeepSpeed is not installed.
    """
    need("deepspeed", "deepspeed", "DeepSpeed's configs")
    from deepspeed.runtime.config import DtypeEnum
    from deepspeed.runtime.precision_config import get_bfloat16_config
    from deepspeed.runtime.zero.config import get_zero_config

    read = given
    if isinstance(given, str | os.PathLike):
        read = _parsed("DeepSpeed config", _load, given)
    if not isinstance(read, Mapping):
        raise InvalidArgumentError(f"the DeepSpeed config is {read!r}: give a dict or a file.")
    config = {key: value for key, value in read.items() if value is not None}
    zero = _parsed("zero_optimization", get_zero_config, config)
    bf16 = _parsed("bf16", get_bfloat16_config, config)
    check_zero_stage(zero.stage)
    if not bf16.enabled:
        raise InvalidArgumentError(
            'the DeepSpeed config has no "bf16": {"enabled": true}: the cost of its step is known '
            "for bf16 weights. For fp32 weights give StepConfig(weight_bytes=4, "
            "grad_accum_dtype='fp32', ...)."
        )
    types = _section(config, "data_types")
    accumulates = types.get("grad_accum_dtype") or "bf16"
    found = _parsed("data_types.grad_accum_dtype", DtypeEnum, accumulates).name
    check_one_of("data_types.grad_accum_dtype", found, ("bf16", "fp32"))
    offload = zero.offload_optimizer
    sections = {"zero_optimization": zero, "bf16": bf16}
    if offload is not None and offload.device != "none":
        sections["offload_optimizer"] = offload
        check_one_of("offload_optimizer.device", offload.device, ("cpu", "none"))
    for name, value in (*_unknown(sections), *_changed(config)):
        raise InvalidArgumentError(
            f"the DeepSpeed config sets {name} to {value!r}, with which the cost of the step is "
            "not known: leave it out, or measure the step with measure_step_memory."
        )
    if bf16.bf16_master_weights_and_grads != bf16.bf16_optimizer_states:
        raise InvalidArgumentError(
            "the DeepSpeed config sets bf16_master_weights_and_grads or bf16_optimizer_states: the "
            "cost of the step is known for both or neither."
        )
    optimizer = _section(config, "optimizer")
    kind = optimizer.get("type")
    return StepSettings(
        zero.stage,
        found,
        bf16.immediate_grad_update,
        bf16.bf16_optimizer_states,
        "offload_optimizer" in sections,
        None if kind is None else str(kind).lower(),
        _section(optimizer, "params"),
    )


def check_zero_stage(stage: object) -> None:
    """Refuse a stage whose step has no known cost.

    Raises:
        InvalidArgumentError: neither 1 nor 2.
    """
    if stage == 3:
        raise InvalidArgumentError(f"zero_stage=3: {ZERO3}")
    check_one_of("zero_stage", stage, (1, 2))


def _load(path: Any) -> Any:
    import hjson  # as DeepSpeed reads it

    try:
        with open(path, encoding="utf-8") as file:
            return hjson.load(file)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def _parsed(name: str, read: Callable[[Any], _T], given: Any) -> _T:
    """Call ``read``; what DeepSpeed's models raise becomes an error that names the setting."""
    try:
        return read(given)
    except (AssertionError, OSError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{name} cannot be read by DeepSpeed: {error}") from error


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise InvalidArgumentError(f"{name} of the DeepSpeed config is {section!r}, not a section.")
    return section


def _unknown(sections: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Settings that are neither read nor without effect, and do not have their default."""
    for section, model in sections.items():
        for name, field in type(model).model_fields.items():
            default = field.get_default(call_default_factory=True)
            value = getattr(model, name, default)
            stage3 = (field.alias or name).startswith("stage3_")
            known = name in WITHOUT_EFFECT[section] or name in READ[section] or stage3
            if not known and value != default and getattr(value, "device", "") != "none":
                yield f"{section}.{name}", value


def _changed(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Settings of other sections that do not have a value with a known cost."""
    for path, known in MUST_BE.items():
        section, _, name = path.rpartition(".")
        value = (_section(config, section) if section else config).get(name)
        if value not in (None, "auto", *known):
            yield path, value
