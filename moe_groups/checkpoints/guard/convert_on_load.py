"""Convert a checkpoint while an engine loads it; each rank writes its own part."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from torch import distributed

from moe_groups._common.own_folder import own
from moe_groups._common.ranks import on_all_ranks, on_first_rank
from moe_groups._common.warn import warn
from moe_groups._deepspeed.checkpoints import checkpoint_rank
from moe_groups._deepspeed.engines import Engine
from moe_groups.checkpoints.convert.model import group_lists, regroup_lists, write_model
from moe_groups.checkpoints.convert.shard import new_shard
from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.convert.target import TrainedSince, check_parameters, size_in_groups
from moe_groups.checkpoints.convert.workdir import check_space
from moe_groups.checkpoints.files import (
    LATEST,
    SCHEDULER_FILES,
    STATES,
    CheckpointFiles,
    find_checkpoint,
    shard_name,
)
from moe_groups.checkpoints.guard.engine_layout import gather_layout
from moe_groups.checkpoints.layout import Layout, Rank
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.checkpoints.torch_file import check_crcs, read_torch_file, save
from moe_groups.errors import CheckpointError, CheckpointWarning


@contextlib.contextmanager
def regrouped(
    engine: Engine, load_dir: Path, tag: str, scratch_dir: Path | None, beside: bool
) -> Iterator[Path]:
    """A directory with the checkpoint in the engine's groups, while the context is open.

    All ranks enter and leave together. The weights of experts are links to the source.

    Args:
        beside: refuse a scheduler's file beside the checkpoint that would get other values.

    Raises:
        CheckpointError: on all ranks, if the checkpoint cannot be converted, or a rank does not
            reach the files.
    """
    gathered = gather_layout(engine)
    source, target, directory, since = on_first_rank(
        lambda: _begin(load_dir, tag, gathered, scratch_dir, beside), "Nothing was loaded."
    )

    def convert() -> None:
        try:
            _convert(engine, load_dir, tag, source, target, directory)
        except CheckpointError as error:
            rank = distributed.get_rank()
            raise CheckpointError(f"rank {rank}: {error}") from error

    try:
        on_all_ranks(convert, "Nothing was loaded.")
        if str(since) and distributed.get_rank() == 0:
            warn(f"converting {load_dir / tag}: {since}.", CheckpointWarning)
        yield directory
    finally:
        distributed.barrier()
        if distributed.get_rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)


def _begin(
    load_dir: Path, tag: str, target: Layout | None, scratch_dir: Path | None, beside: bool
) -> tuple[Layout, Layout, Path, TrainedSince]:
    assert target is not None
    files = find_checkpoint(load_dir, tag, trust=True)
    source = read_layout(files)
    regroup_source = RegroupSource(files, source)
    since = check_parameters(regroup_source, target)
    if beside:
        _check_beside(regroup_source, target)
    parent = load_dir if scratch_dir is None else scratch_dir
    directory = parent / f".moe_groups_{target.fingerprint()[:8]}_{uuid.uuid4().hex[:8]}"
    if directory.resolve().is_relative_to(files.folder.resolve()):
        raise CheckpointError(f"{parent} is inside of the checkpoint: give another scratch_dir.")
    try:
        own(directory, directory / tag).mkdir(parents=True)
        check_space(directory, size_in_groups(files, source, target))
        if not (directory / LATEST).is_dir():  # the tag of some trainers
            (directory / LATEST).write_text(tag)
        for path in files.others():
            link = own(directory, directory / tag / path.relative_to(files.folder))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    except (OSError, CheckpointError) as error:
        shutil.rmtree(directory, ignore_errors=True)
        why = f"{error.strerror}." if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{directory} cannot be written: {why} Give protect_checkpoints a scratch_dir that all "
            "ranks can write to, and that has room for the optimizer states."
        ) from error
    return source, target, directory, since


def _check_beside(source: RegroupSource, target: Layout) -> None:
    """Refuse schedulers that a trainer reads by itself, by position, once this load returned."""
    files = source.files
    for path in files.beside():
        if not path.match(SCHEDULER_FILES):
            continue
        content = read_torch_file(path, files.trust)
        lists = group_lists(content, len(source.layout.of(Rank(min(files.models), 0))))
        saved = [list(own.holder[own.key]) for own in lists]
        regroup_lists(source, target, min(files.models), content)
        if saved != [list(own.holder[own.key]) for own in lists]:
            raise CheckpointError(
                f"{path} has a value for each group of the checkpoint ({lists[0].where}), which "
                "Trainer and Accelerate load by position: they cannot be converted while loading. "
                "Convert the checkpoint and load the result (moe-groups regroup-checkpoint), or "
                "remove that file if nothing reads it."
            )


def _convert(
    engine: Engine, load_dir: Path, tag: str, layout: Layout, target: Layout, directory: Path
) -> None:
    """This rank's optimizer state, and on the first of each model-parallel rank the rest."""
    folder = directory / tag
    if not folder.is_dir():
        raise CheckpointError(
            f"this rank does not see {directory}: give protect_checkpoints a scratch_dir that all "
            "ranks share."
        )
    rank = Rank(*checkpoint_rank(engine))
    files = find_checkpoint(load_dir, tag, trust=True)
    source = RegroupSource(files, layout)
    try:
        for path in _checked_here(files, target, rank):
            read_torch_file(path, files.trust)  # torch has to be able to read experts' weights too
            check_crcs(path)
        like = next(iter(files.shards.values()))
        path = own(directory, folder / shard_name(like, rank))
        path.unlink(missing_ok=True)  # a link to a file of the source that is called so too
        save(new_shard(source, target, rank), path)
        if rank.data == 0 and rank.model in files.models:
            check_crcs(files.models[rank.model])
            write_model(source, target, rank.model, folder / files.models[rank.model].name)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}.") from error


def _checked_here(files: CheckpointFiles, target: Layout, rank: Rank) -> list[Path]:
    """Files of which this rank compares the bytes with their CRCs: all are somebody's."""
    ranks = target.data_parallel_size
    shards = [
        path
        for saved, path in files.shards.items()
        if saved.model == rank.model and saved.data % ranks == rank.data
    ]
    experts = [path for path in files.others() if path.name.endswith(STATES)]
    return shards + experts[sorted(target.order).index(rank) :: len(target.order)]
