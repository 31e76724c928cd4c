"""Training through Lightning is training with DeepSpeed; its monitors log our groups.

Lightning's DeepSpeedStrategy refuses a CPU in ``setup_environment``, and nowhere else as long as
its devices have indices. Here that check alone is lifted; all the rest of it runs.
"""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from moe_groups import GroupMetrics, MoE, create_moe_param_groups, protect_checkpoints, verify
from moe_groups._deepspeed.engines import stepped_groups
from moe_groups.checkpoints.manifest import read_manifest
from moe_groups.errors import CheckpointMismatchError
from moe_groups.integrations.lightning import GroupLearningRateMonitor, MoEMetricsCallback
from tests.distributed.test_demo import run_example
from tests.support.models import TinyMoE
from tests.support.old_deepspeed import known_before
from tests.support.ranks import run_on_ranks
from tests.support.training import (
    batches,
    config,
    initialize,
    largest_difference,
    make_groups,
    train,
    weights,
)

LAYERS = [f"model.blocks.{layer}.moe" for layer in (0, 1)]


class OnCPU(DeepSpeedStrategy):
    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()


class Kept(Logger):
    """Keeps what it is given."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(metrics)


class Module(pl.LightningModule):
    def __init__(self, split: str = "expert", regroup: Any = None) -> None:
        super().__init__()
        self.model = TinyMoE(MoE, ep_size=2)
        self.split, self.regroup = split, regroup
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.model(x, y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self(*batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return scheduled(self)

    def on_fit_start(self) -> None:
        if self.regroup:
            protect_checkpoints(self.trainer.strategy.model, regroup=self.regroup)

    def on_train_start(self) -> None:
        if self.split != "stock":
            verify(self.trainer.strategy.model)


def scheduled(module: Module) -> Any:
    """An optimizer over the module's groups, expert 1 with its own rate, and a scheduler."""
    groups = make_groups(module, module.split, 1000 if module.split == "stock" else None)
    for group in groups:
        if group.get("expert_number") == 1:
            group["lr"] = 1e-3
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    halve = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halve, "interval": "step"}}


def trainer(
    epochs: int,
    *callbacks: pl.Callback,
    strategy: Any = OnCPU,
    wrapper: str = "zero2",
    **changes: Any,
) -> pl.Trainer:
    cfg = config(wrapper, **changes)
    del cfg["gradient_accumulation_steps"]  # Lightning's own argument
    devices = [torch.device("cpu", index) for index in range(2)]
    environment = TorchElasticEnvironment()
    return pl.Trainer(
        devices=2,
        strategy=strategy(config=cfg, parallel_devices=devices, cluster_environment=environment),
        precision="bf16-true",
        max_epochs=epochs,
        log_every_n_steps=1,
        logger=Kept(),
        callbacks=list(callbacks),
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def fit(runner: pl.Trainer, module: Module, first: int = 0, **options: Any) -> list[float]:
    """Losses of one epoch of two steps."""
    data: Any = list(batches(2, first))
    runner.fit(module, torch.utils.data.DataLoader(data, batch_size=None), **options)
    return module.losses


def compare_with_deepspeed(wrapper: str, folder: str) -> dict[str, Any]:
    plain_module = Module()
    made = scheduled(plain_module)
    scheduler = made["lr_scheduler"]["scheduler"]
    plain = initialize(plain_module, made["optimizer"], config(wrapper), lr_scheduler=scheduler)
    expected = train(plain, 4)["loss"]
    runner = trainer(1, wrapper=wrapper)
    losses = fit(runner, Module())
    runner.save_checkpoint(folder)
    runner = trainer(2, wrapper=wrapper)
    losses += fit(runner, Module(), first=2, ckpt_path=folder)
    equal = largest_difference(weights(runner.strategy.model), weights(plain)) == 0
    with pytest.raises(CheckpointMismatchError):
        fit(trainer(2, wrapper=wrapper), Module("module"), first=2, ckpt_path=folder)
    return {"losses": losses, "expected": expected, "equal": equal}


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_training_and_resuming_equal_deepspeed(wrapper: str, tmp_path: Path) -> None:
    with known_before("0.16.9", "BF16_Optimizer has no zero_grad, which Lightning calls"):
        found = run_on_ranks(2, compare_with_deepspeed, wrapper, str(tmp_path / "saved"))
    for run in found:
        assert run["losses"] == run["expected"]
        assert run["equal"]
    assert read_manifest(tmp_path / "saved" / "checkpoint" / "moe_groups.json").layout.origins


def regroup(folder: str) -> list[list[float]]:
    """Without clipping, which divides by a norm whose sum is ordered by groups."""
    runner = trainer(1, gradient_clipping=0.0)
    fit(runner, Module("module"))
    runner.save_checkpoint(folder)
    return [
        fit(trainer(2, gradient_clipping=0.0), Module(split, "auto"), first=2, ckpt_path=folder)
        for split in ("module", "parallel_group")
    ]


@pytest.mark.numeric
def test_a_checkpoint_of_other_groups_is_converted(tmp_path: Path) -> None:
    for same, converted in run_on_ranks(2, regroup, str(tmp_path / "saved")):
        assert converted == same
        assert len(converted) == 2


class Routed(Module):
    """The rates of some groups differ, and a scheduler holds one value for each group."""

    def __init__(self, split: str, *overrides: Any, regroup: Any = None) -> None:
        super().__init__(split, regroup)
        self.overrides = list(overrides)

    def configure_optimizers(self) -> Any:
        made = create_moe_param_groups(self, split_by=self.split, overrides=self.overrides)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(made, lr=1e-3)
        halve = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halve, "interval": "step"}}

    def on_train_end(self) -> None:
        names = {id(param): name for name, param in self.named_parameters()}
        stepped = stepped_groups(self.trainer.strategy.model)
        self.rates = {names[id(p)]: group["lr"] for group, params in stepped for p in params}


def rates_of_schedules(folder: str) -> list[Any]:
    router: Any = ("*.gate.*", {"lr": 1e-5})
    embed: Any = ("model.inp*", {})
    runner, first = trainer(1), Routed("module", router)
    fit(runner, first)
    runner.save_checkpoint(folder)
    fit(trainer(2), whole := Routed("module", router))
    found = [whole.rates]
    # As many groups as before, and fewer.
    for overrides in ((embed, router), (router,)):
        resumed = Routed("parallel_group", *overrides, regroup="auto")
        fit(trainer(2), resumed, first=2, ckpt_path=folder)
        found.append(resumed.rates)
    return found


def test_a_schedule_of_other_groups_is_converted(tmp_path: Path) -> None:
    for whole, *converted in run_on_ranks(2, rates_of_schedules, str(tmp_path / "saved")):
        assert len(set(whole.values())) == 2
        assert converted == [whole, whole]


def log_rates(by: Any) -> tuple[set[str], list[dict[str, float]]]:
    runner = trainer(1, LearningRateMonitor("step"), GroupLearningRateMonitor(by))
    fit(runner, Module())
    assert isinstance(runner.logger, Kept)
    kept = [one for one in runner.logger.metrics if any(name.startswith("lr") for name in one)]
    theirs = {name for one in kept for name in one if name.startswith("lr-")}
    return theirs, [one for one in kept if not any(name in theirs for name in one)]


def test_monitors() -> None:
    groups = ["dense", *(f"ep_size_2_{layer}.expert.{n}" for layer in LAYERS for n in (0, 1))]
    (theirs, ours), _ = run_on_ranks(2, log_rates, "layer")
    assert theirs == {f"lr-AdamW/{name}" for name in groups}
    rates = {"lr/dense": 1e-2}
    rates |= {f"lr/{layer}": 1e-2 for layer in LAYERS}
    rates |= {f"lr/ep_size_2_{layer}.expert.1": 1e-3 for layer in LAYERS}
    assert ours == [rates, {name: rate / 2 for name, rate in rates.items()}]
    (_, ours), _ = run_on_ranks(2, log_rates, "expert")
    assert set(ours[0]) == {f"lr/{name.removeprefix('ep_size_2_')}" for name in groups}


class ByHand(pl.Callback):
    """The same norms, without the callback."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.metrics = GroupMetrics(trainer.strategy.model, interval=1)
        self.expected: list[dict[str, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        report = self.metrics.step()
        if report is not None:
            layers = {name: layer.total for name, layer in report.layers.items()}
            found = {f"moe/{name}/grad_norm": one.grad_norm for name, one in layers.items()}
            found["moe/lr"] = sum(one.lr for one in layers.values()) / len(layers)
            self.expected.append(found)


class Logs(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def log_metrics(folder: str, wrapper: str, accumulate: int) -> list[dict[str, float]]:
    runner = trainer(1, MoEMetricsCallback(per_layer=True), hand := ByHand(), wrapper=wrapper)
    runner.loggers = [runner.logger, CSVLogger(folder, version=0)]
    runner.accumulate_grad_batches = accumulate
    data: Any = list(batches(2 * accumulate, 0))
    runner.fit(Logs(), torch.utils.data.DataLoader(data, batch_size=None))
    kept: Any = runner.loggers[0]
    written = [one for one in kept.metrics if "moe/lr" in one]
    assert len(written) in (0, 2)  # of rank 0
    for one, wanted in zip(written, hand.expected, strict=bool(written)):
        assert one["moe/lr"] == pytest.approx(wanted.pop("moe/lr"))
        assert wanted.items() <= one.items()
        assert len(one) == 9 + 2 * 9
    return written


@pytest.mark.parametrize(("wrapper", "accumulate"), [("zero2", 2), ("bf16", 1)])
def test_metrics_of_layers(wrapper: str, accumulate: int, tmp_path: Path) -> None:
    with known_before("0.16.9", "BF16_Optimizer has no zero_grad, which Lightning calls"):
        logged, _ = run_on_ranks(2, log_metrics, str(tmp_path), wrapper, accumulate)
    with (tmp_path / "lightning_logs/version_0/metrics.csv").open() as file:
        table = [*csv.DictReader(file)]
    rows = [row for row in table if row["moe/lr"]]
    losses = [row["step"] for row in table if row["loss"]]
    assert [row["step"] for row in rows] == ["0", "1"] == sorted(set(losses))
    for row, values in zip(rows, logged, strict=True):
        assert {name: float(row[name]) for name in values} == values


def what_is_refused() -> list[str]:
    with pytest.raises(RuntimeError) as on_cpu:
        fit(trainer(1, strategy=DeepSpeedStrategy), Module())
    with pytest.raises(MisconfigurationException) as names:
        fit(trainer(1, LearningRateMonitor("step")), Module("stock"))
    return [str(on_cpu.value), str(names.value)]


def test_what_lightning_refuses() -> None:
    for on_cpu, names in run_on_ranks(2, what_is_refused):
        assert "only supported on CUDA GPUs" in on_cpu  # DeepSpeedStrategy.setup_environment
        assert "identical `name` values" in names  # DeepSpeed's split; its issue 4448


@pytest.mark.long
def test_example() -> None:
    printed = run_example("lightning_moe.py")
    assert "lr/ep_size_2_moe.expert.0.override.0" in printed
