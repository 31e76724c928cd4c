"""AutoEP replaces MoE blocks inside of ``deepspeed.initialize``: groups that were made before.

DeepSpeed puts each parameter that AutoEP makes into the group of those that it is made of
(``_remap_client_optimizer_after_module_replacement`` in ``runtime/engine.py``), at its end.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from moe_groups._deepspeed.autoep.made_before import CHANGES as MADE_CHANGES, mark_made
from moe_groups._deepspeed.autoep.source_layers import transformers_model
from moe_groups._deepspeed.layers import is_autoep_layer
from moe_groups._deepspeed.patching import Change, change_functions
from moe_groups._deepspeed.ports import PORTS
from moe_groups._deepspeed.releases import need
from moe_groups.errors import InvalidArgumentError

_FOLLOWED: "weakref.WeakSet[Any]" = weakref.WeakSet()
"""Engines whose groups hold replacements of what they were made for."""


def support_early_groups() -> None:
    """Let ``deepspeed.initialize`` follow our groups through AutoEP's replacement of modules.

    AutoEP then also finds a model of transformers inside of another module, such as PEFT's or
    Lightning's, unless the config has a ``moe_layer_pattern``.

    Raises:
        UnsupportedDeepSpeedError: this DeepSpeed cannot. Nothing has been changed then.
    """
    need("remapped groups", "make groups with autoep_optimizer")
    change_functions((*_CHANGES, *MADE_CHANGES), "groups that are made before AutoEP need")


def find_sources(model: nn.Module, block: Mapping[str, Any]) -> tuple[list[torch.Tensor], int]:
    """The expert parameters of ``model`` that AutoEP will distribute, and to how many ranks.

    Args:
        block: ``"expert_parallel"`` of the DeepSpeed config.

    Raises:
        InvalidArgumentError: AutoEP cannot distribute an MoE block, or finds none in a model
            of a type that has some.
    """
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import (
        parse_autoep_config,
        validate_autoep_post_detection,
    )

    config = parse_autoep_config(dict(block))
    if (
        type(config.enabled) is not bool
        or type(config.autoep_size) is not int
        or (config.autoep_size < 1)
    ):
        raise InvalidArgumentError(
            f'"expert_parallel" of the DeepSpeed config has enabled={config.enabled!r} and '
            f"autoep_size={config.autoep_size!r}: expected true and a positive integer."
        )
    try:
        parser = AutoEP(model, config)
        specs = parser.ep_parser()
        validate_autoep_post_detection(config, specs)
    except ValueError as error:
        raise InvalidArgumentError(f"AutoEP cannot distribute the model's experts: {error}") from (
            error
        )
    blocks = [parser.model.get_submodule(spec.moe_module_name) for spec in specs]
    experts = [getattr(block, spec.experts_name) for block, spec in zip(blocks, specs, strict=True)]
    return [param for each in experts for param in each.parameters()], int(config.autoep_size)


def known_model_types() -> list[str]:
    """The model types of transformers for which AutoEP has presets."""
    from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS

    return sorted(kind for preset in PRESET_MODELS.values() for kind in preset.hf_model_types)


def keep_model_order(engine: Any, optimizer: Any) -> None:
    """Put replacements where the model has them, as in groups that are made afterwards."""
    if engine in _FOLLOWED:
        place = {id(param): index for index, param in enumerate(engine.module.parameters())}
        for group in optimizer.param_groups:
            group["params"].sort(key=lambda param: place.get(id(param), len(place)))


def _wrap_configure(original: Callable[..., Any]) -> Callable[..., Any]:
    """Tag what AutoEP has made, and remember what the groups were made from."""

    def _configure_expert_parallel(self: Any, model: nn.Module, collect_sources: Any = None) -> Any:
        replaced = original(self, model, collect_sources)
        if any(map(is_autoep_layer, model.modules())):
            mark_made(_beginning(model), self._config.expert_parallel_config)
        if replaced and PORTS.modules_replaced(model, replaced.sources):
            _FOLLOWED.add(self)
        return replaced

    return _configure_expert_parallel


def _wrap_init(original: Callable[..., None]) -> Callable[..., None]:
    """Look for the blocks in the model of transformers: the presets' patterns begin there."""

    def begin(self: Any, model: nn.Module, config: Any) -> None:
        whole = config.moe_layer_pattern is not None
        original(self, model if whole else _beginning(model), config)

    return begin


def _beginning(model: nn.Module) -> nn.Module:
    """Where the patterns of AutoEP's presets begin; ``model`` if nothing is of transformers."""
    _, found = transformers_model(model) or ("", model)
    return found


_CHANGES: tuple[Change, ...] = (
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_configure_expert_parallel", _wrap_configure),
    ("deepspeed.module_inject.auto_ep:AutoEP", "__init__", _wrap_init),
)
