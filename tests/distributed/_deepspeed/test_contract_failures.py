"""What breaks or hangs in DeepSpeed itself; where it stops doing so, code of ours can go.

Ranks that must see DeepSpeed as it is run in a pool in which this library has not grouped
anything.
"""

from collections.abc import Collection
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as stock_split
from deepspeed.utils import groups

from tests.support.hash_seeds import two_hash_seeds
from tests.support.models import TinyMoE
from tests.support.ranks import HANG, RankError, run_in_fresh_processes, run_on_stock
from tests.support.skipping import StockSkippingMoE, skip, train_skipping
from tests.support.training import config, initialize, make_groups, start, train

EP2 = {"ep_size": 2}
HANGS = rf"not done after {HANG:g} s(.|\n)*in all_reduce"


# ---- hangs ----------------------------------------------------------------------------


def train_with_name_per_expert(used: Collection[int]) -> None:
    """Names that lead to the process groups, registered by hand; rank 1 runs ``used``."""
    skip([1], used)
    model = TinyMoE(StockSkippingMoE, layers=1, ep_size=2)

    def optimizer(params: Any) -> torch.optim.Optimizer:
        dense, experts = make_groups(model, "stock")
        made = [dense]
        for number in range(2):
            made.append({**experts, "name": f"ep_size_2_expert.{number}"})
            made[-1]["params"] = experts["params"][3 * number : 3 * number + 3]
            for known in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
                known[made[-1]["name"]] = known["ep_size_2"]
        return torch.optim.AdamW(made)

    train(initialize(model, optimizer, config("bf16")), 1)


@pytest.mark.long
def test_bf16_hangs_with_names_of_its_own_where_one_has_no_gradient() -> None:
    run_on_stock(2, train_with_name_per_expert, (0, 1))
    with pytest.raises(RankError, match=HANGS):
        run_on_stock(2, train_with_name_per_expert, (0,), timeout=HANG)


def train_stock(wrapper: str, skips: Collection[int], used: Collection[int]) -> None:
    train_skipping(wrapper, "stock", 2, skips, used)


@pytest.mark.long
def test_bf16_hangs_where_no_expert_has_a_gradient() -> None:
    with pytest.raises(RankError, match=HANGS):
        run_on_stock(2, train_stock, "bf16", [1], (), timeout=HANG)


@pytest.mark.parametrize("wrapper", ["zero1", "zero2"])
def test_zero_fails_where_ranks_that_share_an_expert_disagree(wrapper: str) -> None:
    run_on_stock(4, train_stock, wrapper, [1, 3], (0,))
    with pytest.raises(RankError, match="in all_reduce"):
        run_on_stock(4, train_stock, wrapper, [1], (0,), timeout=HANG)


# ---- groups ---------------------------------------------------------------------------


def start_with(wrapper: str, change: str) -> str:
    """DeepSpeed's groups after a change, one training step; the error that it gives."""

    def groups_of(model: Any) -> list[dict[str, Any]]:
        dense, experts = make_groups(model, "stock")
        first, *others = experts["params"]
        if change == "no dense group":
            for param in dense["params"]:
                param.requires_grad_(False)
            return [experts]
        made = [dense, {**experts, "params": others}]
        if change == "frozen":
            first.requires_grad_(False)
            return [*made, {**experts, "params": [first]}]
        return [made[0], {**experts, "params": []}, experts]

    try:
        engine = start(wrapper, groups_of, model_options=EP2, layer=DeepSpeedMoE)
        train(engine, 1)
    except (IndexError, RuntimeError, ValueError) as error:
        return repr(error)
    assert len(engine.optimizer.param_groups) == 2
    return ""


@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "bf16"])
def test_engine_drops_empty_groups(wrapper: str) -> None:
    assert run_on_stock(2, start_with, wrapper, "empty") == ["", ""]


@pytest.mark.parametrize(
    ("wrapper", "change", "message"),
    [
        ("zero1", "frozen", "IndexError"),
        ("zero2", "frozen", "IndexError"),
        ("bf16", "frozen", "expected a non-empty list of Tensors"),
        ("bf16", "no dense group", "stack expects a non-empty TensorList"),
    ],
)
def test_groups_that_break_the_wrapper(wrapper: str, change: str, message: str) -> None:
    for text in run_on_stock(2, start_with, wrapper, change):
        assert message in text


def start_zero3() -> None:
    zero3 = {"stage": 3}
    with pytest.raises(AssertionError, match="MoE is not supported with ZeRO Stage 3"):
        start("zero2", lambda model: make_groups(model, "stock"), zero_optimization=zero3)


def test_zero3_refuses_moe_layers() -> None:
    run_on_stock(2, start_zero3)


# ---- the split ------------------------------------------------------------------------

SIZES = (1, 2, 4, 8)


def parameter(numel: int, ep_size: int | None = None) -> torch.nn.Parameter:
    made: Any = torch.nn.Parameter(torch.zeros(numel))
    if ep_size:
        made.allreduce, made.group_name = False, f"ep_size_{ep_size}"
    return made  # type: ignore[no-any-return]


def test_split_changes_its_input() -> None:
    given = {"params": [parameter(1), parameter(1, ep_size=2)], "name": "mine"}
    stock_split(given)
    assert len(given["params"]) == 1


def test_split_begins_with_an_empty_group_where_the_first_parameter_exceeds_the_cap() -> None:
    given = {"params": [parameter(9, ep_size=2), parameter(1, ep_size=2)], "name": "mine"}
    sizes = [len(group["params"]) for group in stock_split(given, max_group_size=5)]
    assert sizes == [0, 0, 1, 1]  # dense, then the experts


def test_split_needs_names() -> None:
    with pytest.raises(KeyError, match="name"):
        stock_split({"params": [parameter(1, ep_size=2)]})


def test_split_gives_the_last_of_two_groups_with_one_name_all_experts() -> None:
    given = [{"params": [parameter(1, ep_size=2)], "name": "mine", "lr": lr} for lr in (0.1, 0.2)]
    moe = [group for group in stock_split(given) if group.get("moe")]
    assert [(group["lr"], len(group["params"])) for group in moe] == [(0.2, 2)]


@pytest.mark.long
def test_split_orders_groups_by_hash() -> None:
    """Of several ep sizes, names come out of a set: another order under another hash seed."""
    first, second = two_hash_seeds([f"ep_size_{n}" for n in SIZES])
    orders = {
        run_in_fresh_processes(1, order_of_split, env={"PYTHONHASHSEED": seed})[0]
        for seed in (first, second)
    }
    assert len(orders) == 2


def order_of_split() -> tuple[str, ...]:
    given = {"params": [parameter(1, ep_size=n) for n in SIZES], "name": "mine"}
    return tuple(group["name"] for group in stock_split(given))
