"""LoRA adapters inside of experts train as expert parameters, and nothing else changes."""

import contextlib
import inspect
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from safetensors import safe_open
from torch import nn
from transformers import get_scheduler

from moe_groups import MoE, create_moe_param_groups, describe, verify
from moe_groups.checkpoints.guard.engine_layout import own_origin
from tests.support.hf_runs import (
    config,
    make_model,
    prepare_with_accelerate,
    run_accelerate,
    trainer,
)
from tests.support.models import TinyMoE
from tests.support.old_deepspeed import known_before
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import (
    config as deepspeed_config,
    initialize,
    largest_difference,
    make_groups,
    train,
    weights,
)

Groups = list[dict[str, Any]]
TARGETS = ["inp", "up", "down"]
STEPS = 4


def adapt(model: nn.Module, targets: list[str] = TARGETS, **options: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))


def by_hand(model: nn.Module) -> Groups:
    """What a user of DeepSpeed alone has to write: mark the adapters, then group them."""
    groups: dict[str, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        inside = re.search(r"blocks\.(\d)\.moe\..*experts\.(\d)\.", name)
        if inside:
            param.allreduce, param.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
        if param.requires_grad:
            own = {"moe": True, "name": "ep_size_2"} if inside else {"name": "dense"}
            groups.setdefault(inside[0] if inside else "", {"params": [], **own})
            groups[inside[0] if inside else ""]["params"].append(param)
    return list(groups.values())


def ours(model: nn.Module) -> Groups:
    return create_moe_param_groups(model, split_by="expert")


def run(groups_of: Any, layer: type[nn.Module], wrapper: str, scheduler: str) -> tuple[Any, Any]:
    """``(engine, weights before)`` of a run with a learning-rate scheduler."""
    model = adapt(TinyMoE(layer, ep_size=2))
    before = {name: param.detach().bfloat16().float() for name, param in model.named_parameters()}
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    cfg, options = deepspeed_config(wrapper), {}
    if scheduler == "torch":
        options["lr_scheduler"] = get_scheduler("linear", optimizer, 1, 2 * STEPS)
    else:
        cfg["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
        cfg["scheduler"]["params"]["warmup_max_lr"] = 1e-2
    engine = initialize(model, optimizer, cfg, **options)
    train(engine, STEPS)
    return engine, before


def train_both_ways(
    layer: type[nn.Module], wrapper: str, scheduler: str
) -> tuple[float, list[str], list[str], tuple[int, ...], dict[str, torch.Tensor]]:
    engine, before = run(ours, layer, wrapper, scheduler)
    verify(engine)
    trained = weights(engine)
    changed = [
        name for name in trained if not torch.equal(trained[name].bfloat16().float(), before[name])
    ]
    schedule = engine.lr_scheduler
    rates = getattr(schedule, "base_lrs", None) or schedule.max_lrs
    counts = len(rates), len(schedule.get_last_lr()), len(engine.optimizer.param_groups)
    names = [row.name for row in describe(engine).rows]
    experts = {name: p for name, p in trained.items() if "lora_B" in name and "experts" in name}
    forget_process_groups()
    plain, _ = run(by_hand, layer, wrapper, scheduler)
    return largest_difference(trained, weights(plain)), changed, names, counts, experts


@pytest.mark.parametrize(
    ("layer", "wrapper", "scheduler"),
    [
        (MoE, "zero1", "torch"),
        (MoE, "zero2", "DeepSpeed"),
        (MoE, "bf16", "torch"),
        (DeepSpeedMoE, "zero2", "torch"),
    ],
)
def test_adapters_of_experts_train_as_experts(
    layer: type[nn.Module], wrapper: str, scheduler: str
) -> None:
    found = run_on_ranks(2, train_both_ways, layer, wrapper, scheduler, timeout=400)
    for difference, changed, names, counts, _ in found:
        assert difference == 0.0
        assert changed
        assert all("lora_" in name for name in changed), changed
        assert {name.split(".lora_")[0].rpartition(".")[2] for name in changed} == set(TARGETS)
        assert len(set(names)) == len(names) == 5  # dense, and 2 experts in each of 2 layers
        assert counts == (5, 5, 5)  # the scheduler's rates and the engine's groups
    for name, param in found[0][-1].items():  # each rank has experts of its own
        assert not torch.equal(param, found[1][-1][name]), name


def train_with_an_empty_group() -> tuple[int, int]:
    model = TinyMoE(DeepSpeedMoE, ep_size=2)
    groups = [*make_groups(model, "stock"), {"params": [], "name": "all frozen"}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = get_scheduler("linear", optimizer, 1, STEPS)
    engine = initialize(model, optimizer, deepspeed_config("zero2"), lr_scheduler=schedule)
    strict = "strict=True" in inspect.getsource(torch.optim.lr_scheduler.LambdaLR.get_lr)
    with pytest.raises(ValueError, match="zip") if strict else contextlib.nullcontext():
        train(engine, 1)  # older releases of torch leave a group's rate as it is
    return len(schedule.base_lrs), len(engine.optimizer.param_groups)


def test_deepspeed_drops_an_empty_group_and_a_scheduler_fails() -> None:
    """Why no group may be empty: the rates that the scheduler keeps are then too many."""
    with known_before("0.18.9", "an empty group fails in another way"):
        found = run_on_ranks(2, train_with_an_empty_group)
    for rates, groups in found:
        assert rates == groups + 1


# ---- through Trainer and Accelerate ------------------------------------------------------


def resume_trainer(folder: Path) -> tuple[float, float, list[str]]:
    def start() -> Any:
        return trainer(
            folder, config("zero2"), adapt(make_model()), group_options={"split_by": "expert"}
        )

    whole = start()
    base = {n: p.detach().clone() for n, p in whole.model.named_parameters() if "lora" not in n}
    whole.train()
    wanted = weights(whole.deepspeed)
    names = [row.name for row in describe(whole.deepspeed).rows]
    origin = own_origin(whole.deepspeed)
    assert origin is not None
    assert origin.frozen_experts  # only adapters are trained
    assert all("lora_" in row.name for row in origin.rows)
    file = folder / "checkpoint-4/adapter_model.safetensors"
    with safe_open(file, "pt") as saved:
        numbers = {name.split("deepspeed_experts.")[-1][0] for name in saved.keys()}  # noqa: SIM118
    assert numbers >= set("0123")  # the adapters of all ranks
    forget_process_groups()
    run = start()
    run.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    found = weights(run.deepspeed)
    frozen = largest_difference(
        {name: p.bfloat16().float() for name, p in base.items()}, {n: found[n] for n in base}
    )
    return largest_difference(found, wanted), frozen, names


def test_trainer_resumes_with_adapters(tmp_path: Path) -> None:
    for difference, frozen, names in run_on_ranks(2, resume_trainer, tmp_path, timeout=400):
        assert difference == frozen == 0.0
        assert len(set(names)) == len(names) == 5


def accelerated(targets: list[str]) -> tuple[int, int, list[str]]:
    run = prepare_with_accelerate("zero2", (), adapt(make_model(), targets), STEPS)
    engine, schedule = run[1], run[-1].scheduler
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    run_accelerate(run, STEPS)
    verify(engine)
    changed = [n for n, p in engine.module.named_parameters() if not torch.equal(p, before[n])]
    return len(schedule.base_lrs), len(engine.optimizer.param_groups), changed


@pytest.mark.parametrize(("targets", "expected"), [(TARGETS, 5), (["inp"], 1)])
def test_accelerate_trains_adapters(targets: list[str], expected: int) -> None:
    """Also of dense layers alone, beside experts that are all frozen."""
    for rates, groups, changed in run_on_ranks(2, accelerated, targets, timeout=400):
        assert rates == groups == expected
        assert changed
        assert all("lora_" in name for name in changed)
