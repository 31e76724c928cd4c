"""Load-balancing losses, carried along a pipeline or attached, and tracked."""

from typing import TYPE_CHECKING

from moe_groups._common.lazy import offer

if TYPE_CHECKING:
    from moe_groups.losses.attach import gradient_scale as gradient_scale
    from moe_groups.losses.expert_bias import ExpertBalancer as ExpertBalancer
    from moe_groups.losses.report import (
        BalanceReport as BalanceReport,
        LayerBalance as LayerBalance,
    )
else:
    __all__, __getattr__, __dir__ = offer(
        __name__,
        {
            "attach": ("gradient_scale",),
            "expert_bias": ("ExpertBalancer",),
            "report": ("BalanceReport", "LayerBalance"),
        },
    )
