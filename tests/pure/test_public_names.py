"""What users can import, pinned: a name that comes or goes is a change of this file."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import moe_groups

NAMES = {
    "moe_groups": """
        CarriedLoss CarryLoss ExpertTag GroupMetrics GroupSchedule LossTracker MoE MoEGroupsError
        StepConfig Topology attach_loss balance_experts checkpoint_activations compact_gradients
        copy_expert_tag create_moe_param_groups describe estimate_step_memory export_checkpoint
        gather_model get_expert_tag inspect_checkpoint is_norm_or_bias lean_step
        load_balancing_loss load_experts
        measure_step_memory plan_param_groups protect_checkpoints regroup_checkpoint router_z_loss
        save_experts set_expert_tag set_group_options split_for_muon
        split_params_into_different_moe_groups_for_optimizer tag_experts verify
    """,
    "moe_groups.checkpoints": "CheckpointReport Regrouped",
    "moe_groups.errors": """
        CheckpointError CheckpointMismatchError CheckpointWarning CostlyGroupsWarning
        InvalidArgumentError MeasurementError MissingPackageError MoEGroupsError OverrideError
        ParameterInputError PlanError RecomputationError TagError UnmarkedExpertsWarning
        UnsupportedDeepSpeedError
        VerificationError
    """,
    "moe_groups.groups": "GroupRow GroupTable is_hidden_matrix",
    "moe_groups.losses": "BalanceReport ExpertBalancer LayerBalance gradient_scale",
    "moe_groups.memory": """
        GroupMemory MeasuredIteration MeasuredPhase MeasuredStep ParamGroupPlan StepMemory
        TradeOff measure_iteration_memory
    """,
    "moe_groups.metrics": "GroupStats LayerStats MetricsReport write_expert_map",
    "moe_groups.weights": "LoadedExperts",
}
LAZY = [package for package in NAMES if package != "moe_groups.errors"]


@pytest.mark.parametrize("package", NAMES)
def test_names_are_the_pinned_ones(package: str) -> None:
    module: Any = import_module(package)
    assert sorted(module.__all__) == sorted(NAMES[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_the_same_names(package: str) -> None:
    """Python gives what each module says that it has, and no other."""
    module: Any = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {
        alias.asname: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(map(str, seen)) == module.__all__
    for name, owner in seen.items():
        assert getattr(import_module(str(owner)), str(name)) is getattr(module, str(name))


def test_a_module_does_not_hide_a_function() -> None:
    """Python puts each submodule on its package, in the place of what is there by that name."""
    for package in LAZY:
        folder = Path(str(import_module(package).__file__)).parent
        submodules = {path.stem for path in folder.glob("*")}
        assert not submodules & set(NAMES[package].split())
    assert moe_groups.__version__
