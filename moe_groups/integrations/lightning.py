"""Learning rates and metrics of MoE layers in Lightning's loggers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moe_groups._common.arguments import checked, need
from moe_groups._common.warn import warn
from moe_groups._deepspeed.engines import is_engine
from moe_groups.integrations.moe_values import LogsMoEValues, MoEValues

need("lightning", "lightning", "curves in Lightning's loggers")

import lightning.pytorch as pl  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

_VARIANT = re.compile(r"(\.no_decay)?(\.override\.\d+)*(\.tile\.\d+)?$")


class GroupLearningRateMonitor(Callback):
    """Logs the learning rates of param groups, equal rates as one curve.

    Lightning's ``LearningRateMonitor`` accepts our groups, and logs a curve for each of them.
    Here each MoE layer (or expert) and each dense group of the caller is one curve,
    ``lr/<layer>``, for all its groups by cap, decay rule or expert. Groups with another rate than
    the rest (an override, a change in the middle of the run) get their own curve,
    ``lr/<name of the first of them>``, and keep it. Logs to all loggers, in every
    ``log_every_n_steps``-th step of the trainer.

    Args:
        by: "layer", or "expert": a curve for each expert of a layer too, where the groups are
            split by expert. Rank 0 logs, so experts have their local numbers on it.

    Attributes:
        curves: name of each curve to the indices of its param groups.

    Raises:
        InvalidArgumentError: no such ``by``.

    Example:
        >>> trainer = Trainer(callbacks=[GroupLearningRateMonitor()])     # doctest: +SKIP
    """

    @checked
    def __init__(self, by: Literal["layer", "expert"] = "layer") -> None:
        self.by = by
        self.curves: dict[str, list[int]] = {}
        self._logged = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.curves = {}
        for index, group in enumerate(_groups_of(trainer)):
            self.curves.setdefault(self._place(group, index), []).append(index)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps
        if not every or (step + 1) % every or step == self._logged:  # as LearningRateMonitor
            return
        self._logged = step
        groups = _groups_of(trainer)
        self._set_apart(groups)
        rates = {f"lr/{name}": groups[first]["lr"] for name, (first, *_) in self.curves.items()}
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=step)

    def _place(self, group: Mapping[str, Any], index: int) -> str:
        """The layer, or expert, or group of the caller that ``group`` is a part of."""
        if not group.get("moe"):
            return _VARIANT.sub("", _name(group, index))
        place = str(group.get("expert_group_name") or "experts")
        if self.by == "expert" and group.get("expert_number") is not None:
            place += f".expert.{group['expert_number']}"
        halves = {True: ".muon", False: ".adam"}  # of split_for_muon
        return place + halves.get(group.get("use_muon"), "")  # type: ignore[arg-type]

    def _set_apart(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Cut curves whose groups no longer have one rate."""
        for name, members in list(self.curves.items()):
            by_rate: dict[float, list[int]] = {}
            for index in members:
                by_rate.setdefault(float(groups[index]["lr"]), []).append(index)
            parts = [
                ([_name(groups[index], index) for index in part], part) for part in by_rate.values()
            ]
            stays = max(parts, key=lambda part: _claim(name, part[0]))
            self.curves |= {(name if part is stays else part[0][0]): part[1] for part in parts}


class MoEMetricsCallback(LogsMoEValues, Callback):
    """Logs norms, loads and memory of MoE layers to all loggers, under ``DeepSpeedStrategy``.

    The names are those of :class:`moe_groups.integrations.hf_metrics.MoEMetricsCallback`: by
    default ten or fewer, over all MoE layers. The step of a report is that under which Lightning
    logs what the module logs in it: the first optimizer step is 0.

    Args:
        interval: optimizer steps between reports; None: the trainer's ``log_every_n_steps``.
        per_layer: add all values of each layer, as ``moe/<layer>/grad_norm``.
        per_expert: add norms and shares of each expert, as ``moe/<layer>/expert_5/share``.
        update_ratio: as of :class:`moe_groups.GroupMetrics`.

    Raises:
        InvalidArgumentError: an interval below 1.

    Example:
        >>> trainer = Trainer(callbacks=[MoEMetricsCallback()])           # doctest: +SKIP
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        interval = self._interval or trainer.log_every_n_steps
        engine = trainer.strategy.model
        if is_engine(engine) and interval:
            self._values = MoEValues(engine, interval, *self._options)
        elif interval and trainer.is_global_zero:
            warn(
                "MoEMetricsCallback logs nothing, because DeepSpeed does not train the module: "
                'use Trainer(strategy="deepspeed_stage_2"), or DeepSpeedStrategy.',
                UserWarning,
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if values := self._read():
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step - 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()


def _claim(curve: str, names: Sequence[str]) -> tuple[bool, bool, int]:
    """Which part of a curve stays: that of the group it is named after, or what is usual."""
    return curve in names, any(_VARIANT.sub("", name) == name for name in names), len(names)


def _name(group: Mapping[str, Any], index: int) -> str:
    return str(group.get("name") or f"group.{index}")


def _groups_of(trainer: pl.Trainer) -> list[Mapping[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
