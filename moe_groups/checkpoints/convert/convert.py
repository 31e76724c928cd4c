"""Convert the optimizer states of a checkpoint from one grouping to another, offline."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_groups._common.arguments import FilePath, Positive, checked
from moe_groups._common.own_folder import finished_file, own
from moe_groups._common.progress import Progress
from moe_groups.checkpoints.convert.job import Job
from moe_groups.checkpoints.convert.model import regroup_lists
from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.convert.target import (
    TrainedSince,
    check_parameters,
    read_target,
    size_in_groups,
)
from moe_groups.checkpoints.convert.workdir import Unfinished, writing
from moe_groups.checkpoints.files import (
    LATEST,
    SCHEDULER_FILES,
    check_whole,
    find_checkpoint,
    list_saved,
)
from moe_groups.checkpoints.kept_state import Kept
from moe_groups.checkpoints.layout import Layout
from moe_groups.checkpoints.manifest import FILE_NAME, Manifest, read_manifest, write_manifest
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.checkpoints.torch_file import read_torch_file, save

_WORKERS = 4


@dataclass(frozen=True, slots=True)
class Regrouped:
    """What :func:`regroup_checkpoint` did.

    Attributes:
        destination: the new checkpoint.
        files: number of files in it.
        bytes: of all files.
        seconds: that it took.
        since: names of parameters that only one of the two runs trains: ``since.dropped`` and
            ``since.fresh``.
    """

    destination: Path
    files: int
    bytes: int
    seconds: float
    since: TrainedSince


@checked
def regroup_checkpoint(
    source: FilePath,
    destination: FilePath,
    to: FilePath | Layout | None = None,
    *,
    max_group_size: Positive | None = None,
    ep_size: Positive | None = None,
    tag: str | None = None,
    workers: Positive | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> Regrouped:
    """Convert a checkpoint of ZeRO-1, ZeRO-2 or BF16_Optimizer to other groups.

    Needs no GPU and no process group. Master weights and optimizer state stay bit-equal for each
    parameter; hyperparameters, loss scaler, counters and the learning-rate schedule are kept. The
    number of data-parallel ranks may change too, where ``to`` says so, and the ``ep_size`` of
    DeepSpeed's MoE layers. All files are compared with the CRC-32 that they state for their bytes
    before they are converted or copied. Each worker makes one file of optimizer states in memory:
    the conversion needs the largest of the new files times the workers.

    Args:
        source: what ``load_checkpoint`` is given; it is only read.
        destination: a directory that does not exist yet. It appears when everything is written;
            until then the files are in ``<destination>.incomplete``, where the same call continues
            after it was stopped.
        to: the new groups: a file that a refused load wrote, a ``moe_groups.json``, a checkpoint
            that has one; or "stock" (DeepSpeed's split), "parallel_group", "module" or "expert"
            for what :func:`create_moe_param_groups` would make with it. A name needs a source
            whose ``moe_groups.json`` says what its groups were made from (schema 2). None, with
            ``ep_size``: the groups as they are.
        max_group_size: cap in elements, for a name.
        ep_size: of DeepSpeed's MoE layers in the new run, for a name; None for that of
            the checkpoint. Each expert keeps its state and hyperparameters on its new ranks.
        tag: of the checkpoint; None for the one in the file ``latest``.
        workers: threads; None for four. With fewer the conversion needs less memory.
        trust: read objects of any class, as DeepSpeed does when it loads, which can run any code of
            the checkpoint's author. Without, a checkpoint with such objects is refused.
        progress: called with bytes done and bytes in all, from any thread. Optimizer states count
            twice, when they are compared and when they are written.

    Raises:
        InvalidArgumentError: ``workers`` is less than 1, there is neither ``to`` nor ``ep_size``,
            or ``ep_size`` does not divide the data-parallel ranks.
        CheckpointError: the source is incomplete or damaged, the new groups do not fit it or
            cannot be made from what it says, groups with different hyperparameters would become
            one, the destination is there already, or the disk is full. The source is whole, and
            no destination is there.

    Example:
        >>> regroup_checkpoint("run/checkpoints", "run/regrouped", "expert")  # doctest: +SKIP
    """
    start = time.monotonic()
    files = find_checkpoint(source, tag, trust)
    check_whole(files)
    layout = read_layout(files)
    target = read_target(to, files, layout, max_group_size, ep_size)
    regroup_source = RegroupSource(files, layout)
    since = check_parameters(regroup_source, target)
    copied = [*files.others(), *files.beside()]
    size = size_in_groups(files, layout, target) + sum(path.stat().st_size for path in copied)
    with Unfinished(files, Path(destination), target, size) as work:
        job = Job(files, regroup_source, target, work.path)
        job.run(workers or _WORKERS, progress)
        with writing(work.path):
            _finish(job)
        work.publish()
    sizes = [path.stat().st_size for path in work.destination.rglob("*") if path.is_file()]
    seconds = time.monotonic() - start
    return Regrouped(Path(destination), len(sizes), sum(sizes), seconds, since)


def _finish(job: Job) -> None:
    """Write what makes the folder a checkpoint."""
    files, directory = job.files, job.directory
    about: dict[str, Any] = {}
    kept: Kept | None = None
    wrapper = job.source.shard(min(job.source.layout.order)).wrapper
    if files.manifest.is_file():
        saved = read_manifest(files.manifest)
        about, wrapper, kept = dict(saved.about), saved.wrapper, saved.optimizer
    about["converted_from"] = str(files.folder.resolve())
    write_manifest(
        Manifest(job.target, wrapper, about, list_saved(job.folder), kept),
        own(directory, job.folder / FILE_NAME),
    )
    for path in files.beside():
        with finished_file(directory / path.name, directory) as part:
            if path.match(SCHEDULER_FILES):
                content = read_torch_file(path, files.trust)
                regroup_lists(job.source, job.target, min(files.models), content)
                save(content, part)
            else:
                shutil.copy(path, part)
    if not (directory / LATEST).is_dir():  # the tag of some trainers
        with finished_file(directory / LATEST, directory) as part:
            part.write_text(files.tag)
