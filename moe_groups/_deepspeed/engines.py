"""The groups that an engine steps, its wrapper, and the options that its groups were given."""

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from moe_groups._common.arguments import Is
from moe_groups._deepspeed.parts import whole_values
from moe_groups._deepspeed.ports import PORTS
from moe_groups._deepspeed.releases import need
from moe_groups.errors import InvalidArgumentError
from moe_groups.tags import shape_of


class Engine(Protocol):
    """The members of a DeepSpeed engine that are used; its wrappers have too little in common."""

    module: nn.Module
    optimizer: Any
    basic_optimizer: Any
    lr_scheduler: Any
    monitor: Any
    mpu: Any
    checkpoint_engine: Any
    seq_data_parallel_group: Any
    param_names: Mapping[torch.Tensor, str]
    config: Mapping[str, Any]
    device: torch.device
    local_rank: int
    global_steps: int
    skipped_steps: int

    def gradient_accumulation_steps(self) -> int: ...

    def zero_optimization(self) -> bool: ...

    def use_node_local_storage(self) -> bool: ...

    def load_universal_checkpoint(self) -> bool: ...

    def get_global_grad_norm(self) -> float | torch.Tensor | None: ...


class Given(NamedTuple):
    """The options of a parameter's group when the engine got the optimizer.

    Attributes:
        name: of the group.
        options: its learning rate and weight decay.
        own_lr: the learning rate differs from the optimizer's default.
    """

    name: str
    options: dict[str, float]
    own_lr: bool


_ENGINES: "weakref.WeakKeyDictionary[Any, dict[int, Given]]" = weakref.WeakKeyDictionary()
"""Engines that were initialized over our groups, and what their groups were given."""


def is_engine(value: object) -> bool:
    """Is ``value`` a DeepSpeed engine (its pipeline engine included)?"""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(value, module.DeepSpeedEngine)


_MISSING = " (DeepSpeed is not installed: pip install 'moe-groups[deepspeed]')"
_INSTALL = "" if find_spec("deepspeed") else _MISSING
InitializedEngine: TypeAlias = Annotated[
    Engine, Is(is_engine, f"an engine that deepspeed.initialize made{_INSTALL}")
]
SteppingEngine: TypeAlias = Annotated[
    Engine,
    Is(
        lambda value: is_engine(value) and hasattr(value.optimizer, "param_groups"),
        f"an engine that deepspeed.initialize made with an optimizer{_INSTALL}",
    ),
]


def has_engine(model: nn.Module) -> bool:
    """Does an engine step ``model`` or a part of it? Every engine puts hooks on its module."""
    hooks = model._forward_pre_hooks.values()
    if any(getattr(hook, "__module__", "") == "deepspeed.runtime.engine" for hook in hooks):
        return True
    return any(part is model for engine in _ENGINES for part in engine.module.modules())


def known_engines() -> list[Any]:
    """Living engines that were initialized after :func:`support_our_groups`."""
    return list(_ENGINES)


def engine_of(params: Iterable[torch.Tensor]) -> Any:
    """A known engine whose model has one of these parameters; None if there is none."""
    own = list(params)
    started = [one for one in _ENGINES if one.optimizer is not None]  # initialize may have raised
    return next((one for one in started if any(map(one.param_names.__contains__, own))), None)


def is_pipeline(model: object) -> bool:
    """Is ``model`` a ``PipelineModule``?"""
    module = sys.modules.get("deepspeed.runtime.pipe.module")
    return module is not None and isinstance(model, module.PipelineModule)


def stage_of(model: Any) -> int:
    """This rank's pipeline stage of ``model``; 0 without a pipeline."""
    return int(model.stage_id) if is_pipeline(model) else 0


def wrapper_name(engine: Any) -> str:
    """The wrapper: "ZeRO-1" to "ZeRO-3", "BF16_Optimizer", or the class of another one."""
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if name == "DeepSpeedZeroOptimizer":
        return "ZeRO-2" if optimizer.partition_gradients else "ZeRO-1"
    return "ZeRO-3" if name == "DeepSpeedZeroOptimizer_Stage3" else name


def steps_parameters(engine: Any) -> bool:
    """Does the optimizer step the model's parameters themselves, without a wrapper?"""
    return engine.optimizer is engine.basic_optimizer


def needs_marks(engine: Any) -> bool:
    """Does the wrapper (ZeRO, BF16_Optimizer) recognize experts by the mark ``moe`` of a group?"""
    return engine.zero_optimization() or hasattr(engine.optimizer, "real_dp_process_group")


def stepped_groups(engine: Any) -> list[tuple[dict[str, Any], list[torch.Tensor]]]:
    """``(param group, model parameters it steps)`` of an initialized engine, in order.

    The wrappers put flat partitions into ``param_groups`` and keep the model's parameters
    in a list of their own: ``bit16_groups`` (ZeRO-1/2), ``bf16_groups`` (BF16_Optimizer),
    ``fp16_groups`` (FP16 optimizers; ZeRO-3, which has several lists for a group).
    """
    optimizer = engine.optimizer
    groups = optimizer.param_groups
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, attribute):
            members: list[list[torch.Tensor]] = [[] for _ in groups]
            index_of = getattr(optimizer, "sub_group_to_group_id", {})
            for index, params in enumerate(getattr(optimizer, attribute)):
                members[index_of.get(index, index)].extend(params)
            return list(zip(groups, members, strict=True))
    return [(group, list(group["params"])) for group in groups]


def engine_data_parallel_group(engine: Any) -> Any:
    """The process group whose ranks have the same optimizer groups in the same order."""
    return engine.seq_data_parallel_group


def given_options(engine: Any) -> dict[int, Given]:
    """``id(parameter)`` to the options of its group; empty if the groups were not ours."""
    return _ENGINES.get(engine, {})


def remember(engine: Any, optimizer: Any) -> None:
    """Store the options of the groups before the engine wraps the optimizer."""
    default = getattr(optimizer, "defaults", {}).get("lr")
    given: dict[int, Given] = {}
    for group in optimizer.param_groups:
        options = {key: float(group[key]) for key in ("lr", "weight_decay") if key in group}
        if "initial_lr" in group:  # a scheduler was made before the engine (Accelerate) and set lr
            options["lr"] = float(group["initial_lr"])
        record = Given(str(group.get("name", "")), options, options.get("lr") != default)
        given.update((id(param), record) for param in group["params"])
    _ENGINES[engine] = given
    PORTS.engine_started(engine)


def scheduled_peaks(engine: Any) -> list[float] | None:
    """Final learning rates of a DeepSpeed warm-up schedule, one for each group, if there is one."""
    peaks = getattr(engine.lr_scheduler, "max_lrs", None)
    return None if peaks is None else list(map(float, peaks))


def runs_backward(engine: Any) -> bool:
    """Is the engine (or pipeline engine) in its ``backward`` now?"""
    return bool(getattr(engine, "_running_engine_backward", False))


def backward_scale(engine: Any) -> float:
    """The factor by which ``backward`` scales a loss: DeepSpeed's own scaling of a loss of 1."""
    optimizer, steps = engine.optimizer, engine.gradient_accumulation_steps()
    with torch.enable_grad():
        one = torch.ones((), requires_grad=True) * 1  # DeepSpeed scales tensors with a graph
    if hasattr(optimizer, "scale_if_loss"):
        one = optimizer.scale_if_loss(one)
    elif hasattr(optimizer, "loss_scale"):  # DeepSpeed before 0.18 scales in backward
        one = one * optimizer.loss_scale
    elif scaler := getattr(engine, "torch_autocast_z0_gradscaler", None):  # since DeepSpeed 0.17
        one = scaler.scale(one)
    return float(one) / float(steps)


def stepped_elsewhere(engine: Any) -> str | None:
    """The setting of ZeRO-3 by which not all master weights are in the torch optimizer's memory."""
    optimizer = engine.optimizer
    settings = {
        '"zenflow"': getattr(optimizer, "zenflow", False),
        'an "offload_optimizer" with a "ratio" below 1': hasattr(optimizer, "backup_optimizer"),
        'an "offload_optimizer" on NVMe': getattr(optimizer, "swap_optimizer", False),
    }
    return next((setting for setting, is_set in settings.items() if is_set), None)


def check_refreshes(engine: Any) -> None:
    """Refuse an engine of ZeRO-3 whose masters :func:`refresh_master_weights` does not reach.

    Raises:
        InvalidArgumentError: with the setting that prevents it.
    """
    if wrapper_name(engine) == "ZeRO-3" and (found := stepped_elsewhere(engine)):
        raise InvalidArgumentError(
            f"load_experts cannot refresh all master weights of ZeRO-3 with {found}: load before "
            'deepspeed.initialize, or take the setting out of "zero_optimization" in the config.'
        )


def refresh_master_weights(engine: Any) -> None:
    """Copy the model's weights into the wrapper's master weights, if it has any.

    DeepSpeed calls it after loading only weights (``load_checkpoint``, ``runtime/engine.py``).

    Raises:
        UnsupportedDeepSpeedError: this DeepSpeed would copy other parts of the weights.
    """
    if wrapper_name(engine) == "BF16_Optimizer":
        need("BF16 masters", "use ZeRO-1 or ZeRO-2, or load before deepspeed.initialize")
    refresh = getattr(engine.optimizer, "refresh_fp32_params", None)
    if refresh is not None:
        refresh()


def in_fp32(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.is_floating_point() else values


def master_weights(engine: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that gives the fp32 values of a parameter or buffer of the model.

    All ranks that share the tensor call it together, in the same order: ZeRO and BF16_Optimizer
    have a part of the master weights on each. A tensor without master weights is cast.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    whole: dict[
        int, torch.Tensor
    ] = {}  # FP16_Optimizer and its unfused kind have them in one piece
    for index, (_, params) in enumerate(stepped_groups(engine)):
        if hasattr(engine.optimizer, "fp32_groups_flat"):
            flat = engine.optimizer.fp32_groups_flat[index].detach()
            parts = flat.split([param.numel() for param in params])
        else:
            parts = getattr(engine.optimizer, "fp32_groups", {index: ()})[index]
        whole |= {id(param): part for param, part in zip(params, parts, strict=False)}

    def master(tensor: torch.Tensor) -> torch.Tensor:
        full = whole.get(id(tensor))
        if full is None:
            full = safe_get_full_fp32_param(tensor)
        values = whole_values(tensor) if full is None else full.detach().view(shape_of(tensor))
        return in_fp32(values)

    return master


def send_to_monitor(engine: Any, step: int, values: Mapping[str, float]) -> None:
    """Write values to the monitors of DeepSpeed's config (TensorBoard, W&B, CSV), on rank 0."""
    if engine.monitor.enabled and torch.distributed.get_rank() == 0:
        engine.monitor.write_events(
            [(f"Train/{key}", value, step) for key, value in values.items()]
        )
