"""Reports to the monitor that DeepSpeed's config names: TensorBoard, W&B, CSV."""

from typing import Any, Protocol

from torch import distributed


class Report(Protocol):
    """What a tracker found up to a step, as names and numbers."""

    @property
    def step(self) -> int: ...

    def as_dict(self, per_expert: bool = False) -> dict[str, float]: ...


def send(engine: Any, report: Report, per_expert: bool) -> None:
    """Write the report to the engine's monitor, if there is one, from the first rank."""
    if engine.monitor.enabled and distributed.get_rank() == 0:
        values = report.as_dict(per_expert).items()
        engine.monitor.write_events([(f"Train/{key}", value, report.step) for key, value in values])
