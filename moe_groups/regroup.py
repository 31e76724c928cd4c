"""Convert the optimizer states of a checkpoint from one grouping to another, offline."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from moe_groups.checkpoint_files import LATEST, CheckpointFiles, find_checkpoint, shard_name
from moe_groups.checkpoint_source import read_layout
from moe_groups.copying import Copier, Sums
from moe_groups.errors import CheckpointError
from moe_groups.flat_layout import Layout, Rank
from moe_groups.manifest import FILE_NAME, Manifest, read_manifest, write_manifest
from moe_groups.regroup_model import write_model
from moe_groups.regroup_shard import new_shard, write_shard
from moe_groups.regroup_source import RegroupSource
from moe_groups.regroup_target import check_same_parameters, read_target
from moe_groups.unfinished import Unfinished, finished_file

Report: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_TARGETS = "moe_groups_*.json"


@dataclass(frozen=True, slots=True)
class Regrouped:
    """What :func:`regroup_checkpoint` did.

    Attributes:
        destination: the new checkpoint.
        files: number of files in it.
        bytes: of all files.
        seconds: that it took.
    """

    destination: Path
    files: int
    bytes: int
    seconds: float


def regroup_checkpoint(
    source: str | Path,
    destination: str | Path,
    to: str | Path | Layout,
    *,
    max_group_size: int | None = None,
    tag: str | None = None,
    workers: int | None = None,
    progress: Report | None = None,
) -> Regrouped:
    """Write a checkpoint of ZeRO-1, ZeRO-2 or BF16_Optimizer anew, in other groups.

    Needs no GPU and no process group. Master weights and optimizer state stay bit-equal for each
    parameter; hyperparameters, loss scaler, counters and the learning-rate schedule are kept. The
    number of data-parallel ranks may change too, where ``to`` says so. Bytes go from file to file
    through a buffer of 4 MiB for each worker; what the files state about their bytes (CRC-32) is
    checked on the way. Unpickles, as DeepSpeed does: only for checkpoints that you trust.

    Args:
        source: what ``load_checkpoint`` is given; it is only read.
        destination: a directory that does not exist yet. It appears when everything is written;
            until then the work is in ``<destination>.incomplete``, where the same call goes on
            after it was stopped.
        to: the new groups: a file that a refused load wrote, a ``moe_groups.json``, a checkpoint
            that has one, or "stock" (DeepSpeed's split), "parallel_group", "module" or "expert" for
            what :func:`create_moe_param_groups` would make with it.
        max_group_size: cap in elements, for a name.
        tag: of the checkpoint; None for the one in the file ``latest``.
        workers: threads; None for four.
        progress: called with bytes done and bytes in all, from any thread.

    Raises:
        CheckpointError: the source is incomplete or damaged, the new groups do not fit it, groups
            with different hyperparameters would become one, the destination is there already, or
            the disk is full. The source is whole, and no destination is there.

    Example:
        >>> regroup_checkpoint("run/checkpoints", "run/regrouped", "expert")  # doctest: +SKIP
    """
    start = time.monotonic()
    files = find_checkpoint(source, tag)
    layout = read_layout(files)
    target = read_target(to, files, layout, max_group_size)
    check_same_parameters(layout, target)
    with Unfinished(files, Path(destination), target) as work:
        job = _Job(files, RegroupSource(files, layout), target, work.path / files.tag)
        job.run(workers or 4, progress or (lambda done, total: None))
        _finish(job, work.path)
        work.publish()
    sizes = [path.stat().st_size for path in Path(destination).rglob("*") if path.is_file()]
    return Regrouped(Path(destination), len(sizes), sum(sizes), time.monotonic() - start)


@dataclass(slots=True)
class _Job:
    files: CheckpointFiles
    source: RegroupSource
    target: Layout
    folder: Path
    sums: Sums = field(default_factory=Sums)
    stopped: threading.Event = field(default_factory=threading.Event)

    def run(self, workers: int, report: Report) -> None:
        """Write all files that are not written yet."""
        self.folder.mkdir(exist_ok=True)
        tasks = list(self._tasks())
        total = sum(size for _, size, _ in tasks)
        meter = _Meter(report, total, self.stopped)
        pool = ThreadPoolExecutor(workers)
        try:
            futures = [pool.submit(self._do, task, meter) for task in tasks]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            checks = [pool.submit(self._check, path) for path in self._read_files()]
            for future in checks:
                future.result()
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)

    def _tasks(self) -> Iterator[tuple[Path, int, Callable[[Path, Copier], None]]]:
        like = next(iter(self.files.shards.values()))
        share = sum(path.stat().st_size for path in self.files.shards.values())
        for rank in sorted(self.target.order):
            size = share // len(self.target.order)
            yield self.folder / shard_name(like, rank), size, partial(self._shard, rank)
        for model, path in self.files.models.items():
            yield self.folder / path.name, path.stat().st_size, partial(self._model, model)
        for path in self.files.others():
            place = self.folder / path.relative_to(self.files.folder)
            yield place, path.stat().st_size, partial(_copy, path)

    def _do(self, task: tuple[Path, int, Callable[[Path, Copier], None]], meter: "_Meter") -> None:
        path, size, write = task
        if path.exists():  # from before the conversion was stopped
            meter.add(size)
            return
        counted = 0

        def progress(count: int) -> None:
            nonlocal counted
            step = min(count, size - counted)  # sizes were estimated
            counted += step
            meter.add(step)

        copier = Copier(self.sums, progress)
        try:
            with finished_file(path) as part:
                write(part, copier)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror}. What is there already is kept: make "
                "room and call again, or remove it."
            ) from error
        finally:
            copier.close()
        meter.add(size - counted)

    def _shard(self, rank: Rank, path: Path, copier: Copier) -> None:
        write_shard(new_shard(self.source, self.target, rank), path, copier)

    def _model(self, model: int, path: Path, copier: Copier) -> None:
        self.sums.check(self.files.models[model], copier)
        write_model(self.source, self.target, model, path)

    def _read_files(self) -> list[Path]:
        return list(self.files.shards.values())

    def _check(self, path: Path) -> None:
        copier = Copier(self.sums, _Meter(lambda done, total: None, 0, self.stopped).add)
        try:
            self.sums.check(path, copier)
        finally:
            copier.close()


def _copy(source: Path, path: Path, copier: Copier) -> None:
    copier.copy_file(source, path)


class _Meter:
    """Adds up what all threads wrote, and ends them when one of them failed."""

    def __init__(self, report: Report, total: int, stopped: threading.Event) -> None:
        self.report, self.total, self.stopped = report, total, stopped
        self.done = 0
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        if self.stopped.is_set():
            raise CheckpointError("the conversion was stopped.")
        with self.lock:
            self.done += count
            self.report(self.done, self.total)


def _finish(job: _Job, directory: Path) -> None:
    """Write what makes the folder a checkpoint."""
    files = job.files
    sizes = {
        str(path.relative_to(job.folder)): path.stat().st_size
        for path in sorted(job.folder.rglob("*"))
        if path.is_file() and path.name != FILE_NAME
    }
    about: dict[str, Any] = {}
    wrapper = "ZeRO or BF16_Optimizer"
    if files.manifest.is_file():
        saved = read_manifest(files.manifest)
        about, wrapper = dict(saved.about), saved.wrapper
    about["converted_from"] = str(files.folder.resolve())
    write_manifest(Manifest(job.target, wrapper, about, sizes), job.folder / FILE_NAME)
    if (files.directory / LATEST).is_file():  # beside it: what a trainer keeps there
        for path in files.directory.iterdir():
            if path.is_file() and path.name != LATEST and not path.match(_TARGETS):
                copier = Copier(Sums(), lambda count: None)
                with finished_file(directory / path.name) as part:
                    copier.copy_file(path, part)
                copier.close()
    with finished_file(directory / LATEST) as part:
        part.write_text(files.tag)
