"""Checkpoints that say what their groups were: layout, manifest and files."""

from typing import TYPE_CHECKING

from moe_groups._common.lazy import offer

if TYPE_CHECKING:
    from moe_groups.checkpoints.convert.convert import Regrouped as Regrouped
    from moe_groups.checkpoints.inspect.report import CheckpointReport as CheckpointReport
else:
    __all__, __getattr__, __dir__ = offer(
        __name__,
        {
            "convert.convert": ("Regrouped",),
            "inspect.report": ("CheckpointReport",),
        },
    )
