"""Optimizer param groups that know their layer and their expert."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from moe_groups._common.arguments import Bytes, Cap, Count, Is, NotNegative, SplitBy, checked
from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.families import read_table
from moe_groups.groups.grouping import DEEPSPEED_MAX_GROUP_SIZE, Caps, make_plan
from moe_groups.groups.inputs import GroupInput, ParamGroup, ParamsInput
from moe_groups.groups.keys import PlannedGroup
from moe_groups.groups.make import make_groups
from moe_groups.groups.rules import NoDecay, Overrides, Rules
from moe_groups.memory.cost_warning import warn_if_costly
from moe_groups.memory.plan import make_group_plan
from moe_groups.memory.step_config import StepConfig

GroupDicts: TypeAlias = Annotated[
    Mapping[str, Any] | Sequence[Mapping[str, Any]],
    Is(
        lambda value: isinstance(value, Mapping | tuple | list),
        "a group dict or a list of them (for a model call create_moe_param_groups)",
    ),
]


@checked
def create_moe_param_groups(
    params: ParamsInput,
    *,
    split_by: SplitBy | None = None,
    max_group_size: Cap | None = None,
    max_group_bytes: Cap | None = None,
    data_parallel_size: Count | None = None,
    weight_decay: NotNegative | None = None,
    no_decay: NoDecay | None = None,
    overrides: Overrides | None = None,
    step_memory_budget: Bytes | None = None,
    step: StepConfig | None = None,
) -> list[ParamGroup]:
    """Group parameters for an optimizer that DeepSpeed wraps (ZeRO-1, ZeRO-2, BF16_Optimizer).

    Works for FSDP2 too: DTensors of different device meshes are in different groups.

    Call it before ``deepspeed.initialize`` and build the optimizer from the result. Each
    trainable parameter is in exactly one group. No group mixes dense and expert
    parameters, parallel groups, the caller's groups, dtypes, layers (from "module" on) or
    experts ("expert"). Order and names depend on the input alone; names are unique.

    Args:
        params: a module, parameters, ``(name, parameter)`` pairs, or group dicts with
            hyperparameters of their own. A module is tagged first (:func:`tag_experts`).
            Frozen and zero-element parameters are left out, as in DeepSpeed.
        split_by: "parallel_group" (one group for all experts of one expert-parallel size, as
            in DeepSpeed), "module" (a group for each MoE layer) or "expert". None: "module", or
            with ``step_memory_budget`` "parallel_group", as in :func:`plan_param_groups`.
        max_group_size: most elements of a group, dense groups included. Larger groups are
            cut into the fewest tiles, which are as even as the order allows; a single
            parameter over the cap has a group to itself. None: no cap.
        max_group_bytes: the same cap as bytes of one rank's partition in the parameters'
            dtype (before DeepSpeed casts them). If both are given, the smaller cap applies.
        data_parallel_size: ranks of the data-parallel world, for ``max_group_bytes``.
            None: the world size of ``torch.distributed``; pass it if tensor or pipeline
            parallelism makes it smaller.
        weight_decay: for groups that do not have their own.
        no_decay: ``(name, parameter) -> bool``; weight decay is 0 where it returns True and
            the caller's group sets none, for example :func:`is_norm_or_bias`.
        overrides: ``(pattern, options)`` pairs. A glob pattern selects parameters by
            qualified name, by a module above them, or as ``<layer>.expert.<number>`` with
            the layer's label or module path and the number on this rank. These options win
            over all others. They may set what an optimizer takes whose class is imported (torch's,
            DeepSpeed's, your own), and keys that your group dicts have.
        step_memory_budget: cut and order the groups as :func:`plan_param_groups` does, in
            place of a cap: bytes, a string such as "2GiB", or "auto".
        step: how the model will be stepped: for ``step_memory_budget``, for the warning
            about costly groups, and, under tensor parallelism, for ``max_group_bytes`` of
            uncut experts.

    Returns:
        Group dicts in the order dense, then experts by layer, expert and tile. Expert
        groups have ``moe=True``, ``expert_group_name`` and ``expert_number`` (None if
        ``split_by`` is coarser).

    Raises:
        InvalidArgumentError: an argument is out of range.
        ParameterInputError: the input cannot be grouped: a group without "params", a
            parameter in two groups, or nothing trainable.
        TagError: an expert parameter has no layer name, or two layers have the same.
        OverrideError: a pattern matches nothing, or two set different values.
        PlanError: no groups fit the budget.

    Warns:
        UnmarkedExpertsWarning: all parameters are grouped as dense, although ``split_by`` is
            "expert" or names of parameters contain "experts".
        CostlyGroupsWarning: the step over the groups peaks at more than 1.5 times what other
            groups with the same ``split_by`` need, if the number of ranks is known. It compares
            with simple groups only; :func:`plan_param_groups` searches.

    Example:
        >>> groups = create_moe_param_groups(model, split_by="expert", weight_decay=0.1,
        ...                                  no_decay=is_norm_or_bias)    # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(groups, lr=3e-4)                # doctest: +SKIP
    """
    if split_by is None:
        split_by = "module" if step_memory_budget is None else "parallel_group"
    caps = Caps(
        max_group_size, max_group_bytes, data_parallel_size, step.tensor_ranks if step else 1
    )
    if step_memory_budget is not None and (max_group_size or max_group_bytes) is not None:
        raise InvalidArgumentError(
            "step_memory_budget decides the sizes of the groups itself: leave out max_group_size "
            "and max_group_bytes."
        )
    rules = weight_decay, no_decay, overrides or ()

    def make(given: GroupInput) -> list[PlannedGroup]:
        table = read_table(given, Rules(*rules), split_by)
        if step_memory_budget is None:
            groups = make_plan(table, caps.of, given.groups)
            if not (table.sharded or any(hasattr(param, "ds_id") for param in given.params)):
                warn_if_costly(groups, table, split_by, step, data_parallel_size)
            return groups
        if table.sharded:
            raise InvalidArgumentError(
                "step_memory_budget counts what DeepSpeed's optimizer step takes; these parameters "
                "are DTensors, which DeepSpeed does not step: leave it out."
            )
        made = make_group_plan(
            given, table, rules, split_by, step, data_parallel_size, step_memory_budget
        )
        return made.groups

    planned = step_memory_budget is not None
    return make_groups(params, Rules(*rules), make, split_by, planned)


@checked
def split_params_into_different_moe_groups_for_optimizer(
    param_groups: GroupDicts,
    max_group_size: Cap | None = DEEPSPEED_MAX_GROUP_SIZE,
    *,
    split_by: SplitBy = "parallel_group",
) -> list[ParamGroup]:
    """DeepSpeed's split under its own name: change the import, keep the call.

    Makes the promises of :func:`create_moe_param_groups`, unlike ``deepspeed.moe.utils``: it
    does not change the input (use the result), group names are unique and need not be
    given, the order is the same on every rank and in every run, dense groups are capped
    too, and no group is empty.

    Args:
        param_groups: one group dict, or several.
        max_group_size: most elements of a group; None for no cap.
        split_by: a finer level, for experts with an ``expert_group_name``.

    Raises:
        MoEGroupsError: as :func:`create_moe_param_groups`.
    """
    return create_moe_param_groups(param_groups, split_by=split_by, max_group_size=max_group_size)
