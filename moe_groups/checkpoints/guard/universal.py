"""Loads of DeepSpeed's universal checkpoints into our groups.

DeepSpeed finds master weights and moments by the name of a parameter. Options it takes by the
position of groups, names among them (``load_hp_checkpoint_state_from_checkpoint_dir``,
``runtime/base_optimizer.py``), and under ZeRO-1 and ZeRO-2 it leaves out the groups for which there
is no saved one, whatever ``load_optimizer_states`` says. Under ZeRO-3 it gives all groups the
options of the first (``load_hp_checkpoint_state_from_checkpoint_dir_stage3``,
``runtime/zero/stage3.py``).
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_groups._common.ranks import on_first_rank
from moe_groups._common.warn import warn
from moe_groups._deepspeed.checkpoints import separate_steps
from moe_groups._deepspeed.engines import Engine, wrapper_name
from moe_groups.checkpoints.files import check_tag, no_such_tag, read_latest
from moe_groups.checkpoints.torch_file import read_torch_file
from moe_groups.errors import CheckpointError, CheckpointMismatchError, CheckpointWarning
from moe_groups.tags import LABELS, parallel_group_of

_LATEST = "latest_universal"
_STATE = Path("zero", "optimizer_state.pt")
_OUTCOME = "Nothing was loaded."


class _Saved(NamedTuple):
    """What a universal checkpoint says of its groups.

    Attributes:
        groups: options of each group, in order.
        steps: different step counts of the optimizer's states; none but under ZeRO-3.
    """

    groups: list[dict[str, Any]]
    steps: list[float]


@contextlib.contextmanager
def checked_universal(
    engine: Engine, load_dir: Path, tag: object, *, optimizer: bool, scheduler: bool
) -> Iterator[None]:
    """Load inside of it; all ranks enter together. The groups get their own saved options.

    Groups are the same if they differ in nothing but the expert-parallel size in their names.

    Args:
        optimizer: the call loads optimizer state. Under ZeRO-1 and ZeRO-2 all calls do.
        scheduler: values of a scheduler are loaded by the position of groups.

    Raises:
        CheckpointMismatchError: groups would be left out, or get another one's schedule or step.
        CheckpointError: the checkpoint is not there or cannot be read.
    """
    saved = on_first_rank(lambda: _read(load_dir, tag), _OUTCOME)
    if saved is None:  # no checkpoint, which DeepSpeed says
        yield
        return
    partitioned = wrapper_name(engine) == "ZeRO-3"
    groups: list[dict[str, Any]] = engine.optimizer.param_groups
    same = list(map(_identity, saved.groups)) == list(map(_identity, groups))
    lines = []
    if len(saved.groups) < len(groups) and not partitioned:
        lines.append(f"it has {len(saved.groups)} groups, the run has {len(groups)}")
    elif scheduler and not same:
        lines.append(
            "the learning-rate schedule has values by the position of groups, and they are others "
            "(load_lr_scheduler_states=False leaves it out)"
        )
    if lines:
        raise CheckpointMismatchError(
            f"{load_dir} is a universal checkpoint of other groups: {lines[0]}. {_OUTCOME} Load it "
            "into the groups that it was made from; save_checkpoint then writes a checkpoint that "
            'protect_checkpoints(engine, regroup="auto") converts while loading.',
            lines,
        )
    if partitioned and optimizer and len(saved.steps) > 1:
        lines = [f"its groups were stepped {' and '.join(map('{:g}'.format, saved.steps))} times"]
        raise CheckpointMismatchError(
            f"{load_dir} is a universal checkpoint for ZeRO-3, and {lines[0]}: DeepSpeed gives all "
            f"the step count of the first. {_OUTCOME} Load the checkpoint that it was made from, "
            "with as many ranks; or load the weights alone (load_optimizer_states=False).",
            lines,
        )
    loads_options = optimizer or not partitioned
    wanted = saved.groups if same and loads_options else list(map(_options, groups))
    yield
    if loads_options and not same:
        warn(
            f"{load_dir} is a universal checkpoint of other groups: the groups keep the options "
            "that they were given, such as lr, and not those that were saved.",
            CheckpointWarning,
        )
    for group, options in zip(engine.optimizer.param_groups, wanted, strict=True):
        for key in [key for key in group if key != "params"]:
            del group[key]
        group.update(options)
    if partitioned:
        separate_steps(engine)


def _identity(group: Mapping[str, Any]) -> list[Any]:
    """What a group keeps when the expert-parallel size changes; ``ep_size_2_a`` becomes ``_a``."""
    name = group.get("name")
    if group.get("moe") and name is not None:
        name = str(name).removeprefix(parallel_group_of(str(name)))
    return [name, bool(group.get("moe")), *map(group.get, LABELS)]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in group if key != "params"}


def _read(load_dir: Path, tag: object) -> _Saved | None:
    """The groups in the checkpoint; None where no file says which one is the latest."""
    if tag is None:
        tag = read_latest(load_dir, _LATEST)
    if tag is None:
        return None
    check_tag(str(tag))
    if not (load_dir / str(tag)).is_dir():
        raise no_such_tag(load_dir, str(tag))
    path = load_dir / str(tag) / _STATE
    content = read_torch_file(path, trust=True)
    groups = content.get("param_groups") if isinstance(content, dict) else None
    if not isinstance(groups, list):
        raise CheckpointError(f"{path} has no param_groups.")
    states = content.get("optimizer_state_dict", {}).get("state", {}).values()
    steps = {float(state["step"]) for state in states if "step" in state}
    return _Saved(list(map(_options, groups)), sorted(steps))
