"""DeepSpeed's AutoEP, which turns the MoE blocks of a ``transformers`` model expert-parallel."""

import copy
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from moe_groups._common.arguments import FilePath, checked, need
from moe_groups._common.json_file import read_json
from moe_groups._common.ranks import on_all_ranks
from moe_groups._deepspeed.autoep import make_autoep_layers
from moe_groups._deepspeed.layers import is_autoep_layer
from moe_groups.errors import InvalidArgumentError, ParameterInputError
from moe_groups.param_groups import create_moe_param_groups
from moe_groups.tags import is_expert_parameter
from moe_groups.weights.load import LoadedExperts, load_experts

_REGISTRY = "transformers.utils.output_capturing"


def autoep_optimizer(
    model: nn.Module, make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], **grouping: Any
) -> Callable[[Any], torch.optim.Optimizer]:
    """An ``optimizer=`` for ``deepspeed.initialize`` that groups the experts which AutoEP makes.

    AutoEP replaces modules inside of ``deepspeed.initialize``, so groups that were made before
    hold parameters that are no longer in the model. The returned function is called later,
    and it groups the new parameters, with ``split_by="module"`` by layer.

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
    settings = config if isinstance(config, Mapping) else _read_config(config)
    _check_empty(model)
    support_new_transformers()
    own = copy.deepcopy(model, {id(model.config): model.config})
    make_autoep_layers(own, settings)
    _give_memory(own)
    loaded: list[LoadedExperts] = []
    on_all_ranks(lambda: loaded.append(load_experts(own, directory)), "The model is as before.")
    vars(model).update(vars(own))
    return loaded[0]


def _read_config(path: FilePath) -> Mapping[str, Any]:
    return read_json(Path(path), InvalidArgumentError, "It must be DeepSpeed's config.")


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
    """Let AutoEP find the outputs that a ``transformers`` model records, whatever its version.

    AutoEP (deepspeed 0.19.8, ``module_inject/auto_ep_presets/base.py``) uses the registry of
    transformers as a dict of class names. Newer registries have a ``get`` that takes a model,
    which raises a TypeError; after this call ``get`` takes either. Does nothing if not needed.
    """
    try:
        registry = type(importlib.import_module(_REGISTRY)._CAN_RECORD_REGISTRY)
    except (ModuleNotFoundError, AttributeError):
        return
    original = registry.get
    if original is dict.get or hasattr(original, "_moe_groups_original"):
        return

    @functools.wraps(original)
    def get(self: Any, key: Any, *default: Any) -> Any:
        return dict.get(self, key, *default) if isinstance(key, str) else original(self, key)

    get._moe_groups_original = original  # type: ignore[attr-defined]
    registry.get = get
