"""Metrics of MoE layers in the logs of Hugging Face's ``Trainer``."""

from collections.abc import Callable
from typing import Any

from moe_groups._common.arguments import need
from moe_groups._common.warn import warn
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups._deepspeed.engines import known_engines
from moe_groups._deepspeed.patching import wrap_once
from moe_groups.integrations.moe_values import LogsMoEValues, MoEValues

need("transformers", "hf", "metrics for Trainer")
need("deepspeed", "hf", "metrics for Trainer")

from transformers import Trainer, TrainerCallback  # noqa: E402


class MoEMetricsCallback(LogsMoEValues, TrainerCallback):
    """Logs norms, loads and memory of MoE layers with Trainer's own logs, under DeepSpeed.

    The values are part of the dict that ``Trainer.log`` gets, so they reach everything in
    ``report_to`` once, with the step's number, and ``state.log_history``. Trainer logs every
    ``interval`` optimizer steps, regardless of its own ``logging_steps``. By default there are
    ten values or fewer, over all MoE layers:

    * ``moe/lr``, ``moe/grad_norm``, ``moe/param_norm``, ``moe/update_ratio``: of all experts
      together, as of :class:`moe_groups.GroupMetrics`;
    * ``moe/imbalance`` of the worst layer, ``moe/dropped`` and ``moe/aux_loss`` as means of the
      layers, ``moe/dead_experts`` in all of them, over the interval, as of
      :class:`moe_groups.LossTracker`;
    * ``moe/predicted_step_gib``: what the optimizer step needs on the worst rank, as of
      :func:`moe_groups.estimate_step_memory`; on a GPU also ``moe/peak_gib``, the most that
      rank 0 has allocated so far.

    What an engine does not have (predicted memory under ZeRO-3, loads of routers that are not
    known) is named in one warning, and the rest is logged.

    Trainer calls callbacks of the user after those of ``report_to``, so the first callback that is
    made changes ``Trainer.log``: it adds the values of the trainer's own callback, if there are
    any.

    Args:
        interval: optimizer steps between reports; None: Trainer's ``logging_steps``.
        per_layer: add all values of each layer, as ``moe/<layer>/grad_norm``.
        per_expert: add norms and shares of each expert, as ``moe/<layer>/expert_5/share``.
        update_ratio: as of :class:`moe_groups.GroupMetrics`.

    Raises:
        InvalidArgumentError: an interval below 1.

    Example:
        >>> trainer = MoETrainer(..., callbacks=[MoEMetricsCallback()])      # doctest: +SKIP
    """

    def _made(self) -> None:
        self._pending: dict[str, float] = {}
        support_our_groups(moe=True)  # so that engines are known whose groups DeepSpeed made
        wrap_once(Trainer, "log", _wrap_log)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()
        mine = getattr(kwargs["optimizer"], "optimizer", None)  # in Accelerate's wrapper
        engines = [one for one in known_engines() if one.optimizer is mine]
        if mine is not None and engines:
            interval = self._interval or max(1, int(state.logging_steps))
            self._values = MoEValues(engines[0], interval, *self._options)
        elif state.is_world_process_zero:
            warn(
                "MoEMetricsCallback logs nothing, because no DeepSpeed engine steps the model: set "
                "deepspeed= in the training arguments, and make the callback before the engine.",
                UserWarning,
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._pending = self._read()
        if self._pending:
            control.should_log = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        super()._close()
        self._pending = {}

    def take(self) -> dict[str, float]:
        """The values of the step that are not logged yet."""
        taken, self._pending = self._pending, {}
        return taken


def _wrap_log(original: Callable[..., None]) -> Callable[..., None]:
    """Let ``Trainer.log`` add the values of the trainer's callbacks."""

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MoEMetricsCallback):
                logs.update(callback.take())
        original(self, logs, *args, **kwargs)

    return log
