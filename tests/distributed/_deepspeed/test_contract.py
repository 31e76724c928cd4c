"""Facts about DeepSpeed that the library relies on: names, process groups, wrappers.

One small test each, so that a DeepSpeed that breaks one is seen at once. What breaks or
hangs in DeepSpeed without this library is in ``test_contract_failures.py``.
"""

import copy
import inspect
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed.runtime.bf16_optimizer
import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from moe_groups import protect_checkpoints
from moe_groups._deepspeed import contract, patching, releases
from moe_groups.checkpoints.layout import round_robin
from moe_groups.errors import UnsupportedDeepSpeedError
from tests.support.models import FFN, HIDDEN, TinyMoE
from tests.support.old_deepspeed import NO_BF16, before, known_before
from tests.support.ranks import RankError, run_on_ranks, run_on_stock
from tests.support.training import (
    WRAPPERS,
    config,
    groups_by,
    initialize,
    make_groups,
    start,
    train,
)

EP2 = {"ep_size": 2}
REGISTRIES = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)


# ---- names ----------------------------------------------------------------------------


def stock_with_name(name: str) -> Callable[[Any], list[dict[str, Any]]]:
    """DeepSpeed's two groups, the one of the experts under another name."""

    def groups_of(model: Any) -> list[dict[str, Any]]:
        dense, experts = make_groups(model, "stock")
        return [dense, {**experts, "name": name}]

    return groups_of


def train_with_unknown_name(wrapper: str) -> str:
    with pytest.raises((AssertionError, KeyError)) as failure:
        train(start(wrapper, stock_with_name("experts"), model_options=EP2), 1)
    return str(failure.value)


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("zero1", "'experts'"),
        ("zero2", "'experts'"),
        ("bf16", "expert data parallel group is not initialized"),
        ("half", "expert parallel group is not initialized"),
    ],
)
def test_name_of_moe_group_is_a_process_group_key(wrapper: str, message: str) -> None:
    with known_before("0.18.5", NO_BF16):
        assert run_on_ranks(2, train_with_unknown_name, wrapper) == [message] * 2


def save_with_key(name: str, folder: Path) -> None:
    engine = start("zero1", groups_by("stock"), model_options=EP2)
    groups._EXPERT_PARALLEL_GROUP[name] = groups._EXPERT_PARALLEL_GROUP["ep_size_2"]
    engine.save_checkpoint(str(folder))


def test_saving_reads_the_ep_size_out_of_every_key(tmp_path: Path) -> None:
    run_on_ranks(2, save_with_key, "ep_size_2_layers.3.moe", tmp_path)
    with pytest.raises(RankError, match=r"in save_checkpoint(.|\n)*in _get_max_expert_size"):
        run_on_ranks(2, save_with_key, "layers.3.moe", tmp_path)


def names_after_load(folder: Path) -> tuple[list[str], list[str]]:
    options = {"ep_size": 2, "layers": 1}
    engine = start("bf16", groups_by("module"), model_options=options)
    train(engine, 1)
    engine.save_checkpoint(str(folder))
    saved = [group["name"] for group in engine.optimizer.param_groups]
    engine = start("bf16", groups_by("stock"), model_options=options)
    protect_checkpoints(engine, regroup="off")
    engine.load_checkpoint(str(folder))
    return saved, [group["name"] for group in engine.optimizer.param_groups]


def load_and_step(folder: Path) -> None:
    """DeepSpeed as it is."""
    engine = start("bf16", groups_by("stock"), model_options={"ep_size": 2, "layers": 1})
    engine.load_checkpoint(str(folder))
    with pytest.raises(AssertionError, match="expert parallel group is not initialized"):
        train(engine, 1)


def test_load_checkpoint_overwrites_names(tmp_path: Path) -> None:
    for saved, loaded in run_on_ranks(2, names_after_load, tmp_path):
        assert saved == loaded == ["dense", "ep_size_2_blocks.0.moe"]
    run_on_stock(2, load_and_step, tmp_path)


# ---- process groups -------------------------------------------------------------------


def communicators() -> tuple[int, int]:
    """Communicators with DeepSpeed's split and with a name for each expert."""
    counts = []
    for split in ("stock", "expert"):
        engine = start("zero2", groups_by(split), model_options=EP2)
        counts.append(len(torch.distributed.distributed_c10d._world.pg_map))
    names = [group["name"] for group in engine.optimizer.param_groups if group.get("moe")]
    assert len(names) == 4
    for registry in REGISTRIES:  # those of ranks exist since DeepSpeed 0.17
        known = getattr(groups, registry, groups._EXPERT_PARALLEL_GROUP)
        assert all(known[name] is known["ep_size_2"] for name in names)
    return counts[0], counts[1]


def test_aliases_share_the_communicator() -> None:
    for stock, ours in run_on_ranks(2, communicators):
        assert stock == ours


def keys_when_the_optimizer_is_made() -> tuple[list[str], list[str]]:
    seen = []

    def optimizer(params: Any) -> torch.optim.Optimizer:
        seen.append(list(groups._get_expert_data_parallel_group_dict()))
        return torch.optim.AdamW(make_groups(model, "stock"))

    model = TinyMoE(DeepSpeedMoE, ep_size=2)
    before = list(groups._get_expert_data_parallel_group_dict())
    initialize(model, optimizer, config("bf16"))
    return before, seen[0]


def test_layers_create_process_groups_before_the_optimizer_is_wrapped() -> None:
    assert run_on_ranks(2, keys_when_the_optimizer_is_made) == [([], ["ep_size_2"])] * 2


def initialize_twice() -> None:
    layer = DeepSpeedMoE(HIDDEN, FFN(), num_experts=2, ep_size=2)
    layer.set_deepspeed_parallelism()
    with pytest.raises(AssertionError, match="Attempting to override an existing ep_group"):
        layer.set_deepspeed_parallelism()


def test_layer_takes_its_process_group_once() -> None:
    run_on_ranks(2, initialize_twice)


# ---- wrappers and patched places ------------------------------------------------------

MEMBERS = {
    "zero1": "bit16_groups",
    "zero2": "bit16_groups",
    "bf16": "bf16_groups",
    "half": "fp16_groups",
    "half_unfused": "fp16_groups",
}


def members_of(wrapper: str) -> None:
    wanted: list[list[int]] = []

    def groups_of(model: Any) -> list[dict[str, Any]]:
        made = make_groups(model, "expert")
        wanted.extend([id(param) for param in group["params"]] for group in made)
        return made

    engine = start(wrapper, groups_of, model_options=EP2)
    assert type(engine.optimizer).__name__ == WRAPPERS[wrapper]
    kept = getattr(engine.optimizer, MEMBERS[wrapper])
    assert [[id(param) for param in group] for group in kept] == wanted
    assert len(engine.optimizer.param_groups) == len(wanted)
    assert torch.distributed.get_world_size(engine.seq_data_parallel_group) == 2


@pytest.mark.parametrize("wrapper", MEMBERS)
def test_wrapper_keeps_the_members_of_groups(wrapper: str) -> None:
    run_on_ranks(2, members_of, wrapper)


SIGNATURES = {
    "_broadcast_model": "(self)",
    "_configure_moe_settings": "(self)",
    "load_module_state_dict": "(self, checkpoint, strict=True, custom_load_fn=None, "
    "fetch_z3_params=False, z3_params_to_fetch=None, allowed_missing_keys=None)",
    "_configure_distributed_model": "(self, model)",
    "scaled_global_norm": "(self, norm_type=2)",
    "_gather_tokens": "(input_, dim=0)",
    "is_model_parallel_parameter": "(p) -> bool",
    "_do_optimizer_sanity_check": "(self, basic_optimizer)",
    "_configure_basic_optimizer": "(self, model_parameters)",
    "_setup_for_real_optimizer": "(self)",
    "see_memory_usage": "(message, force=False)",
    "step": "(self, closure=None)",
    "get_grads_for_norm": "(self, for_clipping=False)",
    "get_grads_for_reduction": "(self)",
    "get_norm_with_moe_layers": "(non_expert_norm, mpu, expert_tensors, norm_type=2)",
    "save_checkpoint": "(self, save_dir, tag=None, client_state={}, save_latest=True, "
    "exclude_frozen_parameters=False)",
    "save_16bit_model": "(self, save_dir, save_filename='pytorch_model.bin', "
    "exclude_frozen_parameters=False)",
    "load_checkpoint": "(self, load_dir, tag=None, load_module_strict=True, "
    "load_optimizer_states=True, load_lr_scheduler_states=True, load_module_only=False, "
    "custom_load_fn=None)",
}


@pytest.mark.parametrize(("owner", "name"), [change[:2] for change in contract.CHANGES])
def test_patched_places(owner: str, name: str) -> None:
    _, place = patching.find(owner, name)
    found, pinned = str(inspect.signature(inspect.unwrap(place))), SIGNATURES[name]
    if name == "load_module_state_dict":  # gets arguments at its end, which ours takes as they come
        assert pinned.startswith(found.removesuffix(")"))
    else:
        assert found == pinned


def test_a_feature_that_a_release_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = releases.Feature("cannot fly", "9.8", lambda: False)
    monkeypatch.setitem(releases.FEATURES, "wings", lacking)
    installed = re.escape(version("deepspeed").partition("+")[0])
    with pytest.raises(
        UnsupportedDeepSpeedError,
        match=rf"^deepspeed {installed}\S* cannot fly: install deepspeed 9.8 or newer, or walk.$",
    ):
        releases.need("wings", "walk")


@pytest.mark.parametrize("feature", releases.FEATURES)
def test_the_pinned_release_has_every_feature(feature: str) -> None:
    if not before(patching.TESTED_VERSION):
        releases.need(feature, "")


def test_what_stages_agree_with() -> None:
    zero = DeepSpeedZeroOptimizer
    for function, first in (
        (zero.get_grad_norm_direct, ["self", "gradients", "params"]),
        (zero.complete_grad_norm_calculation_for_cpu_offload, ["self", "params"]),
        (groups._create_expert_data_and_model_parallel, ["expert_parallel_size_", "mpu"]),
        (groups._create_expert_and_data_parallel, ["expert_parallel_size_"]),
    ):
        assert list(inspect.signature(function).parameters)[: len(first)] == first
    for function in (
        groups._create_expert_and_data_parallel,
        groups._create_expert_data_and_model_parallel,
    ):
        assert "use_data_before_expert_parallel_" in inspect.signature(function).parameters


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_order_of_round_robin_gradients(count: int, ranks: int) -> None:
    theirs, _ = DeepSpeedZeroOptimizer._round_robin_reorder(None, list(range(count)), ranks)
    assert round_robin(range(count), ranks) == theirs


def test_memory_report_is_a_name_of_the_bf16_module() -> None:
    module = deepspeed.runtime.bf16_optimizer
    assert list(inspect.signature(module.see_memory_usage).parameters) == ["message", "force"]
    setup = inspect.unwrap(module.BF16_Optimizer._setup_for_real_optimizer)
    assert "see_memory_usage" in setup.__code__.co_names


def test_deep_copy_of_a_parameter_loses_its_tag() -> None:
    layer = DeepSpeedMoE(HIDDEN, FFN(), num_experts=2)
    tagged = [is_moe_param(param) for param in layer.parameters()]
    assert sum(tagged) == 6
    assert not any(is_moe_param(param) for param in copy.deepcopy(layer).parameters())
