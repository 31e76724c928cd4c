"""DeepSpeed's AutoEP, which turns the MoE blocks of a ``transformers`` model expert-parallel."""

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_groups._common.arguments import FilePath, checked
from moe_groups._common.json_file import read_json
from moe_groups._deepspeed.autoep import find_sources, known_model_types, support_early_groups
from moe_groups.errors import InvalidArgumentError, ParameterInputError
from moe_groups.experts.find import restored_on_error, tag_experts
from moe_groups.param_groups import create_moe_param_groups
from moe_groups.tags import EXPERT_RANKS, ExpertTag, is_expert_parameter, set_expert_tag

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

    Afterwards :func:`create_moe_param_groups` groups them by layer, where somebody else calls
    ``deepspeed.initialize`` (Lightning), or wants an optimizer before. DeepSpeed puts what AutoEP
    makes of a layer's experts into the groups of these, and the groups are then those that
    :func:`autoep_optimizer` makes. Caps and budgets count a rank's part of the experts.
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
    if not isinstance(config, Mapping):
        config = read_json(Path(config), InvalidArgumentError)
    if not autoep_enabled(config):
        raise InvalidArgumentError(
            'the DeepSpeed config does not enable AutoEP: add "expert_parallel": {"enabled": true, '
            '"autoep_size": N}.'
        )
    support_early_groups()
    support_new_transformers()
    params, ranks = find_sources(model, config["expert_parallel"])
    if found_none and not params:
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
    """Does this DeepSpeed config turn AutoEP on?"""
    return bool((config.get("expert_parallel") or {}).get("enabled"))


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
    if os.environ.get("RANK", "0") == "0":
        _log.warning(
            "this transformers has another registry of outputs than DeepSpeed's AutoEP knows; "
            "moe-groups lets AutoEP read it (support_new_transformers)."
        )
