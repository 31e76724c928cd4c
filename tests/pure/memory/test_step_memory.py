"""estimate_step_memory and StepConfig as a user gives and gets them."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_groups import (
    ExpertTag,
    StepConfig,
    Topology,
    create_moe_param_groups,
    estimate_step_memory,
    set_expert_tag,
)
from moe_groups._common.text import parse_bytes, show_bytes
from moe_groups.errors import InvalidArgumentError
from moe_groups.memory.estimate import on_ranks


def model() -> nn.Module:
    """1,000 dense elements, and 2 experts of 2 matrices of 400 in one layer."""
    root = nn.Module()
    root.dense = nn.Parameter(torch.empty(1000, dtype=torch.bfloat16, device="meta"))
    for number in range(2):
        for name in "ab":
            param = nn.Parameter(torch.empty(20, 20, dtype=torch.bfloat16, device="meta"))
            set_expert_tag(param, ExpertTag("ep_size_2", "moe", number, 2))
            root.register_parameter(f"{name}{number}", param)
    return root


def test_numbers_by_hand() -> None:
    """Four ranks: dense partitions of 250, a partition of two whole experts' matrices."""
    groups = create_moe_param_groups(model())
    found = estimate_step_memory(groups, data_parallel_size=4)
    assert [(row.elements, row.ranks, row.partition) for row in found.groups] == [
        (1000, 4, 250),
        (1600, 2, 800),
    ]
    assert found.held == 2 * (1000 + 800)  # the dense parameter as a whole
    assert [row.held for row in found.groups] == [2000, 1600]
    # The last group: its two gradients are flattened and upcast while all are held.
    assert found.transient == (2 + 4) * 800
    assert (found.step_peak, found.phase, found.group) == (
        8400,
        "flatten and upcast",
        "ep_size_2_moe",
    )
    assert found.resident == {
        "weights": 2 * (1000 + 1600),
        "master weights": 4 * (250 + 800),
        "optimizer state": 8 * (250 + 800),
    }
    assert found.rank_peaks == [8400] * 4
    assert found.least == found.step_peak
    assert found.host == {}
    assert "8.20 KiB" in str(found)
    assert "ZeRO-2, foreach, bf16 gradients" in str(found)


@pytest.mark.parametrize(
    ("step", "held", "peak"),
    [
        (StepConfig(compact_gradients=True), 2 * 1050, 2 * 0 + 8 * 800),
        (StepConfig(grad_accum_dtype="fp32"), 4 * 1050, 4 * 1050 + 8 * 400),  # the norm
        (StepConfig(bf16_optimizer=True), 2 * 2600, 2 * 2600 + 4 * 800),
        (StepConfig(bf16_optimizer=True, immediate_grad_update=True), 0, 4 * 800),
        (StepConfig(optimizer="CPUAdam"), 0, 0),
    ],
    ids=str,
)
def test_other_ways_to_step(step: StepConfig, held: int, peak: int) -> None:
    found = estimate_step_memory(create_moe_param_groups(model()), step=step, data_parallel_size=4)
    assert (found.held, found.step_peak) == (held, peak)


def test_bf16_optimizer_keeps_fp32_gradients() -> None:
    groups = create_moe_param_groups(model())
    step = StepConfig(zero_stage=1, grad_accum_dtype="fp32")
    assert step.uses_bf16_optimizer
    found = estimate_step_memory(groups, step=step, data_parallel_size=4)
    assert found.resident["fp32 gradients"] == 4 * 2600
    assert found.step.label == "BF16_Optimizer, foreach"


def test_offloaded_optimizer_is_on_the_host() -> None:
    groups = create_moe_param_groups(model())
    step = StepConfig(optimizer="CPUAdam")
    found = estimate_step_memory(groups, step=step, data_parallel_size=4)
    assert found.host["optimizer state"] == 8 * 1050
    assert "optimizer state" not in found.resident
    assert "on the host" in str(found)


def test_optimizers_and_frozen_parameters() -> None:
    root = model()
    root.get_parameter("dense").requires_grad_(False)
    groups = create_moe_param_groups(root)
    optimizer = torch.optim.AdamW(groups)
    assert estimate_step_memory(optimizer, data_parallel_size=2) == estimate_step_memory(
        groups, data_parallel_size=2
    )
    plain = [{"params": [*root.parameters()], "moe": True, "name": "ep_size_2"}]
    with pytest.raises(InvalidArgumentError, match="no group dict"):
        estimate_step_memory(list(root.parameters()), data_parallel_size=2)
    assert estimate_step_memory(plain, data_parallel_size=2).groups[0].elements == 1600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 3}, "zero_stage=3 is unknown: use one of 1, 2"),
        ({"optimizer": "sgd"}, "optimizer='sgd' must be"),
        ({"grad_accum_dtype": "fp16"}, "grad_accum_dtype='fp16' must be"),
        ({"compact_gradients": True, "bf16_optimizer": True}, "compact_gradients=True is for"),
        ({"compact_gradients": True, "optimizer": "CPUAdam"}, "compact_gradients=True is for"),
        ({"bf16_optimizer": True, "optimizer": "CPUAdam"}, "needs ZeRO-1 or ZeRO-2"),
    ],
)
def test_step_configs_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        StepConfig(**options)


BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"zero_optimization": {"stage": 2}}, StepConfig()),
        (
            {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "fp32"}},
            StepConfig(grad_accum_dtype="fp32"),
        ),
        (
            {
                "zero_optimization": {"stage": 1},
                "data_types": {"grad_accum_dtype": "fp32"},
                "bf16": {"enabled": True, "immediate_grad_update": True},
            },
            StepConfig(1, grad_accum_dtype="fp32", immediate_grad_update=True),
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            StepConfig(optimizer="CPUAdam"),
        ),
    ],
)
def test_read_off_a_deepspeed_config(config: dict[str, Any], expected: StepConfig) -> None:
    assert StepConfig.from_deepspeed(BF16 | config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, '"bf16"'),
        ({"zero_optimization": {"stage": 3}} | BF16, "zero_stage=3"),
        (BF16, "zero_stage=0"),
    ],
)
def test_deepspeed_configs_whose_cost_is_not_known(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        StepConfig.from_deepspeed(config)


@pytest.mark.parametrize(
    ("options", "kind"),
    [({}, "for-loop"), ({"foreach": True}, "foreach"), ({"fused": True}, "fused")],
)
def test_kind_of_an_optimizer(options: dict[str, Any], kind: str) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], **options)
    config = BF16 | {"zero_optimization": {"stage": 1}}
    assert StepConfig.from_deepspeed(config, optimizer).optimizer == kind
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    with pytest.raises(InvalidArgumentError, match="SGD is not known"):
        StepConfig.from_deepspeed(config, sgd)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("1.5 MB", 1_500_000), ("10", 10), ("3kib", 3072), (7, 7), (2.5, 2)],
)
def test_sizes_are_read(text: Any, size: int) -> None:
    assert parse_bytes(text, "budget") == size


@pytest.mark.parametrize("text", ["", "GiB", "2 XB", "-1", 0, -3, True, float("nan"), "1e3"])
def test_no_sizes(text: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"budget=.*is not a size"):
        parse_bytes(text, "budget")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (2 << 30, "2.00 GiB"), (3 << 50, "3,072 TiB")],
)
def test_sizes_are_shown(size: int, text: str) -> None:
    assert show_bytes(size) == text


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
def test_whole_experts_are_shared_out_over_tensor_ranks_too(tp_size: int, ep_size: int) -> None:
    """On the ranks that :class:`Topology` says, which is tested against DeepSpeed's groups."""
    topology = Topology(world_size=8, tp_size=tp_size, ep_size=ep_size)
    world = topology.data_parallel_size
    dense = on_ranks((640,), None, world, tensor_ranks=tp_size)
    experts = on_ranks((640,), f"ep_size_{ep_size}", world, tensor_ranks=tp_size)
    assert dense.ranks == world
    assert experts.ranks == topology.expert_data_parallel_size
    for rank in range(8):
        assert dense.partition_of[rank] == topology.data_rank(rank)
        sharing = topology.group_of("expert_data", rank)
        assert experts.partition_of[rank] == sharing.index(rank)


def test_tensor_ranks_make_smaller_partitions_of_whole_experts_alone() -> None:
    groups = create_moe_param_groups(model())
    shared = estimate_step_memory(groups, data_parallel_size=2, step=StepConfig(tp_size=2))
    assert [(row.ranks, row.partition) for row in shared.groups] == [(2, 500), (2, 800)]
    assert len(shared.rank_peaks) == 4
    cut = StepConfig(tp_size=2, expert_tensor_parallel=True)
    found = estimate_step_memory(groups, data_parallel_size=2, step=cut)
    assert [(row.ranks, row.partition) for row in found.groups] == [(2, 500), (1, 1600)]
    with pytest.raises(InvalidArgumentError, match="tp_size=0 must be an integer of 1 or more"):
        StepConfig(tp_size=0)
