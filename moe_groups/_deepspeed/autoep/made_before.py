"""Layers of AutoEP that are made before the engine."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from moe_groups._deepspeed.patching import Change, change_functions
from moe_groups.errors import InvalidArgumentError

_MADE = "_moe_groups_autoep"


def make_autoep_layers(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Replace the MoE layers of a model on the meta device, as ``deepspeed.initialize`` would.

    All ranks call it together, for it makes the process groups of the experts.
    ``deepspeed.initialize`` then leaves the layers as they are.

    Args:
        model: of transformers.
        settings: DeepSpeed's config, which turns AutoEP on.

    Raises:
        InvalidArgumentError: AutoEP refuses the model or the settings.
        UnsupportedDeepSpeedError: this DeepSpeed has no AutoEP that is known.
    """
    change_functions(CHANGES, "load_autoep needs")
    from deepspeed.module_inject import auto_ep_config as checks
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.runtime.config import get_expert_data_topo_config, get_expert_parallel_config
    from deepspeed.utils import groups

    config = get_expert_parallel_config(settings)
    if settings.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise InvalidArgumentError(
            "load_autoep does not load parts of dense layers: take tensor_parallel out of the "
            "config, or load with from_pretrained."
        )
    try:
        checks.validate_autoep_config(config, torch.distributed.get_world_size(), 1, 1, 1)
        found = AutoEP(model, config)
        specs = found.ep_parser()
        if not specs:
            raise ValueError("it finds no MoE layer in the model")
        checks.validate_autoep_post_detection(config, specs)
    except ValueError as error:
        raise InvalidArgumentError(f"AutoEP refuses this model or config: {error}") from error
    size = config.autoep_size
    before = get_expert_data_topo_config(settings)
    groups._create_expert_and_data_parallel(size, 1, 1, use_data_before_expert_parallel_=before)
    group = groups._get_expert_parallel_group(f"ep_size_{size}")
    with torch.device("meta"):
        found.replace_moe_layers(specs, size, torch.distributed.get_rank(group))
    mark_made(model, config)


def mark_made(model: nn.Module, config: Any) -> None:
    """Note that ``model`` has its layers, so that a later engine leaves them as they are.

    Args:
        config: AutoEP's, by which they were made.
    """
    setattr(model, _MADE, copy.copy(config))


def _wrap_parser(original: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """Find nothing to replace in a model whose layers have been made before."""

    def ep_parser(self: Any) -> list[Any]:
        made = [vars(part)[_MADE] for part in self.model.modules() if _MADE in vars(part)]
        if not made:
            return original(self)
        if made[0] != self.config:
            raise InvalidArgumentError(
                f"the experts of this model were distributed with {made[0]}, and expert_parallel "
                f"of this config gives {self.config}. Use the same expert_parallel, or make the "
                "model anew."
            )
        return []

    return ep_parser


CHANGES: tuple[Change, ...] = (
    ("deepspeed.module_inject.auto_ep:AutoEP", "ep_parser", _wrap_parser),
)
