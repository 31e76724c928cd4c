"""A directory that is written over a long time and appears when it is complete."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_groups._common.json_file import read_json
from moe_groups._common.own_folder import PART, finished_file, own
from moe_groups._version import __version__
from moe_groups.checkpoints.files import CheckpointFiles
from moe_groups.checkpoints.layout import Layout
from moe_groups.errors import CheckpointError
from moe_groups.groups.grouping import fingerprint

_LOCK = ".lock"
_JOB = ".job.json"
_JOB_PART = f"{_JOB}{PART}*"
_RESULT = "checkpoint"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the disk as errors that say which file, and what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename or path  # of a copy the second one is written
        raise CheckpointError(
            f"{where}: {error.strerror}. The files that are written already are kept: make room, "
            "or solve the problem, and call again."
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
        size: bytes of the result.
    """

    def __init__(
        self, files: CheckpointFiles, destination: Path, target: Layout, size: int
    ) -> None:
        self.files = files
        self.target = target
        self.size = size
        self.destination = Path(os.path.abspath(destination))
        self.place = Path(f"{self.destination}.incomplete")
        self.path = self.place / _RESULT
        self.job = _job(files, target)
        self.lock = -1

    def __enter__(self) -> "Unfinished":
        """Begin, or go on where an earlier process was stopped.

        Raises:
            CheckpointError: the destination cannot be used, or another process is at it.
        """
        with writing(self.place):
            self._check_destination()
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
        if "\0" in str(self.destination):
            raise CheckpointError(f"{str(self.destination)!r} cannot be the name of a directory.")
        source, directory, target, place = (
            Path(os.path.realpath(path))
            for path in (self.files.folder, self.files.directory, self.destination, self.place)
        )
        if target in (source, directory):
            raise CheckpointError(f"{self.destination} is the source, which is never written over.")
        if target.is_relative_to(source):
            raise CheckpointError(f"{self.destination} is inside of the source {source}.")
        if source.is_relative_to(place) or directory.is_relative_to(place):
            raise CheckpointError(
                f"{self.files.folder} is inside of {self.place}, which the conversion to "
                f"{self.destination} writes: choose another destination."
            )
        if os.path.lexists(self.destination):
            raise CheckpointError(
                f"{self.destination} exists: choose another destination, or remove it."
            )

    def _check_place(self) -> None:
        """Only in a folder that a conversion made anything is written or removed."""
        begun = self._has_begun()
        ours = {self.place / _LOCK, *self.place.glob(_JOB_PART)}
        strange: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            strange = [f"holds {path.name}" for path in {*self.place.iterdir()} - ours]
        if begun or self._has_begun():  # or another process began or ended meanwhile
            strange = []
        if self.place.is_symlink():
            strange = ["is a link"]
        if strange:
            raise CheckpointError(
                f"{self.place} exists and {min(strange)}, which no conversion made: remove it, or "
                "choose another destination."
            )

    def _has_begun(self) -> bool:
        return (self.place / _JOB).is_file()

    def _take_lock(self) -> None:
        path = self.place / _LOCK
        while True:
            self._check_place()
            self.place.mkdir(parents=True, exist_ok=True)
            try:
                self.lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:  # the process before finished, and removed the directory
                continue
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(self.lock), path.lstat()):
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
        if self._has_begun() and not self._same_job(path):
            raise CheckpointError(
                f"{self.place} holds an unfinished conversion of another checkpoint or to other "
                "groups, or the checkpoint has changed since: remove it, or choose another "
                "destination."
            )
        self._check_space()
        if not self._has_begun():
            with finished_file(path, self.place) as part:
                part.write_text(json.dumps(self.job, indent=1))
        if self.path.is_symlink():
            own(self.place, self.path).unlink()
        self.path.mkdir(exist_ok=True)

    def _same_job(self, path: Path) -> bool:
        try:
            return read_json(path, CheckpointError) == self.job
        except CheckpointError:
            return False

    def _check_space(self) -> None:
        held = sum(path.lstat().st_blocks * 512 for path in self.place.rglob("*"))
        check_space(self.place, self.size - held)

    def _leave(self) -> None:
        """Remove what nobody needs; work of an earlier process stays."""
        if not self._has_begun():
            self._remove_place()
        os.close(self.lock)

    def _remove_place(self) -> None:
        with contextlib.suppress(OSError):  # another process may be looking in
            for path in (self.place / _JOB, *self.place.glob(_JOB_PART), self.place / _LOCK):
                own(self.place, path).unlink(missing_ok=True)
            self.place.rmdir()

    def publish(self) -> None:
        """Give the directory its name: from now on it is a checkpoint.

        Raises:
            CheckpointError: the source has changed meanwhile, or the destination has appeared.
        """
        if not self._is_unchanged():
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

    def _is_unchanged(self) -> bool:
        try:
            return _job(self.files, self.target) == self.job
        except OSError:  # a file of the source is gone
            return False


def _job(files: CheckpointFiles, target: Layout) -> dict[str, Any]:
    """What has to be the same for work to go on."""
    paths = [*files.shards.values(), *files.models.values(), *files.others()]
    stats = [(str(path), path.stat()) for path in paths]
    rows = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    names = [(group.name, sorted(group.labels.items())) for group in target.groups]
    return {
        "moe_groups": __version__,
        "source": str(files.folder.resolve()),
        "files": fingerprint(rows).hex(),
        "target": target.fingerprint(),
        "names": fingerprint(names).hex(),
    }
