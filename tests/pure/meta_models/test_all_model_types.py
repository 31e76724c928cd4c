"""Every MoE model type of the installed transformers: its experts, and its default plan.

The experts are counted in another way than the product's: by what a model gains when its config
names twice as many of them.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

from moe_groups import estimate_step_memory, plan_param_groups
from moe_groups.errors import InvalidArgumentError
from moe_groups.meta_models.rank import shard_for_rank, undivided_layers
from moe_groups.meta_models.source import load_model

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

EXPERTS = re.compile(r"(n|num|moe_num)_(local_|routed_)?experts|zero_expert_num")
EP, WORLD, STAGES = 8, 64, 4


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
        unlike = getattr(vars(part).get("_heterogeneity_spec"), "per_layer_overrides", {})
        for values in (vars(part), *unlike.values()):
            for name, number in list(values.items()):
                if EXPERTS.fullmatch(name) and isinstance(number, int) and number > 1:
                    values[name] = 2 * number
    with torch.device("meta"):
        return elements(type(model)(config)) - elements(model)


def builds(config: Any) -> bool:
    """Does any class that transformers names for this config build a model?"""
    for name in [name for name in dir(transformers) if name.startswith("AutoModel")]:
        try:
            with torch.device("meta"):
                getattr(transformers, name).from_config(config)
        except Exception:
            continue
        return True
    return False


def check_refusal(refused: str, model: nn.Module, config: Any) -> None:
    if "needs experts" in refused:
        assert gained(model, config) == 0
    else:
        number = int(refused.partition("does not divide the ")[2].split()[0])
        assert number % EP
        assert number in [value for part in parts(config) for value in vars(part).values()]


def check_experts(model: nn.Module, rank: nn.Module, config: Any) -> None:
    own = elements(rank, experts=True)
    undivided = sum(p.numel() for layer in undivided_layers(model, EP) for p in layer.params())
    found, more = EP * own + undivided, gained(model, config)
    assert elements(rank) + (EP - 1) * own == elements(model)
    assert 0.998 * more <= found <= more, (found, more)


def check_default_plan(rank: nn.Module) -> None:
    stock = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(rank.parameters()), "name": "dense"}
    )
    peak = estimate_step_memory(stock, data_parallel_size=WORLD).step_peak
    assert plan_param_groups(rank, data_parallel_size=WORLD).memory.step_peak <= peak


def check(model_type: str) -> str:
    """What was checked."""
    config = transformers.AutoConfig.for_model(model_type)
    try:
        model = load_model(model_type)
    except InvalidArgumentError:
        assert not builds(config)
        return "no model"
    try:
        rank = shard_for_rank(model, ep_size=EP, experts="fused")
    except InvalidArgumentError as error:
        check_refusal(str(error), model, config)
        return "refused"
    check_experts(model, rank, config)
    check_default_plan(shard_for_rank(model, ep_size=EP, experts="fused", pp_size=STAGES))
    return "planned"


def test_all_model_types() -> None:
    checked: Counter[str] = Counter()
    wrong = []
    for model_type in filter(is_moe, list(transformers.CONFIG_MAPPING)):
        try:
            checked[check(model_type)] += 1
        except AssertionError as error:
            wrong.append(f"{model_type}: {str(error)[:300]}")
    assert not wrong
    assert checked["planned"] > 2 * checked["no model"] > 0
