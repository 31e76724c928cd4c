"""Memory of an optimizer step: prediction, plans that lower it, and measurement."""

from typing import TYPE_CHECKING

from moe_groups._common.lazy import offer

if TYPE_CHECKING:
    from moe_groups.memory.estimate import GroupMemory as GroupMemory, StepMemory as StepMemory
    from moe_groups.memory.measure import (
        MeasuredIteration as MeasuredIteration,
        MeasuredPhase as MeasuredPhase,
        MeasuredStep as MeasuredStep,
        measure_iteration_memory as measure_iteration_memory,
    )
    from moe_groups.memory.plan import ParamGroupPlan as ParamGroupPlan, TradeOff as TradeOff
else:
    __all__, __getattr__, __dir__ = offer(
        __name__,
        {
            "estimate": ("GroupMemory", "StepMemory"),
            "measure": (
                "MeasuredIteration",
                "MeasuredPhase",
                "MeasuredStep",
                "measure_iteration_memory",
            ),
            "plan": ("ParamGroupPlan", "TradeOff"),
        },
    )
