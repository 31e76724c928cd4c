"""Norms and learning rates by layer and expert, with pictures."""

from typing import TYPE_CHECKING

from moe_groups._common.lazy import offer

if TYPE_CHECKING:
    from moe_groups.metrics.plot import write_expert_map as write_expert_map
    from moe_groups.metrics.report import (
        GroupStats as GroupStats,
        LayerStats as LayerStats,
        MetricsReport as MetricsReport,
    )
else:
    __all__, __getattr__, __dir__ = offer(
        __name__,
        {
            "plot": ("write_expert_map",),
            "report": ("GroupStats", "LayerStats", "MetricsReport"),
        },
    )
