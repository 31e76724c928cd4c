"""Optimizer param groups for Mixture-of-Experts models on DeepSpeed."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moe_groups._version import __version__ as __version__
from moe_groups._wiring import connect

if TYPE_CHECKING:
    from moe_groups.losses.attach import (
        attach_loss as attach_loss,
        gradient_scale as gradient_scale,
    )
    from moe_groups.losses.balance import (
        load_balancing_loss as load_balancing_loss,
        router_z_loss as router_z_loss,
    )
    from moe_groups.losses.carry import CarriedLoss as CarriedLoss, CarryLoss as CarryLoss
    from moe_groups.checkpoints.guard.guard import protect_checkpoints as protect_checkpoints
    from moe_groups.checkpoints.inspect.report import CheckpointReport as CheckpointReport
    from moe_groups.engine.activation_checkpointing import (
        checkpoint_activations as checkpoint_activations,
    )
    from moe_groups.engine.compact import compact_gradients as compact_gradients
    from moe_groups.groups.description import describe as describe
    from moe_groups.errors import (
        CheckpointError as CheckpointError,
        CheckpointMismatchError as CheckpointMismatchError,
        CheckpointWarning as CheckpointWarning,
        CostlyGroupsWarning as CostlyGroupsWarning,
        InvalidArgumentError as InvalidArgumentError,
        MeasurementError as MeasurementError,
        MoEGroupsError as MoEGroupsError,
        OverrideError as OverrideError,
        ParameterInputError as ParameterInputError,
        PlanError as PlanError,
        RecomputationError as RecomputationError,
        TagError as TagError,
        UnsupportedDeepSpeedError as UnsupportedDeepSpeedError,
        VerificationError as VerificationError,
    )
    from moe_groups.engine.group_options import (
        GroupSchedule as GroupSchedule,
        set_group_options as set_group_options,
    )
    from moe_groups.experts.find import tag_experts as tag_experts
    from moe_groups.metrics.group_metrics import GroupMetrics as GroupMetrics
    from moe_groups.metrics.plot import write_expert_map as write_expert_map
    from moe_groups.memory.plan import (
        ParamGroupPlan as ParamGroupPlan,
        plan_param_groups as plan_param_groups,
    )
    from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint as inspect_checkpoint
    from moe_groups.layer import MoE as MoE
    from moe_groups.weights.load import LoadedExperts as LoadedExperts, load_experts as load_experts
    from moe_groups.losses.tracker import (
        BalanceReport as BalanceReport,
        LayerBalance as LayerBalance,
        LossTracker as LossTracker,
    )
    from moe_groups.experts.find import mark_experts as mark_experts
    from moe_groups.memory.measure import (
        MeasuredIteration as MeasuredIteration,
        MeasuredPhase as MeasuredPhase,
        MeasuredStep as MeasuredStep,
        measure_iteration_memory as measure_iteration_memory,
        measure_step_memory as measure_step_memory,
    )
    from moe_groups.metrics.report import (
        GroupStats as GroupStats,
        LayerStats as LayerStats,
        MetricsReport as MetricsReport,
    )
    from moe_groups.groups.muon import (
        is_hidden_matrix as is_hidden_matrix,
        split_for_muon as split_for_muon,
    )
    from moe_groups.param_groups import (
        create_moe_param_groups as create_moe_param_groups,
        split_params_into_different_moe_groups_for_optimizer as split_params_into_different_moe_groups_for_optimizer,
    )
    from moe_groups.checkpoints.convert.convert import (
        Regrouped as Regrouped,
        regroup_checkpoint as regroup_checkpoint,
    )
    from moe_groups.groups.rules import is_norm_or_bias as is_norm_or_bias
    from moe_groups.weights.save import save_experts as save_experts
    from moe_groups.memory.step_config import StepConfig as StepConfig
    from moe_groups.memory.estimate import estimate_step_memory as estimate_step_memory
    from moe_groups.memory.estimate import StepMemory as StepMemory
    from moe_groups.tags import (
        ExpertTag as ExpertTag,
        copy_expert_tag as copy_expert_tag,
        get_expert_tag as get_expert_tag,
        set_expert_tag as set_expert_tag,
    )
    from moe_groups.topology import Topology as Topology
    from moe_groups.engine.verification import verify as verify


_NAMES = {
    "checkpoints.convert.convert": ("Regrouped", "regroup_checkpoint"),
    "checkpoints.guard.guard": ("protect_checkpoints",),
    "checkpoints.inspect.inspect": ("inspect_checkpoint",),
    "checkpoints.inspect.report": ("CheckpointReport",),
    "engine.activation_checkpointing": ("checkpoint_activations",),
    "engine.compact": ("compact_gradients",),
    "engine.group_options": ("GroupSchedule", "set_group_options"),
    "engine.verification": ("verify",),
    "errors": (
        "CheckpointError",
        "CheckpointMismatchError",
        "CheckpointWarning",
        "CostlyGroupsWarning",
        "InvalidArgumentError",
        "MeasurementError",
        "MoEGroupsError",
        "OverrideError",
        "ParameterInputError",
        "PlanError",
        "RecomputationError",
        "TagError",
        "UnsupportedDeepSpeedError",
        "VerificationError",
    ),
    "experts.find": ("mark_experts", "tag_experts"),
    "groups.description": ("describe",),
    "groups.muon": ("is_hidden_matrix", "split_for_muon"),
    "groups.rules": ("is_norm_or_bias",),
    "layer": ("MoE",),
    "losses.attach": ("attach_loss", "gradient_scale"),
    "losses.balance": ("load_balancing_loss", "router_z_loss"),
    "losses.carry": ("CarriedLoss", "CarryLoss"),
    "losses.tracker": ("BalanceReport", "LayerBalance", "LossTracker"),
    "memory.estimate": ("StepMemory", "estimate_step_memory"),
    "memory.measure": (
        "MeasuredIteration",
        "MeasuredPhase",
        "MeasuredStep",
        "measure_iteration_memory",
        "measure_step_memory",
    ),
    "memory.plan": ("ParamGroupPlan", "plan_param_groups"),
    "memory.step_config": ("StepConfig",),
    "metrics.group_metrics": ("GroupMetrics",),
    "metrics.plot": ("write_expert_map",),
    "metrics.report": ("GroupStats", "LayerStats", "MetricsReport"),
    "param_groups": (
        "create_moe_param_groups",
        "split_params_into_different_moe_groups_for_optimizer",
    ),
    "tags": ("ExpertTag", "copy_expert_tag", "get_expert_tag", "set_expert_tag"),
    "topology": ("Topology",),
    "weights.load": ("LoadedExperts", "load_experts"),
    "weights.save": ("save_experts",),
}
"""Modules, and what is imported from them when somebody first asks for it."""

_HOME_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME_OF)


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Python puts each submodule here; ``describe`` stays the function of that name."""
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

connect()

if sys.modules.get("deepspeed") is not None:
    from moe_groups._deepspeed.contract import check_contract

    check_contract()  # refuses a release that lacks what is relied on
