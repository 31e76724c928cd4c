"""MoEMetricsCallback in Hugging Face's Trainer: every reporter gets the values, once."""

import contextlib
import io
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import integration_utils

from moe_groups import GroupMetrics, LossTracker
from moe_groups._deepspeed.engines import known_engines
from moe_groups.errors import InvalidArgumentError
from moe_groups.integrations.hf_metrics import MoEMetricsCallback
from moe_groups.integrations.moe_values import predicted_step_peak
from tests.support.hf_runs import BLOCKS, config, trainer
from tests.support.ranks import run_on_ranks
from tests.support.training import largest_difference, weights

NORMS = ("lr", "grad_norm", "param_norm", "update_ratio")
LOADS = ("imbalance", "dropped", "dead_experts", "aux_loss")
WITHOUT_LOSS = ("imbalance", "dead_experts")
DEFAULT = {f"moe/{name}" for name in (*NORMS, *LOADS, "predicted_step_gib")}


class Reporter(TrainerCallback):
    """Stands in ``report_to``, where Trainer's own reporters do."""

    got: list[tuple[int, dict[str, float]]]

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        Reporter.got = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        self.got.append((state.global_step, dict(logs)))


class ByHand(TrainerCallback):
    """The same reports, without the callback."""

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        (engine,) = [one for one in known_engines() if one.module is model]
        self.metrics = GroupMetrics(engine, interval=2)
        self.tracker = LossTracker(engine, interval=2)
        self.expected: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        report = self.metrics.step()
        if report is None:
            return
        layers = [layer.total for layer in report.layers.values()]
        found: dict[str, float] = {
            "lr": layers[0].lr,
            "grad_norm": math.hypot(*(layer.grad_norm for layer in layers)),
        }
        for label, layer in report.layers.items():
            found |= {f"{label}/{metric}": getattr(layer.total, metric) for metric in NORMS}
            for number, one in enumerate(layer.experts):
                found |= {f"{label}/expert_{number}/{m}": getattr(one, m) for m in NORMS}
        balances = self.tracker.balance()
        found["imbalance"] = max(one.imbalance for one in balances.values())
        for label, balance in balances.items():
            loads = (*LOADS[:-1], "entropy")
            found |= {f"{label}/{load}": getattr(balance, load) for load in loads}
            found[f"{label}/aux_loss"] = balance.loss
            found |= {f"{label}/expert_{n}/share": share for n, share in enumerate(balance.shares)}
        self.expected[state.global_step] = {f"moe/{name}": v for name, v in found.items()}


def moe(logs: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in logs.items() if name.startswith("moe/")}


def run_with_callback(folder: Path, wrapper: str, changes: dict[str, Any], **made: Any) -> None:
    integration_utils.INTEGRATION_TO_CALLBACK["kept"] = Reporter
    hand, printed = ByHand(), io.StringIO()
    own = MoEMetricsCallback(per_layer=True, per_expert=True, **made)
    changes = {"report_to": "kept", "save_strategy": "no", "disable_tqdm": False} | changes
    run = trainer(folder, config(wrapper), callbacks=[own, hand], changes=changes)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        run.train()
    del integration_utils.INTEGRATION_TO_CALLBACK["kept"]
    assert list(hand.expected) == [2, 4]
    reported = {step: moe(logs) for step, logs in Reporter.got if moe(logs)}
    assert sum(bool(moe(logs)) for _, logs in Reporter.got) == len(reported) == 2
    predicted = predicted_step_peak(run.deepspeed)
    for step, wanted in hand.expected.items():
        values = reported[step]
        assert wanted.items() <= values.items()
        assert values["moe/predicted_step_gib"] * 2**30 == predicted > 0
        assert {name for name in values if name.count("/") == 1} == DEFAULT
        assert len(values) == len(DEFAULT) + 2 * (9 + 4 * 5)
    steps = {step for step, logs in Reporter.got if "loss" in logs}
    assert {2, 4} <= steps
    history = {entry["step"]: moe(entry) for entry in run.state.log_history if moe(entry)}
    assert history == reported
    lines = [line for line in printed.getvalue().splitlines() if "moe/lr" in line]
    assert len(lines) == (2 if torch.distributed.get_rank() == 0 else 0)
    gates = [one for name, one in run.model.named_modules() if name.endswith(".gate")]
    assert [len(gate._forward_hooks) for gate in gates] == [1, 1]  # those by hand


@pytest.mark.parametrize(
    ("wrapper", "changes", "made"),
    [
        ("zero2", {"logging_steps": 2, "gradient_accumulation_steps": 2}, {}),
        ("bf16", {"logging_steps": 3}, {"interval": 2}),
        ("zero1", {}, {"interval": 2}),
    ],
)
def test_values_reach_every_reporter_once(
    wrapper: str, changes: dict[str, Any], made: dict[str, Any], tmp_path: Path
) -> None:
    run_on_ranks(2, run_with_callback, tmp_path, wrapper, changes, **made)


def train_with_and_without(folder: Path) -> tuple[float, set[str]]:
    found = []
    for callbacks in ([], [MoEMetricsCallback(interval=1)]):
        run = trainer(folder, config("zero2"), callbacks=callbacks)
        run.train()
        found.append(weights(run.deepspeed))
    return largest_difference(*found), set(moe(run.state.log_history[0]))


def test_training_stays_the_same_and_names_are_few(tmp_path: Path) -> None:
    for difference, names in run_on_ranks(2, train_with_and_without, tmp_path):
        assert difference == 0.0
        assert names == DEFAULT
        assert len(names) < 10


# ---- AutoEP, and what there is not -----------------------------------------------------


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def autoep(folder: Path, stage: int) -> tuple[list[int], set[str], list[str]]:
    """Steps with values, their names, and warnings; DeepSpeed makes the groups itself."""
    from moe_groups.integrations.autoep import support_new_transformers
    from tests.support.autoep_models import autoep_config, make_model

    support_new_transformers()
    cfg = autoep_config("mixtral", f"zero{stage}") | {"optimizer": BLOCKS["optimizer"]}
    cfg |= {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    options: dict[str, Any] = {"callbacks": [MoEMetricsCallback(interval=2)], "data": Tokens()}
    model = make_model("mixtral")
    changes = {"save_strategy": "no"}
    run = trainer(folder, cfg, model, Trainer, changes=changes, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    texts = [str(one.message) for one in caught if "MoEMetricsCallback" in str(one.message)]
    logs = [entry for entry in run.state.log_history if moe(entry)]
    return [entry["step"] for entry in logs], {name for one in logs for name in moe(one)}, texts


@pytest.mark.parametrize("stage", [2, 3])
def test_autoep(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed.module_inject.auto_ep_layer", reason="DeepSpeed before 0.19.2")
    pytest.importorskip("transformers.utils.output_capturing", reason="needs transformers 5")
    first, other = run_on_ranks(2, autoep, tmp_path, stage, timeout=300)
    steps, names, warned = first
    assert other == (steps, names, [])
    assert steps == [2, 4]
    if stage == 3:
        assert "no norms" not in warned[0]
        assert "no predicted memory: " in warned[0]
        assert names == {f"moe/{name}" for name in (*NORMS, *WITHOUT_LOSS)}
    else:
        assert not warned
        assert names == {f"moe/{name}" for name in (*NORMS, *WITHOUT_LOSS, "predicted_step_gib")}


def test_without_deepspeed() -> None:
    callback = MoEMetricsCallback()
    with pytest.warns(UserWarning, match="no DeepSpeed engine steps the model"):
        callback.on_train_begin(None, TrainerState(), None, optimizer=None)
    assert callback.take() == {}


def test_an_interval_below_1_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="interval=0 must be"):
        MoEMetricsCallback(interval=0)
