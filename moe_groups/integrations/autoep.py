"""DeepSpeed's AutoEP, which turns the MoE blocks of a ``transformers`` model expert-parallel."""

import contextlib
import copy
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from moe_groups._common.arguments import FilePath, checked, need
from moe_groups._common.json_file import read_json
from moe_groups._common.ranks import on_all_ranks
from moe_groups._deepspeed.autoep.early_groups import (
    find_sources,
    known_model_types,
    support_early_groups,
)
from moe_groups._deepspeed.autoep.made_before import make_autoep_layers
from moe_groups._deepspeed.layers import is_autoep_layer
from moe_groups._deepspeed.patching import wrap_once
from moe_groups.errors import InvalidArgumentError, ParameterInputError
from moe_groups.experts.find import restored_on_error, tag_experts
from moe_groups.param_groups import create_moe_param_groups
from moe_groups.tags import EXPERT_RANKS, ExpertTag, is_expert_parameter, set_expert_tag
from moe_groups.weights.load import LoadedExperts, load_experts

_log = logging.getLogger(__name__)
_REGISTRY = "transformers.utils.output_capturing"


def autoep_optimizer(
    model: nn.Module, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], **grouping: Any
) -> Callable[[Any], torch.optim.Optimizer]:
    """An ``optimizer=`` for ``deepspeed.initialize`` that groups the experts which AutoEP makes.

    AutoEP replaces modules inside of ``deepspeed.initialize``. The returned function is called
    later, and it groups the new parameters, with ``split_by="module"`` by layer. Where the groups
    are needed before, call :func:`tag_autoep_experts`.

    Also makes AutoEP work with transformers 5.3 and newer
    (:func:`support_new_transformers`).

    Args:
        model: the model for ``deepspeed.initialize``.
        make: makes the optimizer from the groups: ``lambda groups: AdamW(groups, lr=1e-4)``.
        grouping: arguments of :func:`create_moe_param_groups`.

    Returns:
        A function of the parameters that DeepSpeed passes. It raises ParameterInputError if
        AutoEP has not made any layer, and the errors of :func:`create_moe_param_groups`.

    Example:
        >>> optimizer = autoep_optimizer(model, lambda groups: AdamW(groups, lr=1e-4),
        ...                              split_by="module", weight_decay=0.1)  # doctest: +SKIP
        >>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer,
        ...                                   config=config)                   # doctest: +SKIP
    """
    support_new_transformers()

    def optimizer(params: Any) -> torch.optim.Optimizer:
        groups = create_moe_param_groups(model, **grouping)
        if not any(map(is_expert_parameter, model.parameters())):
            raise ParameterInputError(
                "AutoEP has made no expert-parallel layer of the model: set "
                '"expert_parallel": {"enabled": true, "autoep_size": N} in the DeepSpeed config, '
                "and give autoep_optimizer the model that deepspeed.initialize gets."
            )
        return make(groups)

    return optimizer


@checked
def tag_autoep_experts(
    model: nn.Module, config: Mapping[str, Any] | FilePath
) -> dict[str, ExpertTag]:
    """Tag the experts that AutoEP will distribute, before ``deepspeed.initialize``.

    Afterwards :func:`create_moe_param_groups` groups them by layer. Use it if another library
    calls ``deepspeed.initialize`` (Lightning), or needs the optimizer before that call. DeepSpeed
    puts AutoEP's new parameters into the groups of the old ones, so the groups equal those of
    :func:`autoep_optimizer`. Caps and budgets count a rank's part of the experts.
    ``MoETrainer`` and ``group_optimizer`` call this themselves.

    The model of transformers may be inside of another module, as PEFT's or Lightning's. Also makes
    AutoEP work with transformers 5.3 and newer (:func:`support_new_transformers`).

    Args:
        model: the model that ``deepspeed.initialize`` gets.
        config: the DeepSpeed config, or the path of its file.

    Returns:
        As :func:`tag_experts`.

    Raises:
        InvalidArgumentError: the config does not enable AutoEP, or AutoEP cannot distribute the
            experts of this model. Nothing has been tagged then.
        UnsupportedDeepSpeedError: DeepSpeed before 0.19.7.

    Example:
        >>> def configure_optimizers(self):                               # doctest: +SKIP
        ...     tag_autoep_experts(self, self.trainer.strategy.config)
        ...     return AdamW(create_moe_param_groups(self), lr=1e-5)
    """
    with autoep_experts_tagged(model, config) as tags:
        return tags


@contextlib.contextmanager
def autoep_experts_tagged(
    model: nn.Module, config: Mapping[str, Any] | FilePath, *, found_none: bool = True
) -> Iterator[dict[str, ExpertTag]]:
    """:func:`tag_autoep_experts`, taken back after an error inside.

    Args:
        found_none: raise if AutoEP finds no MoE block.
    """
    config = _settings(config)
    support_early_groups()
    support_new_transformers()
    params, ranks = find_sources(model, config["expert_parallel"])
    if found_none and not params and not any(map(is_expert_parameter, model.parameters())):
        raise InvalidArgumentError(
            f"AutoEP finds no MoE block in the model: it knows {', '.join(known_model_types())} of "
            "transformers; for another one set moe_layer_pattern, router_pattern and "
            'expert_pattern in "expert_parallel" of the DeepSpeed config.'
        )
    with restored_on_error(list(model.parameters())):
        for param in params:
            set_expert_tag(param, ExpertTag(f"ep_size_{ranks}"))
            setattr(param, EXPERT_RANKS, ranks)
        yield tag_experts(model)


def autoep_enabled(config: Mapping[str, Any]) -> bool:
    """Does this DeepSpeed config turn AutoEP on?

    Raises:
        InvalidArgumentError: its ``"expert_parallel"`` is no object.
    """
    block = config.get("expert_parallel") or {}
    if not isinstance(block, Mapping):
        raise InvalidArgumentError(
            f'"expert_parallel" of the DeepSpeed config is {block!r}: expected {{"enabled": true, '
            '"autoep_size": N}.'
        )
    return bool(block.get("enabled"))


@checked
def load_autoep(
    model: nn.Module, directory: FilePath, config: Mapping[str, Any] | FilePath
) -> LoadedExperts:
    """Load a checkpoint into a model for AutoEP; no rank ever has the whole model.

    Each rank gets the dense weights and its own experts, in CPU memory; the MoE layers are AutoEP's
    afterwards. Make groups then, and call ``deepspeed.initialize`` with the same config, which
    leaves these layers as they are. Call it on all ranks after ``deepspeed.init_distributed()``.

    Values are converted to the dtype that the parameters of the model have; those that
    transformers keeps in fp32 are kept so.

    Args:
        model: of transformers, made on the meta device. It is changed only if all went well on all
            ranks, and all of its parts are new then: take references to them afterwards.
        directory: with ``model.safetensors``, or ``model.safetensors.index.json`` and its files.
        config: DeepSpeed's, or the path of its file, with ``"expert_parallel"``.

    Returns:
        What was loaded, with the numbers of this rank's experts by layer.

    Raises:
        CheckpointError: a file is missing or damaged, or names, shapes, dtypes or numbers of
            experts do not fit the model. All ranks raise it, and nothing has been changed.
        InvalidArgumentError: the model is not on the meta device, has a buffer that no checkpoint
            and no initialization of transformers gives, or AutoEP refuses it; or there are no
            ranks yet.
        UnsupportedDeepSpeedError: this DeepSpeed has no AutoEP.

    Example:
        >>> deepspeed.init_distributed()                                  # doctest: +SKIP
        >>> with torch.device("meta"):                                    # doctest: +SKIP
        ...     model = AutoModelForCausalLM.from_config(
        ...         AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
        >>> load_autoep(model, directory, config)                         # doctest: +SKIP
    """
    need("transformers", "cli", "load_autoep")
    _check_empty(model)
    settings = _settings(config)
    support_new_transformers()
    own = copy.deepcopy(model, {id(model.config): model.config})
    make_autoep_layers(own, settings)
    _give_memory(own)
    loaded: list[LoadedExperts] = []
    on_all_ranks(lambda: loaded.append(load_experts(own, directory)), "The model is as before.")
    vars(model).update(vars(own))
    return loaded[0]


def _settings(config: Mapping[str, Any] | FilePath) -> Mapping[str, Any]:
    """DeepSpeed's config, also from its file, with AutoEP turned on."""
    if not isinstance(config, Mapping):
        config = read_json(Path(config), InvalidArgumentError, "It must be DeepSpeed's config.")
    if not autoep_enabled(config):
        raise InvalidArgumentError(
            'the DeepSpeed config does not enable AutoEP: add "expert_parallel": {"enabled": true, '
            '"autoep_size": N}.'
        )
    return config


def _check_empty(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InvalidArgumentError(
            f"load_autoep loads a PreTrainedModel of transformers, not {type(model).__name__}."
        )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_meta:
            raise InvalidArgumentError(
                f"{name} is on {tensor.device}: make the model without memory (with "
                'torch.device("meta"): AutoModelForCausalLM.from_config(config, dtype=...)).'
            )
    if not distributed.is_initialized():
        raise InvalidArgumentError(
            "load_autoep gives each rank its experts: call deepspeed.init_distributed() first."
        )


def _give_memory(model: Any) -> None:
    """Memory for the tensors that a checkpoint fills, and the values of buffers that none has."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:  # tied ones have several names
                values = torch.empty(param.shape, dtype=_dtype(model, f"{path}.{name}", param))
                new = nn.Parameter(values, param.requires_grad)
                vars(new).update(vars(param))
                made[id(param)] = param, new
            module._parameters[name] = made[id(param)][1]
        for name, buffer in [*module.named_buffers(recurse=False)]:
            if name not in module._non_persistent_buffers_set:
                dtype = _dtype(model, f"{path}.{name}", buffer)
                module._buffers[name] = torch.empty(buffer.shape, dtype=dtype)
        module._buffers.update(_unsaved_buffers(model, path, module))


def _dtype(model: Any, name: str, tensor: torch.Tensor) -> torch.dtype:
    kept = any(f".{part}." in f".{name}." for part in model._keep_in_fp32_modules_strict)
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if kept and half else tensor.dtype


def _unsaved_buffers(
    model: Any, path: str, module: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Non-persistent buffers, as the initialization of transformers computes them.

    Raises:
        InvalidArgumentError: it does not compute one.
    """
    empty = {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    }
    if is_autoep_layer(module):  # it counts tokens in them
        yield from ((name, torch.zeros_like(it, device="cpu")) for name, it in empty.items())
    if not empty or is_autoep_layer(module):
        return
    other = copy.copy(module)
    blank = {name: _blank(buffer) for name, buffer in empty.items()}
    other._buffers = {**module._buffers, **blank}
    with torch.no_grad():
        model._init_weights(other)
    for name in empty:
        values = other._buffers[name]
        if values is None or _is_blank(values).any():
            raise InvalidArgumentError(
                f"{path}.{name} is not in checkpoints, and _init_weights of "
                f"{type(model).__name__} does not compute it: load with from_pretrained."
            )
        yield name, values


def _blank(buffer: torch.Tensor) -> torch.Tensor:
    """In CPU memory, full of a value that no initialization gives; True for truth values."""
    dtype = buffer.dtype
    if dtype.is_floating_point or dtype.is_complex:
        return torch.full_like(buffer, float("nan"), device="cpu")
    largest = True if dtype == torch.bool else torch.iinfo(dtype).max
    return torch.full_like(buffer, largest, device="cpu")


def _is_blank(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.isnan() | (buffer == _blank(buffer))


def support_new_transformers() -> None:
    """Let AutoEP find the outputs that a ``transformers`` model records, in any version.

    AutoEP (deepspeed 0.19.8, ``module_inject/auto_ep_presets/base.py``) uses the registry of
    transformers as a dict of class names. Newer registries have a ``get`` that takes a model,
    which raises a TypeError; after this call ``get`` takes either. Does nothing if not needed.
    """
    try:
        registry = type(importlib.import_module(_REGISTRY)._CAN_RECORD_REGISTRY)
    except (ModuleNotFoundError, AttributeError):
        return
    if registry.get is dict.get or not wrap_once(registry, "get", _wrap_get):
        return
    if os.environ.get("RANK", "0") == "0":
        _log.warning(
            "this transformers has another registry of outputs than DeepSpeed's AutoEP knows; "
            "moe-groups lets AutoEP read it (support_new_transformers)."
        )


def _wrap_get(original: Callable[..., Any]) -> Callable[..., Any]:
    def get(self: Any, key: Any, *default: Any) -> Any:
        return dict.get(self, key, *default) if isinstance(key, str) else original(self, key)

    return get
