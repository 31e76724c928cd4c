"""What beside the optimizer states depends on the groups: lists with an entry for each."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.layout import Layout, Rank
from moe_groups.checkpoints.torch_file import read_torch_file, reading, save
from moe_groups.errors import CheckpointError

_BY_GROUP = re.compile(r"(^|_)(lrs?|lr_lambdas|momentums|moms)$")
"""Entries of torch's, DeepSpeed's and Lightning's schedulers with one value for each group."""
_NOT_BY_GROUP = re.compile(r"(^|_)(milestones|betas)$")
_SCHEDULER = re.compile(r"sched", re.IGNORECASE)
_SCHEDULER_ENTRIES = {"base_lrs", "_last_lr", "last_epoch", "last_batch_iteration"}
_NOT_LOADED_BY_GROUP = ("module", "optimizer", "ds_config")

SCHEDULER = "lr_scheduler"
_SHAPES = "param_shapes"
_WORLD = "dp_world_size"


class GroupList(NamedTuple):
    """A list with one value for each group, in the state of a scheduler or of the caller.

    Attributes:
        where: path to it, for messages.
        holder: dict that has it.
        key: its key there.
        known: its name says that it has a value for each group; else only its length does.
    """

    where: str
    holder: dict[Any, Any]
    key: Any
    known: bool


def group_lists(content: Any, groups: int) -> list[GroupList]:
    """The lists for so many groups in what a checkpoint holds beside weights and optimizer states.

    Those of the running scheduler, and of what the caller saved in ``client_state``, as Lightning
    does with its ``lr_schedulers``.
    """
    return list(_group_lists(content, groups, "", False, set()))


def _group_lists(
    content: Any, groups: int, where: str, inside: bool, seen: set[int]
) -> Iterator[GroupList]:
    """``inside`` of a scheduler's state a list can be one for groups whatever its name is."""
    if not isinstance(content, dict | list | tuple) or id(content) in seen:
        return
    seen.add(id(content))
    if not isinstance(content, dict):  # of schedulers
        for index, item in enumerate(content):
            yield from _group_lists(item, groups, f"{where}[{index}]", inside, seen)
        return
    inside |= not _SCHEDULER_ENTRIES.isdisjoint(content)
    for key, value in content.items():
        name, path = str(key), f"{where}.{key}".lstrip(".")
        if not where and name in _NOT_LOADED_BY_GROUP:
            continue
        listed = isinstance(value, list | tuple) and len(value) == groups
        if listed and _BY_GROUP.search(name):
            yield GroupList(path, content, key, True)
        elif listed and inside and all(map(_is_number, value)):
            if not _NOT_BY_GROUP.search(name):
                yield GroupList(path, content, key, False)
        else:
            scheduler = inside or bool(_SCHEDULER.search(name))
            yield from _group_lists(value, groups, path, scheduler, seen)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.Tensor)


def regroup_lists(source: RegroupSource, target: Layout, model: int, content: Any) -> None:
    """Give each list one value for each new group, in place.

    Raises:
        CheckpointError: groups with different values would become one, or it is not known whether
            a list has a value for each group.
    """
    rank, layout = Rank(model, 0), source.layout
    # Groups of other ranks too, whose experts this one may have now: all ranks read this file.
    index_of = {
        id(layout.groups[index]): place
        for own in (*{*layout.order.values()}, layout.order[rank])
        for place, index in enumerate(own)
    }
    homes = [
        (group.name, [index_of[id(home)] for home in source.models_for(group, target)])
        for group in target.of(rank)
    ]
    for where, holder, key, known in group_lists(content, len(layout.order[rank])):
        values = holder[key]
        if not known:
            raise CheckpointError(
                f"{where} in the checkpoint has {len(values)} numbers, as many as it has groups, "
                "and nothing says whether each belongs to a group. Converting would be a guess."
            )
        entries = []
        for name, places in homes:
            found = [values[place] for place in places]
            if not found:
                raise CheckpointError(
                    f"the parameters of group {name!r} were not trained, and the learning-rate "
                    f"schedule ({where}) has no value for a group with its hyperparameters. Load "
                    "with those of another group (overrides with an empty dict keep the groups "
                    "separate), and set its own afterwards."
                )
            if other := [entry for entry in found if entry != found[0]]:
                raise CheckpointError(
                    f"group {name!r} of the new groups would hold parameters with {found[0]} and "
                    f"{other[0]} in the learning-rate schedule ({where}): their old groups cannot "
                    "become one."
                )
            entries.append(found[0])
        holder[key] = type(values)(entries)


def write_model(source: RegroupSource, target: Layout, model: int, path: Path) -> None:
    """Write the file of dense weights and counters for the new groups.

    Weights go from file to file through the operating system's cache.

    Raises:
        CheckpointError: the source is damaged, or groups with different learning-rate schedules
            would become one.
        OSError: the file cannot be written.
    """
    file = source.files.models[model]
    content = read_torch_file(file, source.files.trust)
    with reading(file):
        shapes = content.get(_SHAPES)
    regroup_lists(source, target, model, content)
    if shapes is not None:
        content[_SHAPES] = _shapes(source, target, Rank(model, 0), shapes)
    if _WORLD in content:
        content[_WORLD] = target.data_parallel_size
    save(content, path)


def _shapes(
    source: RegroupSource, target: Layout, rank: Rank, old: list[Mapping[str, Any]]
) -> list[Any]:
    """``param_shapes`` in the order of the new groups (read by ``zero_to_fp32.py``)."""
    known = {name: shape for group in old for name, shape in group.items()}
    groups = target.of(rank)
    for group in groups:
        # Experts that were on another rank are not in the file.
        known |= {
            param.name: torch.Size(param.shape)
            for param in group.params
            if param.name not in known and param.shape is not None
        }
        known |= {param.name: source.weight(group, param).shape for param in source.fresh(group)}
    return [
        OrderedDict((param.name, known[param.name]) for param in group.params) for group in groups
    ]
