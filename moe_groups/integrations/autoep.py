"""DeepSpeed's AutoEP, which turns the MoE blocks of a ``transformers`` model expert-parallel."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_groups.errors import ParameterInputError
from moe_groups.param_groups import create_moe_param_groups
from moe_groups.tags import is_expert_parameter

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
