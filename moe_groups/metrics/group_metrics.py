"""Learning rate, norms and updates of every layer and expert, with one collective per interval."""

from typing import Any

import torch
from torch import distributed

from moe_groups._common.arguments import Positive, checked
from moe_groups._deepspeed.engines import SteppingEngine, send_to_monitor
from moe_groups._deepspeed.step.around_step import (
    before_own_clipping,
    check_steps_partitions,
    clipping_divisor,
)
from moe_groups.engine.step_options import stepped_lr
from moe_groups.metrics.report import MetricsReport, make_report
from moe_groups.metrics.rows import rows_of_all_ranks, stepped_tensors
from moe_groups.metrics.sums import GRAD, PARAM, UPDATE, SteppedPieces, StepSums


@checked
class GroupMetrics:
    """Reports norms by layer and expert; call :meth:`step` after each ``engine.step()``.

    All ranks make one, after ``deepspeed.initialize``, and all ranks report. Works for ZeRO-1,
    ZeRO-2, ZeRO-3 (with AutoEP too), BF16_Optimizer and engines without a wrapper, with any
    grouping: numbers are summed by the layer and expert of each parameter. In a step with a
    report, hooks of the torch optimizer read the partitions that this rank steps, and one
    all-reduce over the world combines them. In other steps the hooks compare a number.

    Args:
        engine: from ``deepspeed.initialize``, of a pipeline or not.
        interval: optimizer steps between reports.
        per_expert: send each expert's numbers to the monitor too.
        update_ratio: False leaves out the update, which needs a copy of the master weights
            during a step with a report: 4 bytes an element of the largest partition under ZeRO,
            of all partitions of the rank under BF16_Optimizer.

    Raises:
        InvalidArgumentError: another kind of engine, an offloaded part of ZeRO-3 that another
            optimizer steps, or an interval below 1.

    Example:
        >>> metrics = GroupMetrics(engine, interval=50)                      # doctest: +SKIP
        >>> report = metrics.step()                                          # doctest: +SKIP
        >>> if report: print(report.layers["blocks.1.moe"].experts[5])       # doctest: +SKIP
    """

    def __init__(
        self,
        engine: SteppingEngine,
        *,
        interval: Positive = 50,
        per_expert: bool = False,
        update_ratio: bool = True,
    ) -> None:
        check_steps_partitions(engine, "GroupMetrics")
        self.engine, self.interval = engine, interval
        self.per_expert, self.update_ratio = per_expert, update_ratio
        stepped, rows = stepped_tensors(engine)
        self._rows = rows_of_all_ranks(rows)
        index_of = {row: index for index, row in enumerate(self._rows)}
        self._parts = {id(one.tensor): SteppedPieces(one, index_of) for one in stepped}
        self._sums, self._read_at, self._gradients_at = StepSums(), -1, -1
        self._copies: list[tuple[SteppedPieces, torch.Tensor]] = []
        before = engine.basic_optimizer.register_step_pre_hook(self._before)
        after = engine.basic_optimizer.register_step_post_hook(self._after)
        clipping = before_own_clipping(engine, self._read_unclipped)
        self._undo = [before.remove, after.remove, clipping]

    @property
    def needs_gradients(self) -> bool:
        """For :func:`moe_groups.lean_step`: do the hooks of the next step read them?"""
        return (self.engine.global_steps + 1) % self.interval == 0

    def _begins(self) -> bool:
        """Does the running step get a report? Drops one that was not asked for."""
        if not self.needs_gradients:
            return False
        step = self.engine.global_steps + 1
        if self._read_at != step:
            self._read_at = step
            self._sums = StepSums()
        return True

    @torch.no_grad()
    def _read_unclipped(self) -> None:
        """Gradients of an engine without a wrapper, which clips them in place."""
        if self._begins():
            self._gradients_at = self._read_at
            for part in self._parts.values():
                self._sums.add_norms(GRAD, part, part.tensor.grad)

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._begins():
            return
        self._copies.clear()
        for group in optimizer.param_groups:
            lr = stepped_lr(group)
            for part in self._parts_of(group):
                self._sums.add_elements(part, lr)
                if self._gradients_at != self._read_at:
                    self._sums.add_norms(GRAD, part, part.tensor.grad)
                if self.update_ratio:
                    self._copies.append((part, part.tensor.detach().clone()))

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._begins():
            return
        for group in optimizer.param_groups:
            for part in self._parts_of(group):
                self._sums.add_norms(PARAM, part, part.tensor)
        for part, copy in self._copies:
            self._sums.add_norms(UPDATE, part, copy.sub_(part.tensor))
        self._copies.clear()

    def _parts_of(self, group: dict[str, Any]) -> list[SteppedPieces]:
        keys = map(id, group["params"])
        return [self._parts[key] for key in keys if key in self._parts]

    def step(self) -> MetricsReport | None:
        """The report, if the last optimizer step ended an interval; else None."""
        if self._read_at != self.engine.global_steps:
            return None
        self._read_at = -1
        sums = self._sums.total(len(self._rows), self.engine.device)
        distributed.all_reduce(sums)
        sums[:, GRAD] *= clipping_divisor(self.engine) ** 2
        report = make_report(self.engine.global_steps, self._rows, sums.tolist(), self.update_ratio)
        send_to_monitor(self.engine, report.step, report.as_dict(self.per_expert))
        return report

    def close(self) -> None:
        """Remove the hooks from the engine."""
        while self._undo:
            self._undo.pop()()
