"""Checkpoints that say what their groups were, and are not loaded into other groups."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import distributed

from moe_groups import _deepspeed
from moe_groups.arguments import check_one_of
from moe_groups.checkpoint_files import LATEST
from moe_groups.engine_layout import LABELS, describe_run, gather_layout
from moe_groups.errors import CheckpointWarning, InvalidArgumentError
from moe_groups.flat_layout import Layout
from moe_groups.manifest import FILE_NAME, Manifest, write_manifest

Regroup: TypeAlias = Literal["refuse", "auto", "off"]


@dataclass(slots=True)
class Guard:
    """What is done with the checkpoints of an engine.

    Attributes:
        regroup: see :func:`protect_checkpoints`.
        scratch_dir: where a converted checkpoint is kept while it is loaded.
        layout: of all ranks, on the ranks that write it; gathered at the first save.
    """

    regroup: Regroup = "refuse"
    scratch_dir: Path | None = None
    layout: Layout | None = None
    gathered: bool = False


def protect_checkpoints(
    engine: Any, *, regroup: Regroup = "refuse", scratch_dir: str | Path | None = None
) -> None:
    """Choose what happens to the engine's checkpoints; all ranks call it alike.

    Engines that are initialized after :func:`create_moe_param_groups` was called are protected
    with "refuse" without a call, whoever saves and loads (HF Trainer, Lightning). Another
    engine, over DeepSpeed's own split, becomes so with this call.

    A protected engine writes ``moe_groups.json`` beside DeepSpeed's files when it saves. When it
    loads, every rank compares what the checkpoint says about its groups with the groups that it
    has, before DeepSpeed reads anything.

    Args:
        engine: what ``deepspeed.initialize`` returned first.
        regroup: what to do with a checkpoint of other groups: "refuse" raises; "auto" converts it
            first, each rank its own part, where all ranks reach the files; "off" leaves all to
            DeepSpeed, which loads by position.
        scratch_dir: for "auto": where the converted checkpoint is kept while it is loaded; all
            ranks must see it. None: beside the checkpoint.

    Raises:
        InvalidArgumentError: not an engine with an optimizer, or no such ``regroup``.

    Example:
        >>> protect_checkpoints(engine, regroup="auto")                   # doctest: +SKIP
        >>> engine.load_checkpoint("checkpoints")                         # doctest: +SKIP
    """
    check_one_of("regroup", regroup, ("refuse", "auto", "off"))
    if not _deepspeed.is_engine(engine) or not hasattr(engine.optimizer, "param_groups"):
        raise InvalidArgumentError(
            "protect_checkpoints takes an engine that deepspeed.initialize made with an optimizer, "
            f"not {type(engine).__name__}."
        )
    _deepspeed.support_our_groups(moe=True)
    guard = Guard(regroup, None if scratch_dir is None else Path(scratch_dir))
    _deepspeed.set_guard(engine, guard)


def guarded_save(
    engine: Any, save: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """DeepSpeed's ``save_checkpoint``, with our file beside its files."""
    guard: Guard | None = _deepspeed.guard_of(engine)
    call = inspect.signature(save).bind(*args, **kwargs)
    save_dir = call.arguments.get("save_dir")
    if guard is None or guard.regroup == "off" or not save_dir:
        return save(*args, **kwargs)
    call.arguments["tag"] = tag = _deepspeed.checkpoint_tag(engine, call.arguments.get("tag"))
    folder = Path(save_dir) / tag
    manifest = _manifest(engine, guard)
    if manifest is not None:  # that of a checkpoint of the same name, which is written over now
        (folder / FILE_NAME).unlink(missing_ok=True)
    result = save(*call.args, **call.kwargs)
    if manifest is not None:
        try:
            write_manifest(_with_files(engine, manifest, folder), folder / FILE_NAME)
        except OSError as error:
            warnings.warn(
                f"{folder} was saved, but {FILE_NAME} could not be written ({error.strerror}): the "
                "checkpoint can be loaded and converted as one of a run without moe-groups.",
                CheckpointWarning,
                stacklevel=2,
            )
    distributed.barrier()
    return result


def _manifest(engine: Any, guard: Guard) -> Manifest | None:
    """What to write, on the ranks that write it."""
    local = engine.use_node_local_storage()
    if not guard.gathered:
        guard.layout = gather_layout(engine)
        if local:
            box = [guard.layout]
            distributed.broadcast_object_list(box)
            guard.layout = box[0]
        guard.gathered = True
    writes = (engine.local_rank if local else distributed.get_rank()) == 0
    if not writes or guard.layout is None:
        return None
    return describe_run(engine, guard.layout)


def _with_files(engine: Any, manifest: Manifest, folder: Path) -> Manifest:
    if engine.checkpoint_engine.is_decoupled():  # it is still writing
        return manifest
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != FILE_NAME
    }
    return Manifest(manifest.layout, manifest.wrapper, manifest.about, files)


def guarded_load(
    engine: Any, load: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """DeepSpeed's ``load_checkpoint`` for a checkpoint that was saved with the same groups."""
    guard: Guard | None = _deepspeed.guard_of(engine)
    call = inspect.signature(load).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    tag = _tag(given["load_dir"], given["tag"])
    if guard is None or guard.regroup == "off" or tag is None or not _loads_state(engine, given):
        return load(*args, **kwargs)
    from moe_groups.checkpoint_check import checked

    names = _names(engine)
    load_dir = given["load_dir"]
    with checked(engine, guard, Path(load_dir), tag) as directory:
        given["load_dir"] = str(directory)
        path, client_state = load(*call.args, **call.kwargs)
    _restore_names(engine, names)
    if path is not None:  # of the converted checkpoint, which is gone
        path = str(path).replace(str(directory), str(load_dir), 1)
    return path, client_state


def _tag(load_dir: Any, tag: object) -> str | None:
    """The tag that DeepSpeed will load; None where it finds none and says so itself."""
    latest = Path(load_dir) / LATEST
    if tag is not None:
        return str(tag)
    return latest.read_text().strip() if latest.is_file() else None


def _loads_state(engine: Any, given: Mapping[str, Any]) -> bool:
    """Does this call put optimizer state into groups?"""
    return bool(
        given["load_optimizer_states"]
        and not given["load_module_only"]
        and not engine.load_universal_checkpoint()
        and hasattr(engine.optimizer, "param_groups")
    )


def _names(engine: Any) -> list[dict[str, Any]]:
    keys = ("name", *LABELS)
    return [{k: group[k] for k in keys if k in group} for group in engine.optimizer.param_groups]


def _restore_names(engine: Any, names: list[dict[str, Any]]) -> None:
    """DeepSpeed takes the names from the checkpoint; those of the run are registered."""
    for group, own in zip(engine.optimizer.param_groups, names, strict=True):
        for key in LABELS:
            group.pop(key, None)
        group.update(own)
