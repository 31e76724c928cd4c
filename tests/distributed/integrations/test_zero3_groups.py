"""Groups under ZeRO-3, their metrics and options, with AutoEP and without, beside one process."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from transformers import Qwen3MoeForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from moe_groups import (
    GroupMetrics,
    GroupSchedule,
    create_moe_param_groups,
    describe,
    protect_checkpoints,
    set_group_options,
    tag_experts,
    verify,
)
from moe_groups.errors import CheckpointError, CheckpointMismatchError, InvalidArgumentError
from moe_groups.integrations.autoep import autoep_optimizer
from moe_groups.metrics.report import MetricsReport
from moe_groups.metrics.rows import block_of
from tests.support.autoep_models import make_model
from tests.support.autoep_runs import (
    RATES,
    batches,
    deepspeed_config,
    full_weights,
    local_difference,
    make_trainer,
    one_process,
    torch_optimizer,
)
from tests.support.hf_runs import start_accelerate
from tests.support.pairwise import Row, few_now, pairwise
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import initialize, largest_difference

pytest.importorskip("deepspeed.module_inject.auto_ep_layer", reason="AutoEP came with 0.19.2")

Key = tuple[str, int | None]
"""A layer and its expert, or a block of dense parameters and None."""
Numbers = dict[str, dict[Key, float]]
CLIP = 0.05
"""Far below the norms of these models."""

CASES = pairwise(
    {
        "kind": ["mixtral", "qwen3", "deepseek"],
        "ep_size": [0, 1, 2],
        "name": ["SGD", "AdamW"],
        "sub_group": [600, 10**9],
        "clip": [0.0, CLIP],
        "offload": [False, True],
    }
)


def start_zero3(
    kind: str,
    ep_size: int,
    name: str,
    sub_group: int,
    clip: float,
    offload: bool,
    turned: bool = False,
    **grouping: Any,
) -> Any:
    """An engine in groups by layer; with an ``ep_size`` of 0 without AutoEP.

    Args:
        turned: the last group first.
    """
    cfg = deepspeed_config("zero3", ep_size)
    cfg["zero_optimization"]["sub_group_size"] = sub_group
    if offload:
        cfg["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        cfg["zero_force_ds_cpu_optimizer"] = False
    cfg["gradient_clipping"] = clip
    model = make_model(kind)

    def make(groups: list[dict[str, Any]]) -> Any:
        return torch_optimizer(name, groups[::-1] if turned else groups)

    if ep_size:
        return initialize(model, autoep_optimizer(model, make, **grouping), cfg)
    del cfg["expert_parallel"]
    tag_experts(model, "*.experts")
    return initialize(model, make(create_moe_param_groups(model, **grouping)), cfg)


def norms(tensors: dict[str, torch.Tensor]) -> dict[Key, float]:
    """Of the parameters of a model of transformers, by block or expert."""
    squares: dict[Key, float] = {}
    for name, tensor in tensors.items():
        layer, routed, _ = name.partition(".experts.")
        parts = enumerate(tensor) if routed else [(None, tensor)]
        for number, part in parts:
            key = (layer if routed else block_of(name)), number
            squares[key] = squares.get(key, 0.0) + float(part.double().square().sum())
    return {key: square**0.5 for key, square in squares.items()}


def numbers_of_one_process(kind: str, name: str, clip: float) -> list[Numbers]:
    """Those of each step, and the norm of all gradients."""
    model = make_model(kind)
    optimizer = torch_optimizer(name, model.parameters())
    found = []
    for both in zip(batches(0), batches(1), strict=True):
        before = {key: param.detach().clone() for key, param in model.named_parameters()}
        (sum(model(**batch).loss for batch in both) / 2).backward()
        grads = {key: param.grad.clone() for key, param in model.named_parameters()}
        if clip:
            assert nn.utils.clip_grad_norm_(model.parameters(), clip) > 2 * clip
        optimizer.step()
        optimizer.zero_grad()
        after = {key: param.detach() for key, param in model.named_parameters()}
        moved = norms({key: after[key] - before[key] for key in after})
        kept = norms(after)
        found.append(
            {
                "lr": dict.fromkeys(kept, RATES[name]),
                "grad_norm": norms(grads),
                "param_norm": kept,
                "update_ratio": {key: moved[key] / kept[key] for key in kept},
            }
        )
    return found


def numbers_in(report: MetricsReport) -> Numbers:
    stats: dict[Key, Any] = {(block, None): one for block, one in report.dense.items()}
    for layer, own in report.layers.items():
        stats |= {(layer, number): one for number, one in enumerate(own.experts)}
    names = ("lr", "grad_norm", "param_norm", "update_ratio")
    return {name: {key: getattr(one, name) for key, one in stats.items()} for name in names}


def away(found: Numbers, wanted: Numbers) -> dict[str, float]:
    """The largest relative difference of each number."""
    assert {name: set(values) for name, values in found.items()} == {
        name: set(values) for name, values in wanted.items()
    }
    return {
        name: max(abs(found[name][key] / value - 1) for key, value in values.items())
        for name, values in wanted.items()
    }


def compare_metrics(row: Row) -> dict[str, float]:
    engine = start_zero3(**row)
    assert (len(engine.optimizer.fp16_groups) > 8) == (row["sub_group"] == 600)
    metrics = GroupMetrics(engine, interval=1)
    wanted = numbers_of_one_process(row["kind"], row["name"], row["clip"])
    worst = dict.fromkeys(wanted[0], 0.0)
    for batch, expected in zip(batches(distributed.get_rank()), wanted, strict=True):
        engine.backward(engine(**batch).loss)
        engine.step()
        report = metrics.step()
        assert report is not None
        whole = float(engine.get_global_grad_norm())
        assert report.total.grad_norm == pytest.approx(whole, rel=1e-5)
        assert report.total.elements == sum(p.numel() for p in make_model(row["kind"]).parameters())
        found = away(numbers_in(report), expected)
        worst = {name: max(worst[name], value) for name, value in found.items()}
    metrics.close()
    verify(engine)
    forget_process_groups()
    return worst


@pytest.mark.parametrize("row", few_now(CASES))
def test_numbers_of_each_layer_and_expert(row: Row) -> None:
    first, other = run_on_ranks(2, compare_metrics, row, timeout=60)
    assert first == other
    assert max(first.values()) <= 1e-5


def refused() -> None:
    """What ZeRO-3 sets where something else steps too (which needs compiled optimizers)."""
    engine = start_zero3("mixtral", 2, "AdamW", 600, 0.0, False)
    for name in ("zenflow", "backup_optimizer", "swap_optimizer"):
        before = vars(engine.optimizer).copy()
        setattr(engine.optimizer, name, True)
        with pytest.raises(InvalidArgumentError, match="does not work under ZeRO-3 with"):
            GroupMetrics(engine)
        vars(engine.optimizer).clear()
        vars(engine.optimizer).update(before)


def test_what_steps_beside_the_torch_optimizer_is_refused() -> None:
    run_on_ranks(2, refused, timeout=60)


FROZEN = "model.layers.1.mlp.experts.*"
OPTIONS: dict[str, dict[str, Any]] = {
    FROZEN: {"frozen": True},
    "*.self_attn.*": {"lr_multiplier": 0.25, "weight_decay": 0.5},
    "lm_head.weight": {"lr": 2e-3},
}
"""From the second step on."""
OPTION_CASES = pairwise(
    {
        "kind": ["mixtral", "qwen3", "deepseek"],
        "ep_size": [0, 1, 2],
        "name": ["SGD", "AdamW"],
        "sub_group": [600, 10**9],
        "clip": [0.0, CLIP],
        "offload": [False, True],
        "scheduled": [False, True],
    }
)


def one_process_with_options(kind: str, name: str, clip: float) -> nn.Module:
    model: nn.Module = make_model(kind)
    parts: dict[str, list[nn.Parameter]] = {}
    for path, param in model.named_parameters():
        matching = (pattern for pattern in OPTIONS if fnmatchcase(path, pattern))
        parts.setdefault(next(matching, ""), []).append(param)
    optimizer = torch_optimizer(name, [{"params": params} for params in parts.values()])
    for step, both in enumerate(zip(batches(0), batches(1), strict=True)):
        (sum(model(**batch).loss for batch in both) / 2).backward()
        for pattern, group in zip(parts, optimizer.param_groups, strict=True):
            options = OPTIONS.get(pattern, {}) if step else {}
            if options.get("frozen"):
                for param in group["params"]:
                    param.grad = None
            rate = options.get("lr", RATES[name]) * options.get("lr_multiplier", 1.0)
            group |= {"lr": rate, "weight_decay": options.get("weight_decay", 0.0)}
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def frozen_state(engine: Any) -> Iterator[torch.Tensor]:
    """Copies of the partitions and the optimizer's state of what is to be frozen."""
    optimizer = engine.optimizer
    for flat, params in zip(
        optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
    ):
        if any(fnmatchcase(engine.param_names[param], FROZEN) for param in params):
            yield flat.detach().clone()
            yield from (torch.as_tensor(kept).clone() for kept in optimizer.state[flat].values())


def train_with_options(engine: Any, scheduled: bool, folder: Path) -> None:
    """Train to the end, with a checkpoint after the second step."""
    schedule = None
    if scheduled:
        late = {
            pattern: (lambda step, options=options: options if step else {})
            for pattern, options in OPTIONS.items()
        }
        schedule = GroupSchedule(engine, list(late.items()))
    first = engine.global_steps
    data = list(batches(distributed.get_rank()))
    for step, batch in enumerate(data[first:], first):
        if step == max(first, 1):
            frozen = list(frozen_state(engine))
        if schedule:
            schedule.apply()
        elif step == 1:
            for pattern, options in OPTIONS.items():
                set_group_options(engine, pattern, **options)
        engine.backward(engine(**batch).loss)
        engine.step()
        if step == 1 and not first:
            engine.save_checkpoint(str(folder))
    assert frozen
    assert all(map(torch.equal, frozen, frozen_state(engine)))


def compare_options(row: Row, folder: Path) -> tuple[float, float]:
    """How far the weights are from one process, and from those of a resumed run."""
    scheduled = row.pop("scheduled")
    grouping: dict[str, Any] = {"overrides": [(pattern, {}) for pattern in OPTIONS]}
    found = []
    for resumed in (False, True):
        engine = start_zero3(**row, **grouping)
        if resumed:
            engine.load_checkpoint(str(folder))
            assert engine.global_steps == 2
        metrics = GroupMetrics(engine, interval=3)
        train_with_options(engine, scheduled, folder)
        report = metrics.step()
        assert report is not None
        assert report.dense["lm_head"].lr == 2e-3
        verify(engine)
        found.append(full_weights(engine))
        if not resumed:
            model = one_process_with_options(row["kind"], row["name"], row["clip"])
            if row["ep_size"]:
                difference = local_difference(engine, model)[0]
            else:
                wanted: dict[str, torch.Tensor] = dict(model.named_parameters())
                difference = largest_difference(found[0], wanted)
        forget_process_groups()
    return difference, largest_difference(*found)


@pytest.mark.parametrize("row", few_now(OPTION_CASES))
def test_options_from_the_second_step_on(row: Row, tmp_path: Path) -> None:
    for difference, resumed in run_on_ranks(2, compare_options, row, tmp_path, timeout=60):
        assert difference <= 1e-6
        assert resumed == 0


def through_trainer(folder: Path, partitioned: bool) -> tuple[list[str], float, float]:
    """Names of MoETrainer's groups without AutoEP; how far the weights are from one process.

    Also how far the saved model is from these weights.
    """
    cfg = deepspeed_config("zero3", 1, "AdamW")
    del cfg["expert_parallel"]
    model = make_model("qwen3")
    if partitioned:
        start_accelerate()
        keep = HfDeepSpeedConfig(cfg)
        model = Qwen3MoeForCausalLM.from_pretrained(folder / "source")
        assert all(hasattr(param, "ds_id") for param in model.parameters())
        del keep
    trainer = make_trainer(folder, cfg, model)
    trainer.train()
    verify(trainer.deepspeed)
    wanted: dict[str, torch.Tensor] = dict(one_process("qwen3", "AdamW")[0].named_parameters())
    names = [row.name for row in describe(trainer.deepspeed).rows]
    after = full_weights(trainer.deepspeed)
    trainer.save_model(str(folder / "saved"))
    distributed.barrier()
    forget_process_groups()  # and transformers' config, which would partition what is loaded
    saved = Qwen3MoeForCausalLM.from_pretrained(folder / "saved", dtype=torch.float32)
    own = dict(saved.named_parameters())
    return names, largest_difference(after, wanted), largest_difference(after, own)


@pytest.mark.parametrize("partitioned", [False, pytest.param(True, marks=pytest.mark.long)])
def test_trainer_groups_by_layer_without_autoep(partitioned: bool, tmp_path: Path) -> None:
    make_model("qwen3").save_pretrained(tmp_path / "source")
    layers = [f"ep_size_1_model.layers.{layer}.mlp" for layer in range(2)]
    found = run_on_ranks(2, through_trainer, tmp_path, partitioned, timeout=60)
    for names, difference, saved in found:
        assert names == ["dense", "dense.no_decay", *layers]
        assert difference <= 1e-6
        assert saved == 0


def load_into_other_groups(folder: Path, ep_size: int) -> None:
    """Groups in another order, where the experts of two layers have the same sizes."""
    engine = start_zero3("mixtral", ep_size, "AdamW", 10**9, 0.0, False)
    engine.backward(engine(**next(batches(distributed.get_rank()))).loss)
    engine.step()
    engine.save_checkpoint(str(folder))
    saved = full_weights(engine)
    forget_process_groups()
    engine = start_zero3("mixtral", ep_size, "AdamW", 10**9, 0.0, False, turned=True)
    protect_checkpoints(engine, regroup="auto")
    before = full_weights(engine)
    with pytest.raises(CheckpointMismatchError, match=r"ZeRO-3 cannot be converted.*load_autoep"):
        engine.load_checkpoint(str(folder))
    alone = {"load_optimizer_states": False}
    if ep_size:  # DeepSpeed takes the weights from the groups here
        for options in (alone, {"load_module_only": True}):
            with pytest.raises(CheckpointMismatchError):
                engine.load_checkpoint(str(folder), **options)
    else:
        with pytest.raises(CheckpointError, match=r"no weights under ZeRO-3.*optimizer_states=Fa"):
            engine.load_checkpoint(str(folder), load_module_only=True)
        assert largest_difference(full_weights(engine), before) == 0
        engine.load_checkpoint(str(folder), **alone)
        before = saved
    assert largest_difference(full_weights(engine), before) == 0
    forget_process_groups()


@pytest.mark.parametrize("ep_size", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_checkpoint_of_other_groups_is_refused(ep_size: int, tmp_path: Path) -> None:
    run_on_ranks(2, load_into_other_groups, tmp_path, ep_size, timeout=60)
