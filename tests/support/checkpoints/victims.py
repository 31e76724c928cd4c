"""Processes that are killed, stopped or interrupted at chosen moments of what they do.

A moment is a number of seconds of processor time, which a busy machine does not move, or a
number of file operations (Python's audit events), which nothing moves.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.ranks import PRELOAD

_OPERATIONS = ("open", "os.", "shutil.")


class Outcome(NamedTuple):
    """How a process ended.

    Attributes:
        kind: "done", "raised" or "killed".
        value: what the job returned; or the name of the error's class.
        text: of the error.
        seconds: of processor time, from the job's start.
        operations: file operations under the watched directory, from the job's start.
    """

    kind: str
    value: Any = None
    text: str = ""
    seconds: float = 0.0
    operations: int = 0


class Victim:
    """A process that runs ``job(*args)``, a function of a module.

    Args:
        job: what to run.
        watched: file operations on paths in this directory are counted.
        at: number of the file operation before which ``how`` is sent, from 1 on.
        how: a signal.
    """

    def __init__(
        self,
        job: Callable[..., Any],
        *args: Any,
        watched: Path | None = None,
        at: int = 0,
        how: int = signal.SIGKILL,
    ) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, "moe_groups.checkpoints.convert.convert"])
        self.pipe, theirs = context.Pipe()
        name = job.__module__, job.__qualname__
        arguments = theirs, name, args, str(watched), at, how
        self.process = context.Process(target=_live, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "ready"
        self.begun = self.processor_time()

    def go(self) -> "Victim":
        """Let it begin."""
        self.pipe.send("go")
        return self

    def processor_time(self) -> float:
        """Seconds that all of its threads used."""
        return time.clock_gettime((~self.process.pid << 3) | 2)  # clock_getcpuclockid(3)

    def send_after(self, seconds: float, how: int = signal.SIGKILL) -> None:
        """Send a signal when it has used that much processor time, unless it ends before."""
        while self.process.is_alive():
            if self.processor_time() - self.begun >= seconds:
                os.kill(self.process.pid, how)
                return
            time.sleep(0.0005)

    def wait_until_stopped(self) -> bool:
        """Wait until it stops itself (SIGSTOP); False if it ended."""
        while self.process.is_alive():
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "T":
                return True
            time.sleep(0.001)
        return False

    def go_on(self) -> None:
        """Wake it after it was stopped."""
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self, timeout: float = 120) -> Outcome:
        """How it ended.

        Raises:
            AssertionError: it did not.
        """
        outcome = Outcome("killed")
        if self.pipe.poll(timeout):
            with contextlib.suppress(EOFError):
                outcome = Outcome(*self.pipe.recv())
        else:
            self.process.kill()
            raise AssertionError(f"not done after {timeout} s")
        self.process.join()
        self.pipe.close()
        return outcome


def _live(
    pipe: Any, name: tuple[str, str], args: tuple[Any, ...], watched: str, at: int, how: int
) -> None:
    import torch

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    job = getattr(importlib.import_module(name[0]), name[1])
    count = 0

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event.startswith(_OPERATIONS) and values and str(values[0]).startswith(watched):
            count += 1
            if count == at:
                os.kill(os.getpid(), how)

    pipe.send("ready")
    pipe.recv()
    sys.addaudithook(watch)
    start = time.process_time()
    try:
        kind, value, text = "done", job(*args), ""
    except BaseException as error:
        kind, value, text = "raised", type(error).__name__, str(error)
    pipe.send((kind, value, text, time.process_time() - start, count))
