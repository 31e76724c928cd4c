"""A small disk of its own, which a test fills."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(path: Path, size: int) -> Iterator["SmallDisk"]:
    """A tmpfs of ``size`` bytes; the test is skipped where none can be mounted."""
    path.mkdir()
    made = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _mount(*args: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(args, 1, "", str(error))


class SmallDisk:
    """A mounted one.

    Attributes:
        path: where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.filler = path / "filler"

    def fill(self, leave: int = 0) -> None:
        """Take all room but ``leave`` bytes."""
        with open(self.filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(self.filler, max(0, self.filler.stat().st_size - leave))

    @contextlib.contextmanager
    def kept_full(self) -> Iterator[None]:
        """Whatever is freed is taken at once."""
        done = threading.Event()

        def take() -> None:
            while not done.is_set():
                self.fill()
                time.sleep(0.0005)

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def make_room(self) -> None:
        self.filler.unlink(missing_ok=True)

    def remount(self, options: str) -> None:
        """With another size, or "ro"."""
        assert _mount("-o", f"remount,{options}", str(self.path)).returncode == 0
