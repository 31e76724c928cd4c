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
_PART = ".part"


@contextlib.contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A path to write to; when that ends well, the file appears under its own name, on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + _PART)
    part.unlink(missing_ok=True)
    yield part
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


class Unfinished:
    """The work of one conversion, in ``<destination>.incomplete``; one process at a time.

    Args:
        files: the checkpoint that is converted.
        destination: what the directory is called when it is complete.
        target: the new groups.
    """

    def __init__(self, files: CheckpointFiles, destination: Path, target: Layout) -> None:
        self.files = files
        self.destination = Path(os.path.abspath(destination))
        self.path = self.destination.with_name(self.destination.name + ".incomplete")
        self.job = _job(files, target)
        self.lock = -1

    def __enter__(self) -> "Unfinished":
        """Begin, or go on where an earlier process was stopped.

        Raises:
            CheckpointError: the destination cannot be used, or another process is at it.
        """
        self._check_destination()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._check_job()
                self._check_space()
            except BaseException:
                os.close(self.lock)
                raise
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror}.") from error
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
        path = self.path / _LOCK
        self.lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the process before may have finished since: then the directory has moved away
            if not path.exists() or not os.path.samestat(os.fstat(self.lock), path.stat()):
                raise BlockingIOError
        except BlockingIOError:
            os.close(self.lock)
            raise CheckpointError(
                f"another process is writing {self.destination} now (it holds {path})."
            ) from None

    def _check_job(self) -> None:
        path = self.path / _JOB
        if path.is_file():
            try:
                same = json.loads(path.read_text()) == self.job
            except ValueError:
                same = False
            if not same:
                raise CheckpointError(
                    f"{self.path} holds an unfinished conversion of another checkpoint or to other "
                    "groups: remove it, or choose another destination."
                )
            return
        with finished_file(path) as part:
            part.write_text(json.dumps(self.job, indent=1))

    def _check_space(self) -> None:
        held = sum(path.stat().st_blocks * 512 for path in self.path.rglob("*") if path.is_file())
        needed = self.job["bytes"] - held
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise CheckpointError(
                f"{self.path} needs {needed:,} bytes, but only {free:,} are free on its disk."
            )

    def publish(self) -> None:
        """Give the directory its name: from now on it is a checkpoint.

        Raises:
            CheckpointError: the destination has appeared meanwhile.
        """
        try:
            os.rename(self.path, self.destination)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} is complete, but cannot be renamed to {self.destination}: "
                f"{error.strerror}."
            ) from error
        for name in (_JOB, _LOCK):
            (self.destination / name).unlink(missing_ok=True)
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
    names = [group.name for group in target.groups]
    return {
        "moe_groups": moe_groups.__version__,
        "source": str(files.folder.resolve()),
        "files": fingerprint(rows).hex(),
        "target": target.fingerprint(),
        "names": fingerprint(names).hex(),
        "bytes": sum(stat.st_size for _, stat in stats),
    }
