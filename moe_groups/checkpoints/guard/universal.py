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

import torch

from moe_groups._common.ranks import on_all_ranks, on_first_rank
from moe_groups._common.warn import warn
from moe_groups._deepspeed.checkpoints import check_biases, model_states_file, separate_steps
from moe_groups._deepspeed.engines import Engine, wrapper_name
from moe_groups.checkpoints.files import check_tag, no_such_tag, read_latest
from moe_groups.checkpoints.torch_file import read_torch_file
from moe_groups.errors import CheckpointError, CheckpointMismatchError, CheckpointWarning
from moe_groups.tags import LABELS, parallel_group_of

_LATEST = "latest_universal"
_STATE = Path("zero", "optimizer_state.pt")
_OUTCOME = "Nothing was loaded."
_STAGES = {False: "ZeRO-1 or ZeRO-2", True: "ZeRO-3"}


class _Saved(NamedTuple):
    """What a universal checkpoint says of its groups.

    Attributes:
        tag: the name of its folder.
        groups: options of each group, in order.
        partitioned: it was made from one of ZeRO-3.
        steps: different step counts of the optimizer's states; none but under ZeRO-3.
    """

    tag: str
    groups: list[dict[str, Any]]
    partitioned: bool
    steps: list[float]


@contextlib.contextmanager
def checked_universal(
    engine: Engine,
    load_dir: Path,
    tag: object,
    *,
    optimizer: bool,
    scheduler: bool,
    strict: bool,
) -> Iterator[None]:
    """Load inside of it; all ranks enter together. The groups get their own saved options.

    Groups are the same if they differ in nothing but the expert-parallel size in their names.

    Args:
        optimizer: the call loads optimizer state. Under ZeRO-1 and ZeRO-2 all calls do.
        scheduler: values of a scheduler are loaded by the position of groups.
        strict: biases of experts that the model has not are refused.

    Raises:
        CheckpointMismatchError: groups would be left out, or get another one's schedule or step,
            or the checkpoint is one for another stage of ZeRO.
        CheckpointError: the checkpoint is not there, cannot be read, or has biases of
            ``balance_experts`` that the model has not.
    """
    saved = on_first_rank(lambda: _read(load_dir, tag), _OUTCOME)
    if saved is None:  # no checkpoint, which DeepSpeed says
        yield
        return
    groups: list[dict[str, Any]] = engine.optimizer.param_groups
    same = list(map(_identity, saved.groups)) == list(map(_identity, groups))
    partitioned = wrapper_name(engine) == "ZeRO-3"
    optimizer = optimizer or not partitioned
    problem = _problem(saved, groups, partitioned, scheduler and not same, optimizer)
    if problem is not None:
        said, instead = problem
        raise CheckpointMismatchError(
            f"{load_dir} is a universal checkpoint that {said}. {_OUTCOME} {instead}.", [said]
        )
    buffers: dict[str, torch.Tensor] = {}
    on_all_ranks(
        lambda: buffers.update(_read_buffers(engine, load_dir, saved.tag, strict)), _OUTCOME
    )
    wanted = saved.groups if same and optimizer else list(map(_options, groups))
    yield
    _load_buffers(engine, buffers)
    if optimizer and not same:
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


def _problem(
    saved: _Saved, groups: list[Any], partitioned: bool, misplaced: bool, optimizer: bool
) -> tuple[str, str] | None:
    """What DeepSpeed would load wrongly, and what to do instead.

    Args:
        partitioned: the run is one of ZeRO-3.
        misplaced: groups would get another one's schedule.
        optimizer: the call loads optimizer state.
    """
    if saved.partitioned != partitioned:  # the files have other names and contents
        return (
            f"was saved under {_STAGES[saved.partitioned]}, and the run has {_STAGES[partitioned]}",
            "Train with the stage that it was saved under",
        )
    into = "Load it into the groups that it was made from"
    if not partitioned:
        into += (
            "; save_checkpoint then writes a checkpoint that "
            'protect_checkpoints(engine, regroup="auto") converts while loading'
        )
    if len(saved.groups) < len(groups) and not partitioned:
        there = f"it has {len(saved.groups)} groups, the run has {len(groups)}"
        return f"is of other groups: {there}", into
    if misplaced:
        return (
            "is of other groups: the learning-rate schedule has values by the position of groups, "
            "and the groups differ (load_lr_scheduler_states=False does not load it)",
            into,
        )
    if len(saved.steps) > 1 and optimizer:
        return (
            f"has groups that were stepped {' and '.join(map('{:g}'.format, saved.steps))} times, "
            "of which DeepSpeed gives all the first",
            "Load the checkpoint that it was made from, with as many ranks; or load the weights "
            "alone (load_optimizer_states=False)",
        )
    return None


def _persistent_buffers(engine: Engine) -> dict[str, torch.Tensor]:
    kept = engine.module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in engine.module.named_buffers() if name in kept}


def _read_buffers(
    engine: Engine, load_dir: Path, tag: str, strict: bool
) -> Mapping[str, torch.Tensor]:
    """Saved values of this rank's persistent buffers, such as a router's bias, by name.

    DeepSpeed loads no buffers of a universal checkpoint.
    """
    path = model_states_file(engine, load_dir, tag)
    if path is None:
        return {}
    weights = read_torch_file(path, trust=True).get("module") or {}  # a pipeline has others
    if strict:
        check_biases(engine.module, weights)
    return {
        name: weights[name]
        for name, buffer in _persistent_buffers(engine).items()
        if torch.is_tensor(weights.get(name)) and weights[name].shape == buffer.shape
    }


def _load_buffers(engine: Engine, saved: Mapping[str, torch.Tensor]) -> None:
    missing = []
    for name, buffer in _persistent_buffers(engine).items():
        if name in saved:
            buffer.copy_(saved[name])
        else:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        warn(
            f"the universal checkpoint has no values of the buffer {missing[0]}{more}, or values "
            "of another shape: the model keeps its own.",
            CheckpointWarning,
        )


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
    optimizer = content.get("optimizer_state_dict")  # the other stages have none
    states = () if optimizer is None else optimizer["state"].values()
    steps = {float(state["step"]) for state in states if "step" in state}
    return _Saved(str(tag), list(map(_options, groups)), optimizer is not None, sorted(steps))
