"""Optimizer param groups for Mixture-of-Experts models on DeepSpeed."""

import sys
from typing import TYPE_CHECKING

from moe_groups._common.lazy import offer
from moe_groups._version import __version__ as __version__
from moe_groups._wiring import connect

if TYPE_CHECKING:
    __all__: list[str]
    from moe_groups.checkpoints.convert.convert import regroup_checkpoint as regroup_checkpoint
    from moe_groups.checkpoints.convert.export import export_checkpoint as export_checkpoint
    from moe_groups.checkpoints.guard.guard import protect_checkpoints as protect_checkpoints
    from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint as inspect_checkpoint
    from moe_groups.engine.activation_checkpointing import (
        checkpoint_activations as checkpoint_activations,
    )
    from moe_groups.engine.group_options import (
        GroupSchedule as GroupSchedule,
        set_group_options as set_group_options,
    )
    from moe_groups.engine.lean import (
        compact_gradients as compact_gradients,
        lean_step as lean_step,
    )
    from moe_groups.engine.verification import verify as verify
    from moe_groups.errors import MoEGroupsError as MoEGroupsError
    from moe_groups.experts.find import tag_experts as tag_experts
    from moe_groups.groups.description import describe as describe
    from moe_groups.groups.muon import split_for_muon as split_for_muon
    from moe_groups.groups.rules import is_norm_or_bias as is_norm_or_bias
    from moe_groups.layer import MoE as MoE
    from moe_groups.losses.attach import attach_loss as attach_loss
    from moe_groups.losses.balance import (
        load_balancing_loss as load_balancing_loss,
        router_z_loss as router_z_loss,
    )
    from moe_groups.losses.carry import CarriedLoss as CarriedLoss, CarryLoss as CarryLoss
    from moe_groups.losses.expert_bias import balance_experts as balance_experts
    from moe_groups.losses.tracker import LossTracker as LossTracker
    from moe_groups.memory.estimate import estimate_step_memory as estimate_step_memory
    from moe_groups.memory.measure import measure_step_memory as measure_step_memory
    from moe_groups.memory.plan import plan_param_groups as plan_param_groups
    from moe_groups.memory.step_config import StepConfig as StepConfig
    from moe_groups.metrics.group_metrics import GroupMetrics as GroupMetrics
    from moe_groups.param_groups import (
        create_moe_param_groups as create_moe_param_groups,
        split_params_into_different_moe_groups_for_optimizer as split_params_into_different_moe_groups_for_optimizer,
    )
    from moe_groups.tags import (
        ExpertTag as ExpertTag,
        copy_expert_tag as copy_expert_tag,
        get_expert_tag as get_expert_tag,
        set_expert_tag as set_expert_tag,
    )
    from moe_groups.topology import Topology as Topology
    from moe_groups.weights.gather import gather_model as gather_model
    from moe_groups.weights.load import load_experts as load_experts
    from moe_groups.weights.save import save_experts as save_experts
else:
    __all__, __getattr__, __dir__ = offer(
        __name__,
        {
            "checkpoints.convert.convert": ("regroup_checkpoint",),
            "checkpoints.convert.export": ("export_checkpoint",),
            "checkpoints.guard.guard": ("protect_checkpoints",),
            "checkpoints.inspect.inspect": ("inspect_checkpoint",),
            "engine.activation_checkpointing": ("checkpoint_activations",),
            "engine.lean": ("compact_gradients", "lean_step"),
            "engine.group_options": ("GroupSchedule", "set_group_options"),
            "engine.verification": ("verify",),
            "errors": ("MoEGroupsError",),
            "experts.find": ("tag_experts",),
            "groups.description": ("describe",),
            "groups.muon": ("split_for_muon",),
            "groups.rules": ("is_norm_or_bias",),
            "layer": ("MoE",),
            "losses.attach": ("attach_loss",),
            "losses.balance": ("load_balancing_loss", "router_z_loss"),
            "losses.carry": ("CarriedLoss", "CarryLoss"),
            "losses.expert_bias": ("balance_experts",),
            "losses.tracker": ("LossTracker",),
            "memory.estimate": ("estimate_step_memory",),
            "memory.measure": ("measure_step_memory",),
            "memory.plan": ("plan_param_groups",),
            "memory.step_config": ("StepConfig",),
            "metrics.group_metrics": ("GroupMetrics",),
            "param_groups": (
                "create_moe_param_groups",
                "split_params_into_different_moe_groups_for_optimizer",
            ),
            "tags": ("ExpertTag", "copy_expert_tag", "get_expert_tag", "set_expert_tag"),
            "topology": ("Topology",),
            "weights.gather": ("gather_model",),
            "weights.load": ("load_experts",),
            "weights.save": ("save_experts",),
        },
    )

connect()

if sys.modules.get("deepspeed") is not None:
    from moe_groups._deepspeed.contract import check_contract

    check_contract()  # refuses a release that lacks what is relied on
