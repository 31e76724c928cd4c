"""Write the files of a converted checkpoint, with threads that end when one of them fails."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

from moe_groups._common.own_folder import finished_file, own, remove_others
from moe_groups.checkpoints.convert.copying import Copier, Sums
from moe_groups.checkpoints.convert.model import write_model
from moe_groups.checkpoints.convert.shard import new_shard, shard_is_kept, write_shard
from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.convert.workdir import writing
from moe_groups.checkpoints.files import STATES, CheckpointFiles, shard_name
from moe_groups.checkpoints.layout import Layout, Rank
from moe_groups.checkpoints.torch_file import read_mapped
from moe_groups.errors import CheckpointError

Report: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Task(NamedTuple):
    """A file that is to be written.

    Attributes:
        path: its name.
        size: bytes, as estimated.
        write: writes it.
        is_kept: is there already what ``write`` would write?
    """

    path: Path
    size: int
    write: Callable[[Path, Copier], None]
    is_kept: Callable[[Path, Copier], bool] = lambda path, copier: False


@dataclass(slots=True)
class Job:
    """The files of the tag in new groups, without the manifest.

    Attributes:
        files: the source.
        source: reads it.
        target: the new groups.
        directory: what the checkpoint is written to; nothing else is in it.
    """

    files: CheckpointFiles
    source: RegroupSource
    target: Layout
    directory: Path
    sums: Sums = field(default_factory=Sums)
    stopped: threading.Event = field(default_factory=threading.Event)
    kept: list[Path] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the files of the tag are written."""
        return self.directory / self.files.tag

    def run(self, workers: int, report: Report) -> None:
        """Write all files; optimizer states that an earlier process wrote are kept if sound.

        Raises:
            CheckpointError: the source is damaged, or a file cannot be written.
        """
        by_path: dict[Path, Task] = {}
        for task in self._tasks():  # what is converted before what is copied
            by_path.setdefault(task.path, task)
        tasks = list(by_path.values())
        with writing(self.folder):
            remove_others(self.directory, {*by_path})
            self.folder.mkdir(parents=True, exist_ok=True)
        meter = _Meter(report, sum(task.size for task in tasks), self.stopped)
        pool = ThreadPoolExecutor(workers)
        try:
            _finish([pool.submit(self._do, task, meter) for task in tasks])
            try:
                _finish([pool.submit(self._check, path) for path in self.files.shards.values()])
            except CheckpointError as error:
                self._give_up(tasks, error)
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)

    def _tasks(self) -> Iterator[Task]:
        like = next(iter(self.files.shards.values()))
        share = sum(path.stat().st_size for path in self.files.shards.values())
        for rank in sorted(self.target.order):
            place = self.folder / shard_name(like, rank)
            write, is_kept = partial(self._shard, rank), partial(self._shard_is_kept, rank)
            yield Task(place, share // len(self.target.order), write, is_kept)
        for model, path in self.files.models.items():
            write = partial(self._model, model)
            yield Task(self.folder / path.name, path.stat().st_size, write)
        for path in self.files.others():
            place = self.folder / path.relative_to(self.files.folder)
            yield Task(place, path.stat().st_size, partial(_copy, path))

    def _give_up(self, tasks: list[Task], error: CheckpointError) -> NoReturn:
        for task in tasks:  # nobody can tell which of them have the damaged bytes
            own(self.directory, task.path).unlink(missing_ok=True)
        if self.kept:
            raise CheckpointError(
                f"{error} Or what an earlier attempt left in {self.folder} is: that was removed, "
                "so call again to know."
            ) from error
        raise error

    def _do(self, task: Task, meter: "_Meter") -> None:
        counted = 0

        def progress(count: int) -> None:
            nonlocal counted
            step = min(count, task.size - counted)  # sizes were estimated
            counted += step
            meter.add(step)

        copier = Copier(self.sums, progress)
        with contextlib.closing(copier), writing(task.path):
            if task.path.exists() and task.is_kept(task.path, copier):
                self.kept.append(task.path)
            else:
                own(self.directory, task.path).unlink(missing_ok=True)
                task.path.parent.mkdir(parents=True, exist_ok=True)
                with finished_file(task.path, self.directory) as part:
                    task.write(part, copier)
        meter.add(task.size - counted)

    def _shard(self, rank: Rank, path: Path, copier: Copier) -> None:
        write_shard(new_shard(self.source, self.target, rank), path, copier)

    def _shard_is_kept(self, rank: Rank, path: Path, copier: Copier) -> bool:
        return shard_is_kept(new_shard(self.source, self.target, rank), path, copier)

    def _model(self, model: int, path: Path, copier: Copier) -> None:
        self.sums.check(self.files.models[model], copier)
        write_model(self.source, self.target, model, path)

    def _check(self, path: Path) -> None:
        meter = _Meter(lambda done, total: None, 0, self.stopped)
        with contextlib.closing(Copier(self.sums, meter.add)) as copier:
            self.sums.check(path, copier)


def _copy(source: Path, path: Path, copier: Copier) -> None:
    if source.name.endswith(STATES):  # DeepSpeed's, so torch has to be able to read it
        read_mapped(source)
    copier.copy_file(source, path)


def _finish(futures: list[Future[Any]]) -> None:
    """Wait for all, or raise what one raises."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()


class _Meter:
    """Adds up what all threads wrote, and ends them when one of them failed."""

    def __init__(self, report: Report, total: int, stopped: threading.Event) -> None:
        self.report, self.total, self.stopped = report, total, stopped
        self.done = 0
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        if self.stopped.is_set():
            raise CheckpointError("the conversion was stopped.")
        if count:
            with self.lock:
                self.done += count
                self.report(self.done, self.total)
