"""From planned groups to the dicts that an optimizer takes."""

import contextlib
import re
from collections.abc import Callable

from moe_groups._common.arguments import SplitBy
from moe_groups._common.garbage import no_garbage_collection
from moe_groups._common.warn import warn
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups.errors import UnmarkedExpertsWarning
from moe_groups.groups.inputs import GroupInput, ParamGroup, ParamsInput, read_input
from moe_groups.groups.keys import Key, PlannedGroup
from moe_groups.groups.origin import remember_groups
from moe_groups.groups.rules import Rules
from moe_groups.tags import is_expert_parameter

_ROUTED = re.compile(r"(^|\.)experts\.")
"""In names of routed experts; those of shared experts have another word there."""
MARKS = (
    "Mark the experts of a model before it is grouped: with AutoEP (tag_autoep_experts), with "
    "tag_experts(model, pattern='*.experts', ep_size=N), or by building it with moe_groups.MoE."
)
"""What to do where no expert is found."""


@no_garbage_collection()  # temporary objects are freed before the collector would run
def make_groups(
    params: ParamsInput,
    rules: Rules,
    make: Callable[[GroupInput], list[PlannedGroup]],
    split_by: SplitBy,
    planned: bool,
) -> list[ParamGroup]:
    """Tag, plan with ``make``, prepare DeepSpeed and write the dicts; all of it or nothing.

    Args:
        planned: the groups are planned for the memory of a step.
    """
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
    """Warn if the model seems to have experts, but none is marked: all groups would be dense."""
    if any(map(is_expert_parameter, given.params)):
        return  # they are frozen
    stepped = zip(given.names, given.params, strict=True)
    routed = (name for name, param in stepped if param.requires_grad and has_name_of_expert(name))
    named = next(routed, None)
    if named is None and split_by != "expert":
        return
    meant = f"{named!r} looks like one" if named else "split_by='expert' asks for their groups"
    warn(
        f"no parameter is marked as an expert's, and all are grouped as dense; {meant}. {MARKS}",
        UnmarkedExpertsWarning,
    )


def has_name_of_expert(name: str) -> bool:
    """Does the qualified name say that the parameter is a routed expert's?"""
    return _ROUTED.search(name) is not None


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
