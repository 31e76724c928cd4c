"""Process many files with a few threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called, by one thread at a time, with the number of bytes that are done, and of all bytes."""


class ProgressSum:
    """Adds up the bytes that all threads have read."""

    def __init__(self, progress: Progress | None, paths: Iterable[Path]) -> None:
        self.progress = progress
        self.done, self.total = 0, sum(path.stat().st_size for path in paths)
        self.lock = threading.Lock()

    def __call__(self, numbytes: int) -> None:
        if self.progress is not None:
            with self.lock:
                self.done = min(self.done + numbytes, self.total)
                self.progress(self.done, self.total)

    def finish(self) -> None:
        """Report that all is done; parts of files that no thread reads count too."""
        self(self.total)


def in_order(
    pool: ThreadPoolExecutor, calls: Iterable[tuple[Any, ...]], ahead: int
) -> Iterator[Any]:
    """Results of the calls in their order; at most ``ahead`` calls run or wait at a time."""
    waiting: deque[Future[Any]] = deque()
    for function, *args in calls:
        waiting.append(pool.submit(function, *args))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
