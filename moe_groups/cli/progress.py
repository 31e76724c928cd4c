"""Keep the output of a long command readable, and show its progress on stderr."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

from moe_groups._common.progress import Progress


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


_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def show_progress(verb: str) -> Iterator[Progress]:
    """Yield a function that reports progress while the block runs.

    A terminal gets a bar; a file gets a line at times, and none if the work ends earlier.

    Args:
        verb: the word before the figures, for example "reading".
    """
    from tqdm import tqdm  # which DeepSpeed installs

    seconds = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    with tqdm(desc=verb, mininterval=seconds, delay=seconds, **options) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
