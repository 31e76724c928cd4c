"""Loads of DeepSpeed's universal checkpoints into our groups.

DeepSpeed finds master weights and moments by the name of a parameter, but walks saved and running
groups side by side: it leaves out the groups for which there is no saved one, and copies names and
options by position (``load_hp_checkpoint_state_from_checkpoint_dir``,
``runtime/base_optimizer.py``), whatever ``load_optimizer_states`` says.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_groups._common.ranks import on_first_rank
from moe_groups._common.warn import warn
from moe_groups._deepspeed.engines import Engine
from moe_groups.checkpoints.files import check_tag, no_such_tag, read_latest
from moe_groups.checkpoints.torch_file import read_torch_file
from moe_groups.errors import CheckpointError, CheckpointMismatchError, CheckpointWarning

_LATEST = "latest_universal"
_STATE = Path("zero", "optimizer_state.pt")
_OUTCOME = "Nothing was loaded."


@contextlib.contextmanager
def checked_universal(
    engine: Engine, load_dir: Path, tag: object, scheduler: bool
) -> Iterator[None]:
    """Load inside of it; all ranks enter together. The groups keep their names and options.

    Args:
        scheduler: values of a scheduler are loaded by the position of groups.

    Raises:
        CheckpointMismatchError: groups would be left out, or get another one's schedule.
        CheckpointError: the checkpoint is not there or cannot be read.
    """
    names = on_first_rank(lambda: _saved_names(load_dir, tag), _OUTCOME)
    if names is None:  # no checkpoint, which DeepSpeed says
        yield
        return
    groups: list[dict[str, Any]] = engine.optimizer.param_groups
    own = [{key: group[key] for key in group if key != "params"} for group in groups]
    same = names == [group.get("name") for group in groups]
    if len(names) < len(groups):
        lines = [f"it has {len(names)} groups, the run has {len(groups)}"]
    elif scheduler and not same:
        lines = [
            "the learning-rate schedule has values by the position of groups, and they are others "
            "(load_lr_scheduler_states=False leaves it out)"
        ]
    else:
        lines = []
    if lines:
        raise CheckpointMismatchError(
            f"{load_dir} is a universal checkpoint of other groups: {lines[0]}. {_OUTCOME} Load it "
            "into the groups that it was made from; save_checkpoint then writes a checkpoint that "
            'protect_checkpoints(engine, regroup="auto") converts while loading.',
            lines,
        )
    yield
    if not same:
        warn(
            f"{load_dir} is a universal checkpoint of other groups: the groups keep the options "
            "that they were given, such as lr, and not those that were saved.",
            CheckpointWarning,
        )
        for group, options in zip(engine.optimizer.param_groups, own, strict=True):
            for key in [key for key in group if key != "params"]:
                del group[key]
            group.update(options)


def _saved_names(load_dir: Path, tag: object) -> list[str | None] | None:
    """Of the groups in the checkpoint; None where no file says which one is the latest."""
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
    return [group.get("name") for group in groups]
