"""Before a checkpoint is loaded: were its groups those that the engine has?"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import distributed

from moe_groups._common.ranks import on_all_ranks
from moe_groups._common.warn import warn
from moe_groups._deepspeed.checkpoints import (
    checkpoint_rank,
    experts_optimizer_file,
    weights_alone,
)
from moe_groups._deepspeed.engines import Engine, wrapper_name
from moe_groups.checkpoints.convert.model import SCHEDULER, group_lists
from moe_groups.checkpoints.files import (
    LATEST,
    CheckpointFiles,
    check_tag,
    check_whole,
    find_checkpoint,
    no_such_tag,
    read_latest,
)
from moe_groups.checkpoints.guard.engine_layout import own_groups
from moe_groups.checkpoints.guard.refuse import refuse
from moe_groups.checkpoints.kept_state import Kept, compare_kept, kept_by, other_options
from moe_groups.checkpoints.layout import FlatGroup, Rank
from moe_groups.checkpoints.layout_diff import compare_groups
from moe_groups.checkpoints.manifest import FILE_NAME, Manifest, read_manifest
from moe_groups.checkpoints.shard import (
    WRAPPERS,
    option_names,
    read_shard,
    state_keys,
    step_of_shard,
)
from moe_groups.checkpoints.torch_file import check_crcs, read_torch_file
from moe_groups.errors import CheckpointError, CheckpointMismatchError, CheckpointWarning

_SHOWN = 8

Kind = Literal["same", "absent", "unknown", "other", "world"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rank sees.

    Attributes:
        kind: "same" (names may differ); "absent" (there is no such checkpoint; without a tag,
            DeepSpeed returns None); "unknown" (nothing says what the groups were); "other"
            groups; another "world".
        tag: of the checkpoint that this rank would load.
        step: of this rank's optimizer state.
        unstated: records that could not be compared, as they state no CRC-32.
        saved: the optimizer's state that this rank would load; None where nothing says it.
        options: names of the options in its groups; None where nothing says it.
    """

    kind: Kind
    tag: str | None = None
    step: float | None = None
    unstated: int = 0
    saved: Kept | None = None
    options: frozenset[str] | None = None


@contextlib.contextmanager
def checked(
    engine: Engine,
    load_dir: Path,
    tag: str | None,
    *,
    optimizer: bool,
    by_position: bool,
    client: bool,
    data: bool,
    convert: bool,
    own_schedules: bool,
    scratch_dir: Path | None,
) -> Iterator[Path]:
    """The directory to load from; all ranks enter together, and all raise if one has to.

    Args:
        optimizer: optimizer states are loaded too.
        by_position: something is loaded by the position of the groups: those, or a scheduler's.
        client: the caller may load schedules out of its own state in the checkpoint, which have
            values by the position of the groups too.
        data: compare the bytes of all files that are loaded with their CRC-32.
        convert: turn a checkpoint of other groups into one of the engine's, in ``scratch_dir``.
        own_schedules: the caller fits a schedule beside a converted checkpoint to its groups.

    Raises:
        CheckpointMismatchError: the checkpoint was saved with other groups, parameters or ranks.
        CheckpointError: it is damaged, or ranks do not see the same.
    """
    findings = on_all_ranks(
        lambda: _examine(engine, load_dir, tag, optimizer, by_position, client, data),
        "Nothing was loaded.",
    )
    if problem := _problem(load_dir, findings):
        raise CheckpointError(f"{problem} Nothing was loaded.")
    if findings[0].kind == "absent" and findings[0].tag is not None:
        raise no_such_tag(load_dir, findings[0].tag)
    if findings[0].tag is None and distributed.get_rank() == 0:
        warn(
            f"{load_dir} has no file {LATEST}: nothing is loaded, and load_checkpoint returns "
            "(None, None). Give the tag, or the directory that has that file.",
            CheckpointWarning,
        )
    where = f"{load_dir} ({findings[0].tag})"
    _check_optimizer(where, engine, findings)
    if unstated := sum(finding.unstated for finding in findings):
        warn(
            f"{unstated:,} records in {load_dir / str(findings[0].tag)} state no CRC-32 "
            "(torch.serialization.set_crc32_options), so nothing shows whether they changed.",
            CheckpointWarning,
        )
    kinds, tag = {finding.kind for finding in findings}, findings[0].tag
    if tag is not None and kinds & {"other", "world"}:
        refuse(engine, load_dir, tag, convert)
        if convert:
            from moe_groups.checkpoints.guard.convert_on_load import regrouped

            beside = not own_schedules
            with regrouped(engine, load_dir, tag, scratch_dir, beside) as directory:
                yield directory
            return
    if tag is not None and "unknown" in kinds:
        name = wrapper_name(engine)
        why = f"{name} does not write which parameters its groups hold"
        if name in WRAPPERS:
            why = "it has no optimizer states"
        warn(
            f"{load_dir / tag} has no {FILE_NAME}, and {why}: it is loaded by position, which is "
            "right only if the groups are the same.",
            CheckpointWarning,
        )
    yield load_dir


def _check_optimizer(where: str, engine: Engine, findings: list[Finding]) -> None:
    """Refuse state that the running optimizer does not keep, or keeps with another meaning."""
    optimizer, alone = engine.basic_optimizer, weights_alone(wrapper_name(engine))
    running = kept_by(optimizer)
    for finding in findings:
        saved = finding.saved
        if saved is None:
            continue
        verdict = compare_kept(saved, running)
        line = f"it was saved with the state of {saved}, the run has {running}"
        others = None
        if saved.by != running.by and finding.options is not None:
            others = other_options(saved.by, finding.options, optimizer)
        if others:
            verdict, line = "other", f"{line}; the options of its groups are {others}"
        if verdict == "other":
            message = (
                f"{where} was saved with another optimizer.\n  {line}\nNothing was loaded. "
                "Initialize with the optimizer of the checkpoint and its options, or load the "
                f"weights alone, into fresh optimizer state: {alone}."
            )
            raise CheckpointMismatchError(message, [line])
        if verdict == "unknown":
            warn(
                f"{where}: {line}. Whether the one can continue with the state of the other is not "
                f"known; if it cannot, load the weights alone: {alone}.",
                CheckpointWarning,
            )
            return


def _problem(load_dir: Path, findings: list[Finding]) -> str | None:
    """What keeps all ranks from loading, in a sentence; None if nothing does."""
    if len({finding.tag for finding in findings}) > 1:
        tags = [f"rank {rank}: {finding.tag!r}" for rank, finding in enumerate(findings)]
        return f"ranks would load different checkpoints of {load_dir} ({', '.join(tags[:_SHOWN])})."
    steps = {finding.step: rank for rank, finding in enumerate(findings)}
    if len(steps.keys() - {None}) > 1:
        saves = [f"rank {rank}'s after {step:g} steps" for step, rank in steps.items() if step]
        return (
            f"the optimizer states in {load_dir / str(findings[0].tag)} are of different saves "
            f"({', '.join(saves[:_SHOWN])}): a save over an older checkpoint was not finished. "
            "Use another tag."
        )
    absent = [rank for rank, finding in enumerate(findings) if finding.kind == "absent"]
    if absent and len(absent) < len(findings):
        ranks = ", ".join(map(str, absent[:_SHOWN]))
        return f"rank {ranks} of {len(findings)} ranks: {findings[0].tag} is not in {load_dir}."
    return None


def _examine(
    engine: Engine,
    load_dir: Path,
    tag: str | None,
    optimizer: bool,
    by_position: bool,
    client: bool,
    data: bool,
) -> Finding:
    """This rank's view.

    Raises:
        CheckpointError: a file is missing, damaged, or of another checkpoint.
    """
    if tag is None:
        tag = read_latest(load_dir)
    if tag is None:
        return Finding("absent")
    check_tag(tag)
    if not (load_dir / tag).is_dir():
        return Finding("absent", tag=tag)
    files = find_checkpoint(load_dir, tag, trust=True)
    share = _share(engine)
    check_whole(files, share, optimizer)
    unstated = sum(map(check_crcs, files.states(optimizer)[share])) if data else 0
    by_position = by_position or (client and _has_schedule(engine, files))
    found = _compare(engine, files, optimizer) if by_position else Finding("same")
    own = experts_optimizer_file(engine, load_dir, tag) if optimizer else None
    if own is not None and found.kind not in ("other", "world") and not own.is_file():
        raise CheckpointError(
            f"{own}, the optimizer states of rank {distributed.get_rank()}, is missing. Copy all "
            "files of the checkpoint again, or load the weights alone, into fresh optimizer "
            "state: load_module_only=True."
        )
    return replace(found, tag=tag, unstated=unstated)


def _has_schedule(engine: Engine, files: CheckpointFiles) -> bool:
    """Does the caller's state have lists with a value for each saved group?"""
    rank = Rank(*checkpoint_rank(engine))
    order = read_manifest(files.manifest).layout.order if files.manifest.is_file() else {}
    if rank not in order or rank.model not in files.models:
        return False
    content = read_torch_file(files.models[rank.model], files.trust)
    own = {key: value for key, value in content.items() if key != SCHEDULER}
    return any(found.known for found in group_lists(own, len(order[rank])))


def _share(engine: Engine) -> slice:
    """Of the files that ranks with one storage check together."""
    if engine.use_node_local_storage():
        return slice(engine.local_rank, None, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return slice(distributed.get_rank(), None, distributed.get_world_size())


def _compare(engine: Engine, files: CheckpointFiles, optimizer: bool) -> Finding:
    rank, running = own_groups(engine)
    # For a scheduler alone, the optimizer states need not be there.
    maps = wrapper_name(engine) in WRAPPERS and (optimizer or bool(files.shards))
    if files.manifest.is_file():
        manifest = read_manifest(files.manifest)
        found = _by_manifest(manifest, rank, running)
        if maps and found.kind == "same":
            found = _by_shard(files, rank, running)
        return replace(found, saved=manifest.optimizer or found.saved)
    return _by_shard(files, rank, running) if maps else Finding("unknown")


def _by_manifest(manifest: Manifest, rank: Rank, running: list[FlatGroup]) -> Finding:
    if rank not in manifest.layout.order:
        return Finding("world")
    saved = manifest.layout.of(rank)
    if compare_groups(saved, running).verdict not in ("same", "renamed"):
        return Finding("other")
    shared = all(a.ranks == b.ranks for a, b in zip(saved, running, strict=True))
    return Finding("same" if shared else "world")


def _by_shard(files: CheckpointFiles, rank: Rank, running: list[FlatGroup]) -> Finding:
    """Compare with what DeepSpeed's own file of this rank holds.

    Raises:
        CheckpointError: that file is missing, damaged, or not of this checkpoint.
    """
    if rank not in files.shards:
        if not files.shards or files.manifest.is_file():
            raise CheckpointError(
                f"{files.folder} has no optimizer state of data-parallel rank {rank.data} "
                f"(model-parallel rank {rank.model})."
            )
        return Finding("world")
    shard = read_shard(files.shards[rank], files.trust, elastic=True)
    found = Finding("other", saved=Kept(None, state_keys(shard)), options=option_names(shard))
    if shard.holds(rank, running):
        return replace(found, kind="same", step=step_of_shard(shard))
    if files.manifest.is_file():
        raise CheckpointError(
            f"{files.manifest} says that the groups are those of this run, but {shard.path.name} "
            "holds others: the files are not of one checkpoint."
        )
    return found
