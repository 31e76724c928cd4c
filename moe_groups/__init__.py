"""Optimizer param groups for Mixture-of-Experts models on DeepSpeed."""

from typing import TYPE_CHECKING, Any

from moe_groups.attach_loss import attach_loss, gradient_scale
from moe_groups.aux_loss import load_balancing_loss, router_z_loss
from moe_groups.carry_loss import CarriedLoss, CarryLoss
from moe_groups.checkpoint_guard import protect_checkpoints
from moe_groups.checkpoint_report import CheckpointReport
from moe_groups.checkpointing import checkpoint_activations
from moe_groups.compact import compact_gradients
from moe_groups.describe import describe
from moe_groups.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWarning,
    CostlyGroupsWarning,
    InvalidArgumentError,
    MeasurementError,
    MoEGroupsError,
    OverrideError,
    ParameterInputError,
    PlanError,
    RecomputationError,
    TagError,
    UnsupportedDeepSpeedError,
    VerificationError,
)
from moe_groups.expert_control import GroupSchedule, set_group_options
from moe_groups.expert_layers import tag_experts
from moe_groups.group_metrics import GroupMetrics
from moe_groups.group_metrics_plot import write_expert_map
from moe_groups.group_plan import ParamGroupPlan, plan_param_groups
from moe_groups.inspect_checkpoint import inspect_checkpoint
from moe_groups.load_experts import LoadedExperts, load_experts
from moe_groups.loss_tracker import BalanceReport, LayerBalance, LossTracker
from moe_groups.mark_experts import mark_experts
from moe_groups.measure import (
    MeasuredIteration,
    MeasuredPhase,
    MeasuredStep,
    measure_iteration_memory,
    measure_step_memory,
)
from moe_groups.metrics_report import GroupStats, LayerStats, MetricsReport
from moe_groups.muon import is_hidden_matrix, split_for_muon
from moe_groups.param_groups import (
    create_moe_param_groups,
    split_params_into_different_moe_groups_for_optimizer,
)
from moe_groups.regroup import Regrouped, regroup_checkpoint
from moe_groups.rules import is_norm_or_bias
from moe_groups.save_experts import save_experts
from moe_groups.step_config import StepConfig
from moe_groups.step_memory import estimate_step_memory
from moe_groups.step_report import StepMemory
from moe_groups.tags import ExpertTag, copy_expert_tag, get_expert_tag, set_expert_tag
from moe_groups.topology import Topology
from moe_groups.verify import verify

if TYPE_CHECKING:
    from moe_groups.layer import MoE

__version__ = "0.1.0"

__all__ = [
    "BalanceReport",
    "CarriedLoss",
    "CarryLoss",
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointReport",
    "CheckpointWarning",
    "CostlyGroupsWarning",
    "ExpertTag",
    "GroupMetrics",
    "GroupSchedule",
    "GroupStats",
    "InvalidArgumentError",
    "LayerBalance",
    "LayerStats",
    "LoadedExperts",
    "LossTracker",
    "MeasuredIteration",
    "MeasuredPhase",
    "MeasuredStep",
    "MeasurementError",
    "MetricsReport",
    "MoE",
    "MoEGroupsError",
    "OverrideError",
    "ParamGroupPlan",
    "ParameterInputError",
    "PlanError",
    "RecomputationError",
    "Regrouped",
    "StepConfig",
    "StepMemory",
    "TagError",
    "Topology",
    "UnsupportedDeepSpeedError",
    "VerificationError",
    "attach_loss",
    "checkpoint_activations",
    "compact_gradients",
    "copy_expert_tag",
    "create_moe_param_groups",
    "describe",
    "estimate_step_memory",
    "get_expert_tag",
    "gradient_scale",
    "inspect_checkpoint",
    "is_hidden_matrix",
    "is_norm_or_bias",
    "load_balancing_loss",
    "load_experts",
    "mark_experts",
    "measure_iteration_memory",
    "measure_step_memory",
    "plan_param_groups",
    "protect_checkpoints",
    "regroup_checkpoint",
    "router_z_loss",
    "save_experts",
    "set_expert_tag",
    "set_group_options",
    "split_for_muon",
    "split_params_into_different_moe_groups_for_optimizer",
    "tag_experts",
    "verify",
    "write_expert_map",
]


def __getattr__(name: str) -> Any:
    """Import the layer, and with it DeepSpeed, when it is first asked for."""
    if name == "MoE":
        from moe_groups.layer import MoE

        return MoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
