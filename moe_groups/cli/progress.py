"""Show the progress of a long command on stderr: a bar on a terminal, otherwise a line at times."""

import contextlib
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TypeAlias

from moe_groups._common.text import show_bytes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep stdout free of DeepSpeed's log and of prints of a model's function."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


Progress: TypeAlias = Callable[[int, int], None]
"""Called from any thread with the number of bytes that are done, and of all bytes."""

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def show_progress(verb: str) -> Iterator[Progress]:
    """Yield a function that reports progress while the block runs.

    Args:
        verb: the word before the figures, for example "reading".
    """
    if sys.stderr.isatty():
        try:
            import rich.progress  # noqa: F401
        except ImportError:
            pass
        else:
            with _bar(verb) as progress:
                yield progress
            return
    yield _Lines(verb)


@contextlib.contextmanager
def _bar(verb: str) -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(verb, total=None)

        def progress(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)

        yield progress


class _Lines:
    """Writes a line of plain text every few seconds; none if the work ends earlier."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.start = self.last = time.monotonic()
        self.lock = threading.Lock()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        with self.lock:
            if now - self.last < _SECONDS_BETWEEN_LINES:
                return
            self.last = now
        print(self.line(done, total, now - self.start), file=sys.stderr, flush=True)

    def line(self, done: int, total: int, seconds: float) -> str:
        """Bytes done, speed and time left."""
        text = f"{self.verb}: {show_bytes(done)} of {show_bytes(total)}"
        if done and seconds > 0:
            speed = done / seconds
            left = round(max(total - done, 0) / speed)
            text += f", {show_bytes(speed)}/s, {show_seconds(left)} left"
        return text


def show_seconds(seconds: float) -> str:
    """``4.1 s``; from one minute up ``12:05`` or ``1:02:05``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if isinstance(seconds, float) else f"{seconds} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
