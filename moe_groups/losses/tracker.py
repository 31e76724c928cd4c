"""Track load-balancing losses and experts' loads of all ranks, with one collective per interval.

The last pipeline stage has no figures of the layers before it. Here every rank sums the figures of
its own layers, on its device and without synchronization; one all-reduce over the world per
interval combines them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from moe_groups._common.arguments import NotNegative, Positive, checked
from moe_groups._deepspeed.engines import InitializedEngine, send_to_monitor, stage_of
from moe_groups._deepspeed.layers import routed, routers_of
from moe_groups.errors import InvalidArgumentError

_LOSS, _DROPPED, _FORWARDS, _HEAD = 0, 1, 2, 3
"""Columns of a layer's row, in front of the tokens of each expert."""


@dataclass(frozen=True)
class LayerBalance:
    """What a layer's router did since the last report, over all ranks and micro-batches.

    Attributes:
        loss: mean of the layer's load-balancing loss over forward passes, without a coefficient.
        shares: each expert's share of all assignments; their sum is 1.
        dropped: share of all assignments that exceeded the capacity of their expert.
    """

    loss: float
    shares: tuple[float, ...]
    dropped: float

    @property
    def imbalance(self) -> float:
        """Load of the busiest expert, divided by the mean load: 1 if all loads are equal."""
        return max(self.shares) * len(self.shares)

    @property
    def dead_experts(self) -> int:
        """How many experts got no token."""
        return self.shares.count(0.0)


@dataclass(frozen=True)
class BalanceReport:
    """The report of :meth:`LossTracker.step`, the same on all ranks.

    Attributes:
        step: optimizer steps so far.
        total: mean loss that was trained on, auxiliary losses included.
        lm: the same without auxiliary losses.
        aux: the coefficient times the sum of the layers' mean losses; exact if each layer runs
            once in a micro-batch.
        layers: by label, or by module path without a label; in the order of the model.
    """

    step: int
    total: float
    lm: float
    aux: float
    layers: Mapping[str, LayerBalance]

    @checked
    def as_dict(self, per_expert: bool = False) -> dict[str, float]:
        """Names and numbers for a logger; ``per_expert`` adds each expert's share."""
        values = {"loss/total": self.total, "loss/lm": self.lm, "loss/aux": self.aux}
        for name, layer in self.layers.items():
            values |= {
                f"aux_loss/{name}": layer.loss,
                f"imbalance/{name}": layer.imbalance,
                f"dropped/{name}": layer.dropped,
            }
            if per_expert:
                shares = enumerate(layer.shares)
                values |= {f"share/{name}/expert_{number}": share for number, share in shares}
        return values


@checked
class LossTracker:
    """Collects losses and loads of all MoE layers; call :meth:`step` after each optimizer step.

    All ranks make one, and all ranks report. It finds DeepSpeed's ``MoE`` layers (and ours) and
    records them; for another router call :meth:`record` in its forward pass. It counts neither
    the repeated forward passes of activation checkpointing nor passes outside of training.

    Args:
        engine: from ``deepspeed.initialize``, of a pipeline or not.
        coefficient: of the load-balancing losses in the loss.
        interval: optimizer steps between reports.
        in_loss: does the loss that :meth:`step` gets contain the load-balancing losses (added
            up, or carried)? False if they are attached (:func:`attach_loss`).
        experts: names and numbers of experts of routers that are not DeepSpeed's.
        per_expert: send each expert's share to the monitor too.

    Raises:
        InvalidArgumentError: no layer was found, or two have one name.

    Example:
        >>> tracker = LossTracker(engine, coefficient=0.01, interval=50)     # doctest: +SKIP
        >>> report = tracker.step(engine.train_batch(batches))               # doctest: +SKIP
        >>> if report: print(report.lm, report.layers["layers.3.moe"].imbalance)  # doctest: +SKIP
    """

    def __init__(
        self,
        engine: InitializedEngine,
        *,
        coefficient: NotNegative,
        interval: Positive = 50,
        in_loss: bool = True,
        experts: Mapping[str, Positive] | None = None,
        per_expert: bool = False,
    ) -> None:
        self.engine, self.coefficient, self.interval = engine, coefficient, interval
        self.in_loss, self.per_expert = in_loss, per_expert
        found = routers_of(engine.module)
        own = [(label, count) for label, count, _ in found]
        self._experts = _of_all_ranks(own, dict(experts or {}), stage_of(engine.module))
        width = _HEAD + max(self._experts.values())
        rows = len(self._experts) + 1  # the first has the loss that is reported
        self._sums = torch.zeros(rows, width, device=engine.device)
        self._row_of = {name: row for row, name in enumerate(self._experts, 1)}
        self._reported = 0
        self._handles = [self._watch(label, gate) for label, _, gate in found]

    def _watch(self, label: str, gate: torch.nn.Module) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, outputs: Any) -> None:
            if module.training:
                self.record(label, *routed(outputs))

        return gate.register_forward_hook(hook)

    def record(
        self,
        name: str,
        loss: torch.Tensor,
        counts: torch.Tensor,
        dropped: torch.Tensor | int = 0,
    ) -> None:
        """Add the figures of one forward pass of a router.

        Args:
            name: of the layer, one of ``experts``.
            loss: its load-balancing loss, without the coefficient.
            counts: assignments to each expert, dropped ones included, of shape (E,).
            dropped: number of dropped assignments.

        Raises:
            InvalidArgumentError: there is no layer of this name, or it has another number of
                experts, or the loss is not one number.
        """
        if _recomputes() or not self.engine.module.training:
            return
        if name not in self._row_of:
            raise InvalidArgumentError(
                f"LossTracker.record: no layer {name!r} among {[*self._row_of]}: name your "
                "routers in experts={name: number of experts}."
            )
        experts = self._experts[name]
        if len(counts) != experts:
            raise InvalidArgumentError(
                f"LossTracker.record: {len(counts)} counts for the {experts} experts of {name!r}."
            )
        row = self._sums[self._row_of[name]]
        row[_LOSS] += _number(loss)
        row[_DROPPED] += dropped
        row[_FORWARDS] += 1
        row[_HEAD : _HEAD + experts] += counts

    def step(self, loss: torch.Tensor | float) -> BalanceReport | None:
        """Count a loss; at the end of an interval of optimizer steps all ranks get the report.

        Args:
            loss: of the step, as ``train_batch`` returns it, or, in calls after each
                ``engine.step()``, of one of its micro-batches.

        Raises:
            InvalidArgumentError: the loss is not one number.
        """
        self._sums[0, _LOSS] += _number(loss) if isinstance(loss, torch.Tensor) else loss
        self._sums[0, _FORWARDS] += 1
        step = self.engine.global_steps
        return None if step == self._reported or step % self.interval else self.report()

    def report(self) -> BalanceReport:
        """The report since the last one, over all ranks; all ranks call it together."""
        head, layers = self._summed()
        aux = self.coefficient * sum(layer.loss for layer in layers.values())
        given = head[_LOSS] / max(head[_FORWARDS], 1)
        lm = given - aux if self.in_loss else given
        report = BalanceReport(self.engine.global_steps, lm + aux, lm, aux, layers)
        send_to_monitor(self.engine, report, self.per_expert)
        return report

    def balance(self) -> dict[str, LayerBalance]:
        """The layers of a report alone, for where nobody calls :meth:`step`; not to the monitor.

        Since the last report or balance, over all ranks; all ranks call it together.
        """
        return self._summed()[1]

    def _summed(self) -> tuple[list[float], dict[str, LayerBalance]]:
        """The row of the loss, and the layers, over all ranks; counting begins anew."""
        self._reported = self.engine.global_steps
        distributed.all_reduce(self._sums)
        head, *rows = self._sums.tolist()
        self._sums.zero_()
        return head, {
            name: _layer(row, count)
            for (name, count), row in zip(self._experts.items(), rows, strict=True)
        }

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _layer(row: list[float], experts: int) -> LayerBalance:
    counts = row[_HEAD : _HEAD + experts]
    total = max(sum(counts), 1.0)
    shares = tuple(count / total for count in counts)
    return LayerBalance(row[_LOSS] / max(row[_FORWARDS], 1.0), shares, row[_DROPPED] / total)


def _number(loss: torch.Tensor) -> torch.Tensor:
    if loss.numel() != 1:
        raise InvalidArgumentError(
            f"LossTracker: the loss has shape {tuple(loss.shape)}: give one number, as its mean."
        )
    return loss.detach().reshape(())


def _of_all_ranks(
    found: list[tuple[str, int]], given: dict[str, int], stage: int
) -> dict[str, int]:
    """Names and experts of every stage's layers, in the order of the stages."""
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, (stage, found, given))
    known: dict[str, int] = {}
    stages: dict[str, int] = {}
    for rank, (stage, layers, routers) in enumerate(everywhere):
        names = [name for name, _ in layers] + list(routers)
        for name, count in [*layers, *routers.items()]:
            # One name on two ranks of a stage is one layer.
            other = name not in routers and stages.setdefault(name, stage) != stage
            if other or names.count(name) > 1 or known.setdefault(name, count) != count:
                raise InvalidArgumentError(
                    f"rank {rank}: two MoE layers are called {name!r}: give each an "
                    "expert_group_name of its own."
                )
    if not known:
        raise InvalidArgumentError(
            "LossTracker found no MoE layer of DeepSpeed in the model: name your routers in "
            "experts={name: number of experts}, and call record in their forward."
        )
    return known


def _recomputes() -> bool:
    """Is this forward pass a repetition by activation checkpointing, inside of a backward pass?"""
    return torch._C._current_graph_task_id() != -1
