"""What the callbacks for Trainer and Lightning log of an engine: norms, loads and memory."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import distributed

from moe_groups._common.arguments import Positive, checked
from moe_groups._common.warn import warn
from moe_groups._deepspeed.engines import Engine, engine_data_parallel_group, stepped_groups
from moe_groups.errors import InvalidArgumentError
from moe_groups.losses.report import LayerBalance, numbers_of, over_layers
from moe_groups.losses.tracker import LossTracker
from moe_groups.memory.estimate import estimate_step_memory
from moe_groups.memory.step_config import StepConfig
from moe_groups.metrics.group_metrics import GroupMetrics
from moe_groups.metrics.report import METRICS, GroupStats, MetricsReport

_GIB = 2**30
_LOADS = ("imbalance", "dropped", "dead_experts", "aux_loss")
_Part = TypeVar("_Part")


class LogsMoEValues:
    """What the callbacks for Trainer and Lightning have in common; they say what it takes."""

    @checked
    def __init__(
        self,
        *,
        interval: Positive | None = None,
        per_layer: bool = False,
        per_expert: bool = False,
        update_ratio: bool = True,
    ) -> None:
        self._interval, self._options = interval, (per_layer, per_expert, update_ratio)
        self._values: MoEValues | None = None
        self._made()

    def _made(self) -> None:
        """What one of the callbacks does beside."""

    def _read(self) -> dict[str, float]:
        return {} if self._values is None else self._values.read()

    def _close(self) -> None:
        if self._values is not None:
            self._values.close()
        self._values = None


class MoEValues:
    """Names and numbers for a logger, every ``interval`` optimizer steps; all ranks make one.

    Warns once, on rank 0, of what this engine does not have.

    Args:
        engine: from ``deepspeed.initialize``.
        interval: optimizer steps between reports.
        per_layer: add the numbers of each MoE layer.
        per_expert: add the numbers of each expert.
        update_ratio: as of :class:`GroupMetrics`.
    """

    def __init__(
        self, engine: Engine, interval: int, per_layer: bool, per_expert: bool, update_ratio: bool
    ) -> None:
        self._engine, self._interval = engine, interval
        self._per_layer, self._per_expert = per_layer, per_expert
        self._reported = engine.global_steps
        self._missing: list[str] = []
        self._norms = self._unless_refused(
            "norms", lambda: GroupMetrics(engine, interval=interval, update_ratio=update_ratio)
        )
        self._loads = self._unless_refused("loads", lambda: LossTracker(engine, interval=interval))
        self._predicted = self._unless_refused(
            "predicted memory", lambda: predicted_step_peak(engine)
        )
        if self._missing and distributed.get_rank() == 0:
            warn("\n  ".join(["MoEMetricsCallback logs", *self._missing]), UserWarning)

    def _unless_refused(self, what: str, make: Callable[[], _Part]) -> _Part | None:
        try:
            return make()
        except InvalidArgumentError as error:  # the same on all ranks
            self._missing.append(f"no {what}: {error}")
            return None

    def read(self) -> dict[str, float]:
        """The values, if the last optimizer step ended an interval; all ranks call it together."""
        step = self._engine.global_steps
        if step == self._reported or step % self._interval:
            return {}
        self._reported = step
        values: dict[str, float] = {}
        if self._norms is not None and (report := self._norms.step()):
            values |= self._values_of_norms(report)
        if self._loads is not None:
            values |= self._values_of_loads(self._loads.balance())
        if self._predicted is not None:
            values["moe/predicted_step_gib"] = self._predicted / _GIB
        if self._engine.device.type == "cuda":
            values["moe/peak_gib"] = torch.cuda.max_memory_allocated(self._engine.device) / _GIB
        return values

    def _values_of_norms(self, report: MetricsReport) -> dict[str, float]:
        found: dict[str, GroupStats | None] = {"moe": report.experts}
        for label, layer in report.layers.items():
            if self._per_layer:
                found[f"moe/{label}"] = layer.total
            if self._per_expert:
                found |= {f"moe/{label}/expert_{n}": one for n, one in enumerate(layer.experts)}
        values = {
            f"{name}/{metric}": float(getattr(stats, metric))
            for name, stats in found.items()
            if stats is not None
            for metric in METRICS
        }
        return _known(values)

    def _values_of_loads(self, layers: Mapping[str, LayerBalance]) -> dict[str, float]:
        values = {f"moe/{name}": over_layers(layers)[name] for name in _LOADS}
        for label, layer in layers.items():
            if self._per_layer:
                numbers = numbers_of(layer)
                values |= {f"moe/{label}/{name}": value for name, value in numbers.items()}
            if self._per_expert:
                shares = enumerate(layer.shares)
                values |= {f"moe/{label}/expert_{n}/share": share for n, share in shares}
        return _known(values)

    def close(self) -> None:
        """Remove the hooks from the engine and its model."""
        for part in (self._norms, self._loads):
            if part is not None:
                part.close()


def _known(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


def predicted_step_peak(engine: Any) -> int:
    """T + R of the engine's step in bytes, on the rank that needs most.

    Raises:
        InvalidArgumentError: a wrapper or an optimizer whose cost is not known.
    """
    step = StepConfig.from_engine(engine)
    groups = [{**options, "params": params} for options, params in stepped_groups(engine)]
    ranks = distributed.get_world_size(engine_data_parallel_group(engine))
    return estimate_step_memory(groups, step=step, data_parallel_size=ranks).step_peak
