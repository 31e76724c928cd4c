"""Track load-balancing losses and experts' loads of all ranks, with one collective per interval.

The last pipeline stage has no figures of the layers before it. Here every rank sums the figures of
its own layers, on its device and without synchronization; one all-reduce over the world per
interval combines them.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from moe_groups._common.arguments import NotNegative, Positive, checked
from moe_groups._deepspeed.engines import InitializedEngine, send_to_monitor, stage_of
from moe_groups.errors import InvalidArgumentError
from moe_groups.losses.report import BalanceReport, LayerBalance
from moe_groups.losses.routers import (
    Passes,
    Routed,
    Router,
    find_routers,
    recomputes,
    summed_entropy,
)

_FORWARDS, _TOKENS, _LOSS, _DROPPED, _ENTROPY, _HEAD = range(6)
"""Columns of a layer's row, in front of the tokens of each expert."""


@checked
class LossTracker:
    """Collects losses and loads of all MoE layers; call :meth:`step` after each optimizer step.

    All ranks make one, and all ranks report. It finds the routers of DeepSpeed's ``MoE`` layers
    (ours too), of AutoEP's layers and of the MoE blocks of ``transformers``, and records what they
    choose, under any ZeRO stage; for another router call :meth:`record` in its forward pass. It
    counts neither the repeated forward passes of activation checkpointing nor passes outside of
    training: in evaluation mode, or of the whole model without gradients.

    Args:
        engine: from ``deepspeed.initialize``, of a pipeline or not.
        coefficient: of the load-balancing losses of DeepSpeed's ``MoE`` layers in the loss.
        interval: optimizer steps between reports.
        in_loss: does the loss that :meth:`step` gets contain the load-balancing losses (added
            up, or carried)? False if they are attached (:func:`attach_loss`).
        experts: names and numbers of experts of routers that you record. Blocks that are not
            DeepSpeed's are then not looked for.
        per_expert: send each expert's share to the monitor too, and the numbers of each layer.
        per_layer: send the numbers of each layer to the monitor too.

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
        coefficient: NotNegative = 0.0,
        interval: Positive = 50,
        in_loss: bool = True,
        experts: Mapping[str, Positive] | None = None,
        per_expert: bool = False,
        per_layer: bool = False,
    ) -> None:
        self.engine, self.coefficient, self.interval = engine, coefficient, interval
        self.in_loss, self.per_expert, self.per_layer = in_loss, per_expert, per_layer
        found = find_routers(engine.module, blocks=not experts)
        own = [(router.label, _Layer(router.experts, router.has_loss)) for router in found]
        given = {name: _Layer(count, True) for name, count in (experts or {}).items()}
        self._layers = _of_all_ranks(own, given, stage_of(engine.module))
        width = _HEAD + max(layer.experts for layer in self._layers.values())
        rows = len(self._layers) + 1  # the first has the loss that is reported
        self._sums = torch.zeros(rows, width, device=engine.device)
        self._total = _Row(self._sums[0], 0)
        self._rows = {
            name: _Row(row, layer.experts)
            for row, (name, layer) in zip(self._sums[1:], self._layers.items(), strict=True)
        }
        self._reported = 0
        self._passes = Passes(engine.module)
        self._handles = [handle for router in found for handle in self._watch(router)]

    def _watch(self, router: Router) -> list[Any]:
        def chosen(module: nn.Module, inputs: Any, outputs: Any) -> None:
            if self._passes.trains(module):
                self._record(router, inputs, outputs)

        def scored(module: nn.Module, inputs: Any, logits: torch.Tensor) -> None:
            if self._passes.trains(module) and not recomputes():
                with torch.no_grad():
                    self._rows[router.label].add_entropy(logits)

        handles = [router.module.register_forward_hook(chosen)]
        if router.logits is not None:
            handles.append(router.logits.register_forward_hook(scored))
        return handles

    @torch.no_grad()
    def _record(self, router: Router, inputs: Any, outputs: Any) -> None:
        # In a repetition too: selective checkpointing counts the products of matrices.
        logits = None if router.score is None else router.score(inputs)
        if not recomputes():
            row = self._rows[router.label]
            row.add(router.read(outputs))
            if logits is not None:
                row.add_entropy(logits)

    @torch.no_grad()
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
        if recomputes() or not self._passes.trains(self.engine.module):
            return
        if name not in self._rows:
            raise InvalidArgumentError(
                f"LossTracker.record: no layer {name!r} among {[*self._rows]}: name your "
                "routers in experts={name: number of experts}."
            )
        experts = self._layers[name].experts
        if len(counts) != experts:
            raise InvalidArgumentError(
                f"LossTracker.record: {len(counts)} counts for the {experts} experts of {name!r}."
            )
        self._rows[name].add(Routed(counts, loss=_number(loss), dropped=dropped))

    def step(self, loss: torch.Tensor | float) -> BalanceReport | None:
        """Count a loss; at the end of an interval of optimizer steps all ranks get the report.

        Args:
            loss: of the step, as ``train_batch`` returns it, or, in calls after each
                ``engine.step()``, of one of its micro-batches.

        Raises:
            InvalidArgumentError: the loss is not one number.
        """
        self._total.loss += _number(loss) if isinstance(loss, torch.Tensor) else loss
        self._total.forwards += 1
        step = self.engine.global_steps
        return None if step == self._reported or step % self.interval else self.report()

    def report(self) -> BalanceReport:
        """The report since the last one, over all ranks; all ranks call it together."""
        head, layers = self._summed()
        losses = [layer.loss for layer in layers.values() if not math.isnan(layer.loss)]
        aux = self.coefficient * sum(losses)
        given = head[_LOSS] / max(head[_FORWARDS], 1)
        lm = given - aux if self.in_loss else given
        report = BalanceReport(self.engine.global_steps, lm + aux, lm, aux, layers)
        values = report.as_dict(self.per_expert, self.per_layer)
        send_to_monitor(self.engine, report.step, values)
        return report

    def balance(self) -> dict[str, LayerBalance]:
        """Only the layers of a report, for use without :meth:`step`; the monitor gets nothing.

        Since the last report or balance, over all ranks; all ranks call it together.
        """
        return self._summed()[1]

    def _summed(self) -> tuple[list[float], dict[str, LayerBalance]]:
        """The row of the loss, and the layers, over all ranks; resets all counts."""
        self._reported = self.engine.global_steps
        rows = [self._total, *self._rows.values()]
        passes = [[row.forwards, row.tokens] for row in rows]
        self._sums[:, :_LOSS] = torch.tensor(passes, dtype=self._sums.dtype)
        distributed.all_reduce(self._sums)
        head, *figures = self._sums.tolist()
        self._sums.zero_()
        for row in rows:
            row.forwards = row.tokens = 0
        return head, {
            name: _balance(row, layer)
            for (name, layer), row in zip(self._layers.items(), figures, strict=True)
        }

    def close(self) -> None:
        """Remove the hooks."""
        for handle in (self._passes, *self._handles):
            handle.remove()


class _Layer(NamedTuple):
    """What all ranks know of a layer: ``has_loss`` also says that it has a capacity."""

    experts: int
    has_loss: bool


class _Row:
    """The sums of one layer: numbers, and views of its row of the tensor, added to in place.

    Nothing waits for the device, and a forward pass needs few operations on it. Callers turn
    gradients off.
    """

    def __init__(self, row: torch.Tensor, experts: int) -> None:
        self.forwards = self.tokens = 0
        self.loss, self.dropped, self.entropy = row[_LOSS], row[_DROPPED], row[_ENTROPY]
        self.counts = row[_HEAD : _HEAD + experts]

    def add(self, routed: Routed) -> None:
        self.forwards += 1
        self.counts.add_(routed.counts)
        if routed.loss is not None:
            self.loss.add_(routed.loss)
        if routed.dropped is not None:
            self.dropped.add_(routed.dropped)
        if routed.logits is not None:
            self.add_entropy(routed.logits)

    def add_entropy(self, logits: torch.Tensor) -> None:
        entropy, tokens = summed_entropy(logits)
        self.entropy.add_(entropy)
        self.tokens += tokens


def _balance(row: list[float], layer: _Layer) -> LayerBalance:
    counts = row[_HEAD : _HEAD + layer.experts]
    total = max(sum(counts), 1.0)
    loss, dropped = row[_LOSS] / max(row[_FORWARDS], 1.0), row[_DROPPED] / total
    return LayerBalance(
        loss if layer.has_loss else math.nan,
        tuple(count / total for count in counts),
        dropped if layer.has_loss else math.nan,
        tuple(map(round, counts)),
        row[_ENTROPY] / row[_TOKENS] if row[_TOKENS] else math.nan,
    )


def _number(loss: torch.Tensor) -> torch.Tensor:
    if loss.numel() != 1:
        raise InvalidArgumentError(
            f"LossTracker: the loss has shape {tuple(loss.shape)}: give one number, as its mean."
        )
    return loss.detach().reshape(())


def _of_all_ranks(
    found: list[tuple[str, _Layer]], given: dict[str, _Layer], stage: int
) -> dict[str, _Layer]:
    """Every stage's layers by name, in the order of the stages."""
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, (stage, found, given))
    known: dict[str, _Layer] = {}
    stages: dict[str, int] = {}
    for rank, (stage, layers, routers) in enumerate(everywhere):
        names = [name for name, _ in layers] + list(routers)
        for name, layer in [*layers, *routers.items()]:
            # One name on two ranks of a stage is one layer.
            other = name not in routers and stages.setdefault(name, stage) != stage
            if other or names.count(name) > 1 or known.setdefault(name, layer) != layer:
                raise InvalidArgumentError(
                    f"rank {rank}: two MoE layers are called {name!r}: give each an "
                    "expert_group_name of its own."
                )
    if not known:
        raise InvalidArgumentError(
            "LossTracker found no MoE layer in the model, of DeepSpeed, AutoEP or transformers: "
            "name your routers in experts={name: number of experts}, and call record in their "
            "forward."
        )
    return known
