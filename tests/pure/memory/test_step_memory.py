"""estimate_step_memory and StepConfig as a user gives and gets them."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig
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
from moe_groups._deepspeed.step.step_settings import MUST_BE, READ, WITHOUT_EFFECT
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
        (
            {"zero_stage": 3},
            "zero_stage=3: the cost of ZeRO-3's step is not predicted.*sub_group_size",
        ),
        ({"optimizer": "sgd"}, "optimizer='sgd' must be"),
        ({"grad_accum_dtype": "fp16"}, "grad_accum_dtype='fp16' must be"),
        ({"compact_gradients": True, "bf16_optimizer": True}, "compact_gradients=True is for"),
        ({"compact_gradients": True, "optimizer": "CPUAdam"}, "compact_gradients=True is for"),
        ({"bf16_optimizer": True, "optimizer": "CPUAdam"}, "needs ZeRO-1 or ZeRO-2"),
        ({"compact_gradients": True, "zero_stage": 1, "grad_accum_dtype": "fp32"}, "is for ZeRO"),
        ({"compact_gradients": "False"}, "compact_gradients='False' must be True or False"),
        ({"bf16_optimizer": 1}, "bf16_optimizer=1 must be True or False"),
        ({"weight_bytes": -2}, "weight_bytes=-2 must be 2 or 4"),
        ({"weight_bytes": 4, "bf16_optimizer": True}, "weight_bytes=4 needs ZeRO-1 or ZeRO-2"),
        ({"weight_bytes": 4, "optimizer": "CPUAdam"}, "weight_bytes=4 needs ZeRO-1 or ZeRO-2"),
        ({"weight_bytes": 4, "bf16_optimizer_states": True}, "needs bf16 weights"),
        ({"grad_accum_dtype": "fp32", "bf16_optimizer_states": True}, "needs bf16 weights"),
    ],
)
def test_step_configs_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        StepConfig(**options)


BF16 = {"bf16": {"enabled": True}}
ZERO = {"zero_optimization": {"stage": 2}}


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
        ({"zero_optimization": None} | BF16, "zero_stage=0"),
        ({"zero_optimization": [2]} | BF16, "zero_optimization cannot be read by DeepSpeed"),
        ({"zero_optimization": {"stage": 2, "stag": 1}} | BF16, "zero_optimization cannot be"),
        (ZERO | {"bf16": {"enabled": "auto"}}, '"bf16"'),
        (ZERO | BF16 | {"data_types": {"grad_accum_dtype": "fp16"}}, "grad_accum_dtype='fp16'"),
        (ZERO | BF16 | {"data_types": {"grad_accum_dtype": "fp31"}}, "grad_accum_dtype cannot be"),
        (ZERO | BF16 | {"compile": 3}, "compile of the DeepSpeed config is 3"),
        ([], "must be a dict or a path"),
        ("/nowhere/ds.json", "DeepSpeed config cannot be read.*No such file"),
    ],
)
def test_deepspeed_configs_whose_cost_is_not_known(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        StepConfig.from_deepspeed(config)


def test_read_off_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InvalidArgumentError, match="nested too deeply"):
        StepConfig.from_deepspeed(path)
    path.write_text('{"zero_optimization": {"stage": 1}, # a comment\n"bf16": {"enabled": true}}')
    assert StepConfig.from_deepspeed(path) == StepConfig(zero_stage=1)
    assert StepConfig.from_deepspeed(str(path)) == StepConfig(zero_stage=1)


ON_GPU = "foreach" if torch.cuda.is_available() else "for-loop"


@pytest.mark.parametrize(
    ("options", "kind"),
    [({}, ON_GPU), ({"foreach": True}, "foreach"), ({"fused": True}, "fused")],
)
def test_kind_of_an_optimizer(options: dict[str, Any], kind: str) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], **options)
    config = BF16 | {"zero_optimization": {"stage": 1}}
    assert StepConfig.from_deepspeed(config, optimizer).optimizer == kind
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    with pytest.raises(InvalidArgumentError, match="SGD is not known"):
        StepConfig.from_deepspeed(config, sgd)


@pytest.mark.parametrize(
    ("named", "kind"),
    [
        ({"type": "AdamW", "params": {"lr": 1e-3}}, "FusedAdam"),
        ({"type": "Adam"}, "FusedAdam"),
        ({"type": "AdamW", "params": {"torch_adam": True}}, ON_GPU),
        ({"type": "AdamW", "params": {"torch_adam": True, "fused": True}}, "fused"),
    ],
)
def test_kind_of_an_optimizer_that_the_config_names(named: dict[str, Any], kind: str) -> None:
    assert StepConfig.from_deepspeed(BF16 | ZERO | {"optimizer": named}).optimizer == kind
    client = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], foreach=True)
    read = StepConfig.from_deepspeed(BF16 | ZERO | {"optimizer": named}, client)
    assert read.optimizer == "foreach"  # DeepSpeed prefers the client's


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"type": "Lamb"}, "lamb is not known"),
        ({"type": "Muon"}, "muon is not known"),
        ({"type": "OneBitAdam"}, "onebitadam is not known"),
        ({"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False}}, "adam is not"),
        ({"type": "AdamW", "params": {"torch_adam": True, "amsgrad": True}}, "amsgrad=True is not"),
        (3, "optimizer of the DeepSpeed config is 3"),
    ],
)
def test_named_optimizers_whose_cost_is_not_known(named: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        StepConfig.from_deepspeed(BF16 | ZERO | {"optimizer": named})


def test_offloaded_optimizers() -> None:
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    named: dict[str, Any] = {"optimizer": {"type": "AdamW"}}
    assert StepConfig.from_deepspeed(BF16 | zero | named).optimizer == "CPUAdam"
    client = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], foreach=True)
    with pytest.raises(InvalidArgumentError, match=r"\(foreach\) with offload_optimizer is not"):
        StepConfig.from_deepspeed(BF16 | zero, client)
    named = {"optimizer": {"type": "AdamW", "params": {"fp32_optimizer_states": False}}}
    with pytest.raises(InvalidArgumentError, match="DeepSpeedCPUAdam with offload_optimizer is"):
        StepConfig.from_deepspeed(BF16 | zero | named)
    zero = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(InvalidArgumentError, match=r"offload_optimizer.device='nvme'"):
        StepConfig.from_deepspeed(BF16 | zero)


WITHOUT_EFFECT_ON_ADAMW = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.0}


@pytest.mark.parametrize("name", [*inspect.signature(torch.optim.AdamW).parameters][1:])
@pytest.mark.parametrize("of_group", [False, True])
def test_every_argument_of_adamw_is_read_refused_or_without_effect(
    name: str, of_group: bool
) -> None:
    value = WITHOUT_EFFECT_ON_ADAMW.get(name, True)
    params = [nn.Parameter(torch.zeros(2))]
    groups = [{"params": params} | ({name: value} if of_group else {})]
    options: dict[str, Any] = {} if of_group else {name: value}
    optimizer = torch.optim.AdamW(groups, **options)
    if name in ("amsgrad", "maximize", "capturable", "differentiable"):
        with pytest.raises(InvalidArgumentError, match=f"AdamW with {name}=True is not known"):
            StepConfig.from_deepspeed(BF16 | ZERO, optimizer)
    else:
        kind = name if name in ("foreach", "fused") else ON_GPU
        assert name == kind or name in WITHOUT_EFFECT_ON_ADAMW
        assert StepConfig.from_deepspeed(BF16 | ZERO, optimizer).optimizer == kind


def test_groups_that_compute_in_different_ways_and_other_classes() -> None:
    one, two = ({"params": [nn.Parameter(torch.zeros(2))], "fused": f} for f in (True, False))
    with pytest.raises(InvalidArgumentError, match="in different ways"):
        StepConfig.from_deepspeed(BF16 | ZERO, torch.optim.AdamW([one, two], foreach=False))

    class Other(torch.optim.AdamW):
        pass

    with pytest.raises(InvalidArgumentError, match="Other is not known"):
        StepConfig.from_deepspeed(BF16 | ZERO, Other([nn.Parameter(torch.zeros(2))]))


SECTIONS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "bf16": DeepSpeedBF16Config,
}
REFUSED: dict[str, dict[str, Any]] = {
    "zero_optimization": {
        "compute_grad_norm": False,
        "contiguous_gradients": False,
        "cpu_offload_param": True,
        "enable_sanity_checks": True,
        "legacy_stage1": True,
        "offload_param": {"device": "cpu"},
        "parameter_alignment": True,
        "reduce_scatter": False,
        "round_robin_gradients": True,
        "save_muon_momentum_buffer_in_memory": True,
        "zenflow": {},
        "zero_hpz_partition_size": 2,
        "zero_quantized_gradients": True,
        "zero_quantized_nontrainable_weights": True,
        "zero_quantized_weights": True,
    },
    "offload_optimizer": {"ratio": 0.5, "super_offload": True},
    "bf16": {},
}
"""A value of each setting that is refused."""


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_of_these_sections_is_read_refused_or_without_effect(section: str) -> None:
    """Fails where DeepSpeed has a new setting: find out what it does to the step."""
    names = {
        name
        for name, field in SECTIONS[section].model_fields.items()
        if not (field.alias or name).startswith("stage3_")  # ZeRO-3's
    }
    listed = [*READ[section], *WITHOUT_EFFECT[section], *REFUSED[section]]
    assert len(set(listed)) == len(listed)
    assert names - {"cpu_offload"} == set(listed)  # which becomes offload_optimizer
    for name, value in REFUSED[section].items():
        zero = {"stage": 2, name: value}
        if section == "offload_optimizer":
            zero = {"stage": 2, "offload_optimizer": {"device": "cpu", name: value}}
        with pytest.raises(
            InvalidArgumentError, match=r"the DeepSpeed config sets|Partial offloading"
        ):
            StepConfig.from_deepspeed(BF16 | {"zero_optimization": zero})


def test_deprecated_and_unused_settings_are_read() -> None:
    zero: dict[str, Any] = {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": True}
    assert StepConfig.from_deepspeed(BF16 | {"zero_optimization": zero}).offloads
    zero = {"stage": 2, "offload_param": {"device": "none"}, "reduce_bucket_size": "auto"}
    off = {"fp16": {"enabled": False}, "amp": None, "compile": {"deepcompile": False}}
    assert StepConfig.from_deepspeed(BF16 | off | {"zero_optimization": zero}) == StepConfig()
    half = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    with pytest.raises(InvalidArgumentError, match="known for both or neither"):
        StepConfig.from_deepspeed(half | ZERO)
    half["bf16"]["bf16_optimizer_states"] = True
    assert StepConfig.from_deepspeed(half | ZERO) == StepConfig(bf16_optimizer_states=True)


NOT_THE_STEP = """activation_checkpointing aio autotuning checkpoint comet comms_logger
communication_data_type csv_monitor curriculum_learning data_efficiency dataloader_drop_last
datastates_ckpt disable_allgather disable_python_gc dump_state elasticity expert_parallel
flops_profiler gradient_accumulation_steps gradient_allreduce_op gradient_clipping
gradient_predivide_factor log_level memory_breakdown nebula pipeline prescale_gradients scheduler
seq_parallel_communication_data_type sparse_attention steps_per_print tensorboard timers
train_batch_size train_micro_batch_size_per_gpu vocabulary_size wall_clock_breakdown wandb
weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"""


class Recorder(dict[str, Any]):
    """A config that notes what DeepSpeed looks up in it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "Recorder":
        return self


def test_every_other_key_that_deepspeed_reads_is_read_refused_or_not_of_the_step() -> None:
    config = Recorder(train_batch_size=1)
    DeepSpeedConfig(config)
    read = {"zero_optimization", "bf16", "bfloat16", "data_types", "optimizer"}
    refused = {path.split(".")[0] for path in MUST_BE} - {"sequence_parallel_size"}
    assert config.seen == {*NOT_THE_STEP.split(), *read, *refused}
    for path, known in MUST_BE.items():
        value = {bool: not known[0], int: 2, dict: {"x": 1}}[type(known[0])]
        first, _, second = path.partition(".")
        with pytest.raises(InvalidArgumentError, match=f"the DeepSpeed config sets {path} to"):
            StepConfig.from_deepspeed(BF16 | ZERO | {first: {second: value} if second else value})


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
    with pytest.raises(InvalidArgumentError, match="tp_size=0 must be an integer from 1"):
        StepConfig(tp_size=0)
