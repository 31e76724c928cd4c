"""Write the files of a converted checkpoint, with threads that end when one of them fails."""

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_groups._common.own_folder import finished_file, remove_others
from moe_groups._common.progress import Progress, ProgressSum
from moe_groups.checkpoints.convert.model import write_model
from moe_groups.checkpoints.convert.shard import new_shard
from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.convert.workdir import writing
from moe_groups.checkpoints.files import STATES, CheckpointFiles, shard_name
from moe_groups.checkpoints.layout import Layout, Rank
from moe_groups.checkpoints.torch_file import check_crcs, read_torch_file, save
from moe_groups.errors import CheckpointError


class Task(NamedTuple):
    """A file that is to be written.

    Attributes:
        path: its name.
        size: bytes, as estimated.
        write: writes it.
    """

    path: Path
    size: int
    write: Callable[[Path], None]


@dataclass(slots=True)
class Job:
    """The files of the tag in new groups, without the manifest.

    What is read is compared with the CRC-32 that it states before anything is made of it. So a
    file that has its final name in ``directory`` was made of sound bytes, and is on the disk.

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
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def folder(self) -> Path:
        """Where the files of the tag are written."""
        return self.directory / self.files.tag

    def run(self, workers: int, progress: Progress | None) -> None:
        """Write all files; those that an earlier process finished are kept.

        Raises:
            CheckpointError: the source is damaged, or a file cannot be written.
        """
        shards = list(self.files.shards.values())
        converted = {task.path: task for task in self._conversions()}
        copied = {task.path: task for task in self._copies() if task.path not in converted}
        with writing(self.folder):
            remove_others(self.directory, {*converted, *copied})
            self.folder.mkdir(parents=True, exist_ok=True)
            read = [*self.files.models.values(), *self.files.others()]
            total = ProgressSum(progress, [*shards, *shards, *read])

        def count(numbytes: int) -> None:
            if self.stopped.is_set():
                raise CheckpointError("the conversion was stopped.")
            total(numbytes)

        pool = ThreadPoolExecutor(workers)
        try:
            checks = [pool.submit(check_crcs, path, count) for path in shards]
            copies = [pool.submit(self._do, task, count) for task in copied.values()]
            _finish(checks)
            _finish([*copies, *(pool.submit(self._do, task, count) for task in converted.values())])
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)
        total.finish()

    def _conversions(self) -> Iterator[Task]:
        like = next(iter(self.files.shards.values()))
        size = sum(path.stat().st_size for path in self.files.shards.values())
        for rank in sorted(self.target.order):
            place = self.folder / shard_name(like, rank)
            yield Task(place, size // len(self.target.order), partial(self._shard, rank))
        for model, path in self.files.models.items():
            place = self.folder / path.name
            yield Task(place, path.stat().st_size, partial(self._model, model))

    def _copies(self) -> Iterator[Task]:
        for path in self.files.others():
            place = self.folder / path.relative_to(self.files.folder)
            yield Task(place, path.stat().st_size, partial(_copy, path, self.files.trust))

    def _do(self, task: Task, count: Callable[[int], None]) -> None:
        with writing(task.path):
            if not _is_kept(task.path):
                task.path.parent.mkdir(parents=True, exist_ok=True)
                with finished_file(task.path, self.directory) as part:
                    task.write(part)
        count(task.size)

    def _shard(self, rank: Rank, path: Path) -> None:
        save(new_shard(self.source, self.target, rank), path)

    def _model(self, model: int, path: Path) -> None:
        check_crcs(self.files.models[model])
        write_model(self.source, self.target, model, path)


def _is_kept(path: Path) -> bool:
    """Did an earlier process of this job finish the file, and has it still its CRC-32?"""
    if not path.is_file() or not path.name.endswith(STATES):
        return False
    try:
        check_crcs(path)
    except CheckpointError:
        return False
    return True


def _copy(source: Path, trust: bool, path: Path) -> None:
    if source.name.endswith(STATES):  # DeepSpeed's, so torch has to be able to read it
        read_torch_file(source, trust)
        check_crcs(source)
    shutil.copy(source, path)


def _finish(futures: list[Future[Any]]) -> None:
    """Wait for all, or raise what one raises."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
