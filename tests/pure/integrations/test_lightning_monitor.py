"""Curves of learning rates, logged by Lightning's own Trainer without DeepSpeed."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from moe_groups import ExpertTag, create_moe_param_groups, is_norm_or_bias, set_expert_tag
from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.muon import split_for_muon
from moe_groups.integrations.lightning import GroupLearningRateMonitor
from tests.distributed.integrations.test_lightning import Kept

Groups = list[dict[str, Any]]


class Module(pl.LightningModule):
    """A dense layer and a layer with three experts; ``changes`` are made after each step."""

    def __init__(self, group: Callable[[Any], Groups], changes: list[dict[str, float]]) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2)
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        for number, expert in enumerate(self.experts):
            for param in expert.parameters():
                set_expert_tag(param, ExpertTag("ep_size_1", "moe", number, 3))
        self.group, self.changes = group, changes

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.dense(batch).sum()
        for expert in self.experts:
            loss = loss + expert(batch).sum()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.group(self), lr=1.0)

    def on_train_batch_end(self, *args: Any) -> None:
        groups = self.trainer.optimizers[0].param_groups
        changed = self.changes.pop(0) if self.changes else {}
        for group in groups:
            group["lr"] = changed.get(group["name"], group["lr"])


def logged(
    group: Callable[[Any], Groups], *changes: dict[str, float], by: Any = "layer"
) -> list[dict[str, float]]:
    logger = Kept()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=len(changes) + 1,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[GroupLearningRateMonitor(by)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    data: Any = torch.ones(8, 2)
    trainer.fit(Module(group, list(changes)), torch.utils.data.DataLoader(data))
    return [one for one in logger.metrics if any(name.startswith("lr/") for name in one)]


def by_expert(model: nn.Module, **options: Any) -> Groups:
    return create_moe_param_groups(model, split_by="expert", **options)


def test_equal_rates_are_one_curve() -> None:
    def many(model: nn.Module) -> Groups:
        return by_expert(model, max_group_size=2, weight_decay=1.0, no_decay=is_norm_or_bias)

    assert logged(many) == [{"lr/dense": 1.0, "lr/moe": 1.0}]
    experts = {f"lr/moe.expert.{number}": 1.0 for number in range(3)}
    assert logged(many, by="expert") == [{"lr/dense": 1.0, **experts}]


def test_a_rate_of_its_own_is_a_curve_that_stays() -> None:
    second = "ep_size_1_moe.expert.1"
    rates = logged(by_expert, {second: 0.5}, {second: 1.0, "dense": 2.0})
    one = {"lr/dense": 1.0, "lr/moe": 1.0}
    assert rates == [
        one,
        one | {f"lr/{second}": 0.5},
        {"lr/dense": 2.0, "lr/moe": 1.0, f"lr/{second}": 1.0},
    ]


def test_a_curve_keeps_its_name() -> None:
    def overridden(model: nn.Module) -> Groups:
        rules = [("dense.bias", {"lr": 3.0}), ("moe.expert.[01]", {"lr": 3.0})]
        return by_expert(model, overrides=rules)

    first = "ep_size_1_moe.expert.0.override.1"
    rates = {"lr/dense": 1.0, "lr/dense.override.0": 3.0, "lr/moe": 1.0, f"lr/{first}": 3.0}
    assert logged(overridden, {first: 4.0})[1] == rates | {
        f"lr/{first}": 4.0,
        "lr/ep_size_1_moe.expert.1.override.1": 3.0,
    }


def test_halves_of_muon() -> None:
    def halves(model: nn.Module) -> Groups:
        return by_expert(split_for_muon(model, muon={"lr": 0.02}, adam={"lr": 0.1}))  # type: ignore[arg-type]

    assert logged(halves) == [
        {"lr/muon": 0.02, "lr/adam": 0.1, "lr/moe.muon": 0.02, "lr/moe.adam": 0.1}
    ]


def test_bad_argument() -> None:
    with pytest.raises(InvalidArgumentError, match="'module'"):
        GroupLearningRateMonitor("module")  # type: ignore[arg-type]
