"""What beside the optimizer states depends on the groups: lists with an entry for each."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.layout import Layout, Rank
from moe_groups.checkpoints.torch_file import read_torch_file, save
from moe_groups.errors import CheckpointError

_LISTS = re.compile(r"(^|_)(lrs|last_lr|lr_lambdas|momentums)$")
"""Entries of torch's schedulers that have one value for each group."""

_SCHEDULER = "lr_scheduler"
_SHAPES = "param_shapes"
_WORLD = "dp_world_size"


def write_model(source: RegroupSource, target: Layout, model: int, path: Path) -> None:
    """Write the file of dense weights and counters for the new groups.

    Weights go from file to file through the operating system's cache.

    Raises:
        CheckpointError: the source is damaged, or groups with different learning-rate schedules
            would become one.
        OSError: the file cannot be written.
    """
    content = read_torch_file(source.files.models[model], source.files.trust)
    rank = Rank(model, 0)
    if content.get(_SCHEDULER) is not None:
        content[_SCHEDULER] = _regroup_lists(source, target, rank, content[_SCHEDULER])
    if content.get(_SHAPES) is not None:
        content[_SHAPES] = _shapes(target, rank, content[_SHAPES])
    if _WORLD in content:
        content[_WORLD] = target.data_parallel_size
    save(content, path)


def _regroup_lists(source: RegroupSource, target: Layout, rank: Rank, value: Any) -> Any:
    """A scheduler's state with one value for each new group in its lists."""
    if isinstance(value, list | tuple):  # of schedulers in a scheduler
        return type(value)(_regroup_lists(source, target, rank, item) for item in value)
    if not isinstance(value, Mapping):
        return value
    groups = len(source.layout.of(rank))
    return {
        key: _one_for_each(source, target, rank, item)
        if _LISTS.search(str(key)) and isinstance(item, list | tuple) and len(item) == groups
        else _regroup_lists(source, target, rank, item)
        for key, item in value.items()
    }


def _one_for_each(
    source: RegroupSource, target: Layout, rank: Rank, values: list[Any] | tuple[Any, ...]
) -> Any:
    index_of = {id(group): index for index, group in enumerate(source.layout.of(rank))}
    entries = []
    for group in target.of(rank):
        found = [values[index_of[id(home)]] for home in source.homes(group)]
        if other := [entry for entry in found if entry != found[0]]:
            raise CheckpointError(
                f"group {group.name!r} of the new groups would hold parameters with {found[0]} and "
                f"{other[0]} in the learning-rate schedule: their old groups cannot become one."
            )
        entries.append(found[0])
    return type(values)(entries)


def _shapes(target: Layout, rank: Rank, old: list[Mapping[str, Any]]) -> list[Any]:
    """``param_shapes`` in the order of the new groups (read by ``zero_to_fp32.py``)."""
    known = {name: shape for group in old for name, shape in group.items()}
    return [
        OrderedDict((param.name, known[param.name]) for param in group.params)
        for group in target.of(rank)
    ]
