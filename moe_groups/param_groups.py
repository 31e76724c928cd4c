"""Optimizer param groups that know their layer and their expert."""

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from moe_groups._common.arguments import Bytes, Cap, Count, Is, NotNegative, SplitBy, checked
from moe_groups._common.garbage import no_garbage_collection
from moe_groups._common.warn import warn
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups.errors import InvalidArgumentError, UnmarkedExpertsWarning
from moe_groups.groups.families import read_table
from moe_groups.groups.grouping import DEEPSPEED_MAX_GROUP_SIZE, Caps, make_plan
from moe_groups.groups.inputs import GroupInput, ParamGroup, ParamsInput, read_input
from moe_groups.groups.keys import Key, PlannedGroup
from moe_groups.groups.origin import remember_groups
from moe_groups.groups.rules import NoDecay, Overrides, Rules
from moe_groups.memory.cost_warning import warn_if_costly
from moe_groups.memory.plan import ParamGroupPlan, make_group_plan
from moe_groups.memory.step_config import StepConfig
from moe_groups.tags import is_expert_parameter

_ROUTED = re.compile(r"(^|\.)experts\.")
"""In names of routed experts; those of shared experts have another word there."""
MARKS = (
    "Mark the experts of a model before it is grouped: with AutoEP (tag_autoep_experts), with "
    "tag_experts(model, pattern='*.experts', ep_size=N), or by building it with moe_groups.MoE."
)
"""What to do where no expert is found."""

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
    plan: ParamGroupPlan | None = None,
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
        plan: make the groups of this plan, with its rules; excludes all other arguments.
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
        PlanError: no groups fit the budget, or the plan was made for other parameters.

    Warns:
        UnmarkedExpertsWarning: all parameters are grouped as dense, with ``split_by="expert"`` or
            though names of parameters speak of experts.
        CostlyGroupsWarning: the step over the groups peaks at more than 1.5 times what other
            groups with the same ``split_by`` need, if the number of ranks is known. It compares
            with simple groups only; :func:`plan_param_groups` searches.

    Example:
        >>> groups = create_moe_param_groups(model, split_by="expert", weight_decay=0.1,
        ...                                  no_decay=is_norm_or_bias)    # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW(groups, lr=3e-4)                # doctest: +SKIP
    """
    if plan is not None:
        beside = {
            "split_by": split_by,
            "max_group_size": max_group_size,
            "max_group_bytes": max_group_bytes,
            "data_parallel_size": data_parallel_size,
            "weight_decay": weight_decay is not None,
            "no_decay": no_decay,
            "overrides": overrides,
            "step_memory_budget": step_memory_budget,
            "step": step,
        }
        if any(beside.values()):
            raise InvalidArgumentError(
                "a plan decides the groups and their options: give to plan_param_groups what is "
                f"given here beside it ({', '.join(key for key, set_ in beside.items() if set_)})."
            )
        return _groups_of_plan(params, plan)
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

    return _make_groups(params, Rules(*rules), make, split_by, step_memory_budget is not None)


def _groups_of_plan(params: ParamsInput, plan: ParamGroupPlan) -> list[ParamGroup]:
    def make(given: GroupInput) -> list[PlannedGroup]:
        plan.check_made_for(read_table(given, Rules(*plan.rules), plan.split_by))
        return plan.groups

    return _make_groups(params, Rules(*plan.rules), make, plan.split_by, planned=True)


@no_garbage_collection()  # temporary objects are freed before the collector would run
def _make_groups(
    params: ParamsInput,
    rules: Rules,
    make: Callable[[GroupInput], list[PlannedGroup]],
    split_by: SplitBy,
    planned: bool,
) -> list[ParamGroup]:
    """Tag, plan with ``make``, and prepare DeepSpeed; all of it or nothing."""
    given = read_input(params)
    model = given.model
    with model.written() if model and rules.no_decay else contextlib.nullcontext():
        groups = make(given)
        if all(key.mesh is None for _, key, _, _ in groups):  # DeepSpeed does not step DTensors
            support_our_groups(any(key.parallel_group for _, key, _, _ in groups))
            remember_groups(groups, given.params, given.groups, planned)
    if model and not rules.no_decay:  # nothing has looked at the tags
        model.write()
    if not any(key.parallel_group for _, key, _, _ in groups):
        _warn_if_unmarked(given, split_by)
    return _group_dicts(groups, given, rules)


def _warn_if_unmarked(given: GroupInput, split_by: SplitBy) -> None:
    """Warn where experts are meant and none is marked: their groups would be dense in silence."""
    if any(map(is_expert_parameter, given.params)):
        return  # they are frozen
    stepped = zip(given.names, given.params, strict=True)
    routed = (name for name, param in stepped if param.requires_grad and speaks_of_experts(name))
    named = next(routed, None)
    if named is None and split_by != "expert":
        return
    meant = f"{named!r} looks like one" if named else "split_by='expert' asks for their groups"
    warn(
        f"no parameter is marked as an expert's, and all are grouped as dense; {meant}. {MARKS}",
        UnmarkedExpertsWarning,
    )


def speaks_of_experts(name: str) -> bool:
    """Does the qualified name say that the parameter is a routed expert's?"""
    return _ROUTED.search(name) is not None


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


def _group_dicts(plan: list[PlannedGroup], given: GroupInput, rules: Rules) -> list[ParamGroup]:
    param_of = given.params.__getitem__
    groups: list[ParamGroup] = []
    last: Key | None = None
    for name, key, expert_number, members in plan:
        if key is not last:
            last, shared = key, rules.options(key.variant, given.groups[key.variant.source])
        group = shared.copy()
        group["params"] = list(map(param_of, members))
        group["name"] = name
        if key.parallel_group is not None:
            group["moe"] = True
            group["expert_group_name"] = key.layer
            group["expert_number"] = expert_number
        groups.append(group)
    return groups
