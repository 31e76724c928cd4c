"""The groups that a checkpoint is converted to: those of a file, or by name."""

import re
from pathlib import Path
from typing import NamedTuple

from moe_groups.checkpoints.convert.named import TARGETS, name_of_groups, named_target
from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.files import CheckpointFiles, find_checkpoint
from moe_groups.checkpoints.layout import Layout
from moe_groups.checkpoints.layout_diff import (
    Key,
    keys_of_params,
    other_expert_parallel_size,
    unnumbered_problem,
)
from moe_groups.checkpoints.manifest import read_manifest
from moe_groups.checkpoints.read_layout import check_states
from moe_groups.checkpoints.shard import read_shard, step_of_group
from moe_groups.errors import CheckpointError, InvalidArgumentError


def read_target(
    to: str | Path | Layout | None,
    files: CheckpointFiles,
    source: Layout,
    max_group_size: int | None = None,
    ep_size: int | None = None,
) -> Layout:
    """The layout that ``to`` means for this checkpoint.

    Args:
        to: None for the groups that the checkpoint has, with another ``ep_size``.

    Raises:
        InvalidArgumentError: there is neither ``to`` nor ``ep_size``.
        CheckpointError: no such file or name, or it does not fit the checkpoint.
    """
    if isinstance(to, Layout):
        return to
    if to is None:
        if ep_size is None:
            raise InvalidArgumentError(
                f"nothing says what the new groups are: give to=... ({', '.join(TARGETS)}, or a "
                "file), or ep_size=... for the groups of the checkpoint with another size."
            )
        to = name_of_groups(source, max_group_size)
    if isinstance(to, str) and to in TARGETS:  # a file of that name is ./expert
        check_states(files)
        like = read_shard(next(iter(files.shards.values())), files.trust)
        return named_target(source, to, max_group_size, ep_size, like.data_before_experts)
    for name, value in (("max_group_size", max_group_size), ("ep_size", ep_size)):
        if value is not None:
            raise CheckpointError(
                f"{name}={value} goes with one of {', '.join(TARGETS)}; {to} says itself what its "
                "groups are."
            )
    path = _file(Path(to))
    if not path.is_file():
        raise CheckpointError(
            f"{to} is none of {', '.join(TARGETS)}, and no file that says what groups are wanted "
            "(a refused load writes one; moe_groups.json in a checkpoint is one)."
        )
    return read_manifest(path).layout


def _file(path: Path) -> Path:
    try:
        return find_checkpoint(path).manifest if path.is_dir() else path
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def size_in_groups(files: CheckpointFiles, source: Layout, target: Layout) -> int:
    """Bytes of what is not only copied: optimizer states grow with gaps and padding."""
    saved, models = (
        sum(path.stat().st_size for path in paths.values())
        for paths in (files.shards, files.models)
    )
    return saved * target.elements // max(source.elements, 1) + models


class TrainedSince(NamedTuple):
    """Parameters that only one of the two runs trains.

    Attributes:
        dropped: of the saved run alone; their state is dropped.
        fresh: of the new run alone; they start from their saved weights, without moments.
    """

    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What a conversion did to them; empty if there are none."""
        lines = [
            f"{text}: {_some(list(names), _SHOWN)}"
            for text, names in (
                ("dropped the optimizer state of what no group has now", self.dropped),
                ("started afresh, from saved weights, what was not trained before", self.fresh),
            )
            if names
        ]
        return "; ".join(lines)


def check_parameters(source: RegroupSource, target: Layout) -> TrainedSince:
    """Is the checkpoint of the model that the new groups are of, and can it be converted?

    Raises:
        CheckpointError: what does not fit, and a way out.
    """
    layout = source.layout
    if problem := layout.problem() or target.problem():
        raise CheckpointError(problem)
    moved = other_expert_parallel_size(layout, target)
    if moved and (problem := unnumbered_problem(layout, target)):
        raise CheckpointError(f"{moved}: {problem}; or {_ALONE}.")
    old, new = (keys_of_params(each, by_expert=bool(moved)) for each in (layout, target))
    if not old & new or layout.model_ranks != target.model_ranks:
        lines = [f"{name} is in the checkpoint alone" for name in _names(old - new)[:_SHOWN]]
        lines += [f"{name} is in the new groups alone" for name in _names(new - old)[:_SHOWN]]
        raise CheckpointError(
            "the checkpoint and the new groups are not of one model on the same model-parallel "
            f"ranks ({'; '.join(lines)}): {_ALONE}."
        )
    if problem := fresh_problem(source, target):
        raise CheckpointError(f"{problem}; or {_ALONE}.")
    return TrainedSince(tuple(_names(old - new)), tuple(_names(new - old)))


_SHOWN = 3
_ALONE = (
    "its weights alone can be loaded (load_module_only=True with the checkpoint as it is), into "
    "fresh optimizer state"
)


def _names(keys: set[Key]) -> list[str]:
    return sorted({name for *_, name in keys})


def fresh_problem(source: RegroupSource, target: Layout) -> str | None:
    """What keeps parameters that were not trained from starting afresh; None if nothing does.

    Raises:
        CheckpointError: there is no saved weight of one.
    """
    shared: dict[str, None] = {}
    for group in target.groups:
        fresh = source.fresh(group)
        for param in fresh:
            source.weight(group, param)
        saved = source.saved(group) if fresh else []
        if any(step_of_group(shard, index) for shard, index in saved):
            shared |= dict.fromkeys(param.name for param in fresh)
            name, steps = group.name, max(step_of_group(*place) or 0 for place in saved)
    if not shared:
        return None
    others = {name for *_, name in keys_of_params(target)} - shared.keys()
    patterns = _patterns([*shared], others)
    way = f"..., overrides=[{', '.join(f'({pattern!r}, {{}})' for pattern in patterns)}]"
    if len(patterns) > _SHOWN:  # each rule makes a group
        way = "[{'params': [the others]}, {'params': [these]}]"
    return (
        f"{_some([*shared], _SHOWN)} was not trained before, and in group {name!r} would share the "
        f"step counter ({steps:g}) of trained ones: Adam would not correct the bias of its "
        "moments, and its steps would be several times too large. Give it a group of its own with "
        f"create_moe_param_groups({way}), and convert"
    )


def _patterns(names: list[str], others: set[str]) -> list[str]:
    """Globs for these names and no other: of modules that have nothing else, and of parameters."""
    mixed = {path for name in others for path in _above(name)}
    found = ([path for path in _above(name) if path not in mixed] for name in names)
    pure = [f"{paths[0]}.*" if paths else name for paths, name in zip(found, names, strict=True)]
    return list(dict.fromkeys(re.sub(r"[[?]", r"[\g<0>]", pattern) for pattern in pure))


def _above(name: str) -> list[str]:
    """Paths of the modules that hold a parameter, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _some(names: list[str], shown: int) -> str:
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
