"""A directory that is written over a long time and appears when it is complete."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moe_groups
from moe_groups.checkpoint_files import CheckpointFiles
from moe_groups.errors import CheckpointError
from moe_groups.flat_layout import Layout
from moe_groups.plan import fingerprint

_LOCK = ".lock"
_JOB = ".job.json"
_RESULT = "checkpoint"
PART = ".part"


@contextlib.contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A path to write to; when that ends well, the file appears under its own name, on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    part.unlink(missing_ok=True)
    yield part
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the disk as errors that say which file, and what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: {error.strerror}. What is written already is kept: make "
            "room, or put right what is wrong, and call again."
        ) from error


def check_space(directory: Path, needed: int) -> None:
    """Has the disk of ``directory`` room for so many bytes?

    Raises:
        CheckpointError: it has not.
    """
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{directory} needs {needed:,} bytes, but only {free:,} are free on its disk: make "
            "room and call again, or choose another place."
        )


class Unfinished:
    """The work of one conversion, in ``<destination>.incomplete``; one process at a time.

    What belongs to the result is in a directory of its own there, which is renamed when it is
    complete. So a reader sees all of the destination or nothing, and it holds nothing else.

    Args:
        files: the checkpoint that is converted.
        destination: what the directory is called when it is complete.
        target: the new groups.
    """

    def __init__(self, files: CheckpointFiles, destination: Path, target: Layout) -> None:
        self.files = files
        self.target = target
        self.destination = Path(os.path.abspath(destination))
        self.place = self.destination.with_name(self.destination.name + ".incomplete")
        self.path = self.place / _RESULT
        self.job = _job(files, target)
        self.lock = -1

    def __enter__(self) -> "Unfinished":
        """Begin, or go on where an earlier process was stopped.

        Raises:
            CheckpointError: the destination cannot be used, or another process is at it.
        """
        self._check_destination()
        with writing(self.place):
            self._take_lock()
            try:
                self._check_destination()  # the process before may have finished since
                self._begin()
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.lock)

    def _check_destination(self) -> None:
        source = self.files.folder.resolve()
        target = self.destination.resolve()
        if target == source or target == self.files.directory.resolve():
            raise CheckpointError(f"{self.destination} is the source, which is never written over.")
        if target.is_relative_to(source):
            raise CheckpointError(f"{self.destination} is inside of the source {source}.")
        if self.destination.exists():
            raise CheckpointError(
                f"{self.destination} exists: choose another destination, or remove it."
            )

    def _take_lock(self) -> None:
        path = self.place / _LOCK
        while True:
            self.place.mkdir(parents=True, exist_ok=True)
            try:
                self.lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            except FileNotFoundError:  # the process before finished, and removed the directory
                continue
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self.lock), path.stat()):
                    return
            except BlockingIOError:
                os.close(self.lock)
                raise CheckpointError(
                    f"another process is writing {self.destination} now (it holds {path})."
                ) from None
            except FileNotFoundError:
                pass
            os.close(self.lock)

    def _begin(self) -> None:
        path = self.place / _JOB
        if path.is_file() and not self._same_job(path):
            raise CheckpointError(
                f"{self.place} holds an unfinished conversion of another checkpoint or to other "
                "groups, or the checkpoint has changed since: remove it, or choose another "
                "destination."
            )
        self._check_space()
        if not path.is_file():
            with finished_file(path) as part:
                part.write_text(json.dumps(self.job, indent=1))
        self.path.mkdir(exist_ok=True)

    def _same_job(self, path: Path) -> bool:
        try:
            return bool(json.loads(path.read_bytes()) == self.job)
        except ValueError:
            return False

    def _check_space(self) -> None:
        held = sum(path.stat().st_blocks * 512 for path in self.place.rglob("*") if path.is_file())
        check_space(self.place, self.job["bytes"] - held)

    def _leave(self) -> None:
        """Remove what nobody needs; work of an earlier process stays."""
        if not (self.place / _JOB).exists():
            self._remove_place()
        os.close(self.lock)

    def _remove_place(self) -> None:
        with contextlib.suppress(OSError):  # another process may be looking in
            for name in (_JOB, _LOCK):
                (self.place / name).unlink(missing_ok=True)
            self.place.rmdir()

    def publish(self) -> None:
        """Give the directory its name: from now on it is a checkpoint.

        Raises:
            CheckpointError: the source has changed meanwhile, or the destination has appeared.
        """
        if _job(self.files, self.target) != self.job:
            raise CheckpointError(
                f"{self.files.folder} was changed while it was converted: remove {self.place} and "
                "convert again."
            )
        try:
            os.rename(self.path, self.destination)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} is complete, but cannot be renamed to {self.destination}: "
                f"{error.strerror}."
            ) from error
        self._remove_place()
        parent = os.open(self.destination.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _job(files: CheckpointFiles, target: Layout) -> dict[str, Any]:
    """What has to be the same for work to go on."""
    paths = [*files.shards.values(), *files.models.values(), *files.others()]
    stats = [(str(path), path.stat()) for path in paths]
    rows = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    names = [(group.name, sorted(group.labels.items())) for group in target.groups]
    return {
        "moe_groups": moe_groups.__version__,
        "source": str(files.folder.resolve()),
        "files": fingerprint(rows).hex(),
        "target": target.fingerprint(),
        "names": fingerprint(names).hex(),
        "bytes": sum(stat.st_size for _, stat in stats),
    }
