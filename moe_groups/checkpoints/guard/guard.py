"""Checkpoints that say what their groups were, and are not loaded into other groups."""

import contextlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import distributed

from moe_groups._common.arguments import FilePath, checked
from moe_groups._common.own_folder import is_plain
from moe_groups._common.ranks import on_all_ranks
from moe_groups._common.warn import warn
from moe_groups._deepspeed.checkpoints import (
    check_biases,
    checkpoint_tag,
    loads_weights_by_position,
    stage_weights_file,
    weights_alone,
    writes_later,
)
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups._deepspeed.engines import (
    Engine,
    SteppingEngine,
    refresh_master_weights,
    wrapper_name,
)
from moe_groups.checkpoints.files import check_tag, list_files, list_saved, read_latest
from moe_groups.checkpoints.guard.engine_layout import describe_run, gather_layout, with_options_of
from moe_groups.checkpoints.guard.saving import announce, mark_finished, mark_unfinished
from moe_groups.checkpoints.layout import Layout
from moe_groups.checkpoints.manifest import FILE_NAME, UNFINISHED, write_manifest
from moe_groups.checkpoints.torch_file import read_torch_file
from moe_groups.errors import CheckpointError, CheckpointWarning, MoEGroupsError
from moe_groups.tags import LABELS

Regroup: TypeAlias = Literal["refuse", "auto", "off"]


@dataclass(slots=True)
class Guard:
    """What is done with the checkpoints of an engine.

    Attributes:
        regroup: see :func:`protect_checkpoints`.
        scratch_dir: where a converted checkpoint is kept while it is loaded.
        check_data: compare the bytes of a checkpoint with their CRC-32 before it is loaded.
        own_schedules: who loads fits a schedule beside a converted checkpoint to the groups.
        layout: of all ranks, on the ranks that write it; gathered at the first save.
    """

    regroup: Regroup = "refuse"
    scratch_dir: Path | None = None
    check_data: bool = False
    own_schedules: bool = False
    layout: Layout | None = None
    gathered: bool = False


GUARDS: "weakref.WeakKeyDictionary[Engine, Guard]" = weakref.WeakKeyDictionary()
"""Of each engine whose checkpoints are guarded."""


@checked
def protect_checkpoints(
    engine: SteppingEngine,
    *,
    regroup: Regroup = "refuse",
    scratch_dir: FilePath | None = None,
    check_data: bool = False,
) -> None:
    """Choose what happens to the engine's checkpoints; all ranks make the same call.

    After a call of :func:`create_moe_param_groups` every engine that is initialized is protected
    with "refuse", also under HF Trainer and Lightning. This call protects an engine with
    DeepSpeed's own split too.

    A protected engine writes ``moe_groups.json`` beside DeepSpeed's files when it saves. When it
    loads, every rank compares what the checkpoint says about its groups with the groups that it
    has, before DeepSpeed reads anything.

    Args:
        engine: what ``deepspeed.initialize`` returned first.
        regroup: what to do with a checkpoint of other groups: "refuse" raises; "auto" converts it
            first, each rank its own part, where all ranks reach the files, also to another number
            of ranks or another ``ep_size`` of DeepSpeed's MoE layers; "off" compares nothing, and
            DeepSpeed loads by position.
        scratch_dir: for "auto": where the converted checkpoint is kept while it is loaded; all
            ranks must see it. None: beside the checkpoint.
        check_data: before a checkpoint is loaded, read all of its files once, each rank its share,
            and compare them with the CRC-32 that they state: one changed bit is refused. Without,
            only the metadata of the files is read.

    Raises:
        InvalidArgumentError: not an engine with an optimizer, or no such ``regroup``.

    Example:
        >>> protect_checkpoints(engine, regroup="auto")                   # doctest: +SKIP
        >>> engine.load_checkpoint("checkpoints")                         # doctest: +SKIP
    """
    support_our_groups(moe=True)
    scratch = None if scratch_dir is None else Path(scratch_dir)
    GUARDS[engine] = Guard(regroup, scratch, check_data)


def guard_from_now_on(engine: Engine) -> None:
    """Guard the checkpoints of an engine that is initialized over our groups."""
    GUARDS.setdefault(engine, Guard())


def guarded_save(engine: Engine, save: Callable[..., Any], given: dict[str, Any]) -> Any:
    """DeepSpeed's ``save_checkpoint`` with all of its arguments, and our file beside its files."""
    guard = GUARDS.get(engine)
    if guard is not None and guard.regroup == "off":
        guard = None
    save_dir = given["save_dir"]
    if not save_dir:
        return save(**given)
    given["tag"] = tag = checkpoint_tag(engine, given["tag"])
    folder, writes = Path(save_dir) / tag, _writes(engine)
    if guard is not None:
        on_all_ranks(lambda: check_tag(tag))
    if guard is None or writes_later(engine):
        if writes and is_plain(tag):  # what an older save said of this folder no longer holds
            for name in (FILE_NAME, UNFINISHED):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
        if guard is None:
            return save(**given)
        return _save_decoupled(engine, guard, folder, lambda: save(**given))
    layout, problems = _layout(engine, guard)
    announces = given["save_latest"] and distributed.get_rank() == 0
    given["save_latest"] = False  # DeepSpeed does not wait for the other ranks
    on_all_ranks(lambda: mark_unfinished(folder) if writes else None)
    result = save(**given)
    if layout is not None and writes:
        problems += _write(engine, layout, folder, finished=True)
    on_all_ranks(lambda: mark_finished(folder) if writes else None)
    on_all_ranks(lambda: announce(Path(save_dir), tag) if announces else None)
    _warn(problems)
    return result


def _save_decoupled(engine: Engine, guard: Guard, folder: Path, save: Callable[[], Any]) -> Any:
    """Save with a checkpoint engine that goes on writing after the call."""
    layout, problems = _layout(engine, guard)
    result = save()
    if layout is not None and _writes(engine):
        problems += _write(engine, layout, folder, finished=False)
    distributed.barrier()
    _warn(problems)
    return result


def _writes(engine: Engine) -> bool:
    """Does this rank write the file?"""
    rank = engine.local_rank if engine.use_node_local_storage() else distributed.get_rank()
    return bool(rank == 0)


def _layout(engine: Engine, guard: Guard) -> tuple[Layout | None, list[str]]:
    """Of all ranks, on the ranks that write it, and what is to be warned of.

    No rank raises: DeepSpeed can save without a layout.
    """
    problems = []
    if not guard.gathered:
        guard.gathered = True
        try:
            guard.layout = gather_layout(engine)
        except CheckpointError as error:
            problems.append(f"{FILE_NAME} is not written, as {str(error).rstrip('.')}{_WITHOUT}")
        if engine.use_node_local_storage():
            box = [guard.layout]
            distributed.broadcast_object_list(box)
            guard.layout = box[0]
    return guard.layout, problems


def _write(engine: Engine, layout: Layout, folder: Path, finished: bool) -> list[str]:
    """Write the manifest of a checkpoint; what is to be warned of once all ranks have saved.

    Args:
        finished: all files are there, and are listed.
    """
    problems = []
    try:
        manifest = describe_run(engine, with_options_of(engine, layout))
        if finished:
            manifest = replace(manifest, files=list_saved(folder))
        write_manifest(manifest, folder / FILE_NAME)
        if finished and manifest.wrapper != "ZeRO-3":  # which writes a file of weights a rank
            problems += _missing_weights(layout, folder)
    # Options of groups may be of any class. DeepSpeed's files are complete, and the other ranks
    # wait for this one, so that even a bug of ours must not end the save; it is named.
    except Exception as error:
        named = "" if isinstance(error, MoEGroupsError | OSError) else f"{type(error).__name__}: "
        problems.append(
            f"{folder} was saved, but {FILE_NAME} could not be written ({named}{error}){_WITHOUT}"
        )
    return problems


_WITHOUT = ": the checkpoint can be loaded and converted as one of a run without moe-groups."


def _missing_weights(layout: Layout, folder: Path) -> list[str]:
    """DeepSpeed saves dense weights on ranks that are first among those that share experts."""
    try:
        saved = list_files(folder.parent, folder.name).models
    except OSError as error:
        return [
            f"{folder} was saved, but cannot be listed ({error}): see that its files are there."
        ]
    missing = [rank for rank in layout.model_ranks if rank not in saved]
    if not missing:
        return []
    return [
        f"DeepSpeed wrote no weights of the model-parallel rank(s) {missing} into {folder} "
        "(mp_rank_*_model_states.pt), as tensor-parallel ranks share all experts: the checkpoint "
        "cannot be loaded. Use an ep_size that is a multiple of the tensor-parallel size."
    ]


def _warn(problems: list[str]) -> None:
    for problem in problems:
        warn(problem, CheckpointWarning)


def guarded_load(engine: Engine, load: Callable[..., Any], given: dict[str, Any]) -> Any:
    """DeepSpeed's ``load_checkpoint`` for a checkpoint that was saved with the same groups."""
    guard = GUARDS.get(engine)
    if guard is None or guard.regroup == "off":
        return load(**given)
    optimizer, scheduler = _loads_optimizer(engine, given), _loads_scheduler(engine, given)
    if engine.load_universal_checkpoint() and engine.zero_optimization():
        from moe_groups.checkpoints.guard.universal import checked_universal

        names, folder = _names(engine), Path(given["load_dir"])
        with checked_universal(
            engine,
            folder,
            given["tag"],
            optimizer=optimizer,
            scheduler=scheduler,
            strict=given["load_module_strict"],
        ):
            result = load(**given)
        _restore_names(engine, names)
        return result
    _check_loads_weights(engine, given)
    from moe_groups.checkpoints.guard.check import checked

    names = _names(engine) if optimizer else []
    load_dir, tag = given["load_dir"], given["tag"]
    convert, tag = guard.regroup == "auto", None if tag is None else str(tag)
    folder = Path(load_dir)
    with checked(
        engine,
        folder,
        tag,
        optimizer=optimizer,
        by_position=optimizer or scheduler or loads_weights_by_position(engine),
        client=given["load_lr_scheduler_states"] and not given["load_module_only"],
        data=guard.check_data,
        convert=convert,
        own_schedules=guard.own_schedules,
        scratch_dir=guard.scratch_dir,
    ) as directory:
        given["load_dir"] = str(directory)
        if given["load_module_strict"]:
            on_all_ranks(lambda: _check_stage_biases(engine, Path(directory), tag))
        path, client_state = load(**given)
    if optimizer:
        _restore_names(engine, names)
    elif path is not None and not engine.zero_optimization():
        # Of other wrappers DeepSpeed refreshes them after load_module_only alone.
        refresh_master_weights(engine)
    if path is not None:  # of the converted checkpoint, which is gone
        path = str(path).replace(str(directory), str(load_dir), 1)
    return path, client_state


def _check_loads_weights(engine: Engine, given: Mapping[str, Any]) -> None:
    """Refuse a call with which DeepSpeed would load no weights, without an error."""
    alone = weights_alone(wrapper_name(engine))
    nothing = given["load_module_only"] and given["load_optimizer_states"]
    if nothing and alone != "load_module_only=True" and not loads_weights_by_position(engine):
        raise CheckpointError(
            "load_module_only=True loads no weights under ZeRO-3, which keeps them in the "
            f"optimizer's partitions. Nothing was loaded: give {alone}, which loads the weights "
            "alone, into fresh optimizer state."
        )


def _check_stage_biases(engine: Engine, load_dir: Path, tag: str | None) -> None:
    """Refuse biases of experts before another stage of a pipeline, without experts, has loaded."""
    tag = tag or read_latest(load_dir)
    path = None if tag is None else stage_weights_file(engine, load_dir, tag)
    if path is not None:
        weights = read_torch_file(path, trust=True).get("module")
        check_biases(engine.module, weights if isinstance(weights, dict) else {})


def _loads_optimizer(engine: Engine, given: Mapping[str, Any]) -> bool:
    """Does this call put optimizer state into groups?"""
    return bool(
        given["load_optimizer_states"]
        and not given["load_module_only"]
        and hasattr(engine.optimizer, "param_groups")
    )


def _loads_scheduler(engine: Engine, given: Mapping[str, Any]) -> bool:
    """Does this call put values of groups into a scheduler, which has them by position?"""
    if given["load_module_only"] or not given["load_lr_scheduler_states"]:
        return False
    if not hasattr(engine.lr_scheduler, "state_dict"):
        return False
    from moe_groups.checkpoints.convert.model import SCHEDULER, group_lists

    groups = len(getattr(engine.optimizer, "param_groups", ()))
    return bool(group_lists({SCHEDULER: engine.lr_scheduler.state_dict()}, groups))


_NAMES = ("name", *LABELS, "decoupled_weight_decay")
"""What belongs to the run: labels, and what makes Adam of torch's AdamW or the reverse."""


def _names(engine: Engine) -> list[dict[str, Any]]:
    groups = engine.optimizer.param_groups
    return [{key: group[key] for key in _NAMES if key in group} for group in groups]


def _restore_names(engine: Engine, names: list[dict[str, Any]]) -> None:
    """DeepSpeed takes all options from the checkpoint; the run's own names are registered."""
    for group, own in zip(engine.optimizer.param_groups, names, strict=True):
        for key in _NAMES:
            group.pop(key, None)
        group.update(own)
