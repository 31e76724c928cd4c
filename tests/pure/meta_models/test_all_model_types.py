"""Every MoE model type of the installed transformers: its experts, and its default plan.

The experts are counted in another way than the product's: by what a model gains when its config
names twice as many of them.
"""

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from moe_groups import create_moe_param_groups, estimate_step_memory, plan_param_groups
from moe_groups.errors import InvalidArgumentError
from moe_groups.meta_models.rank import shard_for_rank, undivided_layers
from moe_groups.meta_models.source import load_model

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

EXPERTS = re.compile(r"(n|num|moe_num)_(local_|routed_)?experts|moe_num_experts")
EP = 8


def parts(config: Any) -> Iterator[Any]:
    """The config and those inside of it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield from parts(value)


def is_moe(model_type: str) -> bool:
    """Does the default config name experts?"""
    try:
        config = transformers.AutoConfig.for_model(model_type)
    except Exception:  # some types have no default config
        return False
    return "expert" in json.dumps(config.to_dict(), default=str)


MODEL_TYPES = sorted(filter(is_moe, transformers.CONFIG_MAPPING))


def elements(model: nn.Module, experts: bool = False) -> int:
    return sum(
        param.numel()
        for param in model.parameters()
        if not (experts and getattr(param, "allreduce", True))
    )


def gained(model: nn.Module, config: Any) -> int:
    """What the model gains from twice as many experts: the experts, and rows of routers."""
    config = copy.deepcopy(config)
    for part in parts(config):
        for name in [name for name in vars(part) if EXPERTS.fullmatch(name)]:
            if isinstance(number := getattr(part, name), int) and number > 1:
                setattr(part, name, 2 * number)
    with torch.device("meta"):
        return elements(type(model)(config)) - elements(model)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_experts_are_found_or_the_refusal_is_true(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    try:
        model = load_model(model_type)
    except InvalidArgumentError:
        assert not builds(config)
        return
    try:
        rank = shard_for_rank(model, ep_size=EP, experts="fused")
    except InvalidArgumentError as error:
        refused = str(error)
        if "needs experts" in refused:
            assert gained(model, config) == 0
        else:
            number = int(refused.partition("does not divide the ")[2].split()[0])
            assert number % EP
            assert number in [v for part in parts(config) for v in vars(part).values()]
        return
    whole = shard_for_rank(model, experts="fused")
    assert elements(whole) == elements(model)
    undivided = sum(p.numel() for layer in undivided_layers(model, EP) for p in layer.params())
    found = elements(whole, experts=True)
    assert EP * elements(rank, experts=True) == found - undivided
    assert 0.998 * gained(model, config) <= found <= gained(model, config)


def builds(config: Any) -> bool:
    """Does any class that transformers names for this config build a model?"""
    for name in dir(transformers):
        kind = getattr(transformers, name) if name.startswith("AutoModel") else None
        try:
            with torch.device("meta"):
                kind.from_config(config)
        except Exception:
            continue
        return True
    return False
