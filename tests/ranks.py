"""Run functions on real ranks: a pool of gloo processes per world size, started once.

Importing DeepSpeed takes seconds, so the processes stay. A job is a module-level function;
it runs on every rank and its results come back in rank order. A job that raises or hangs
ends the pool (the ranks may be stuck in a collective); the next job starts a new one.
"""

import faulthandler
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXTENSIONS = ROOT / ".cache" / "torch_extensions"


class RankError(AssertionError):
    """A job failed or hung; the message names the ranks and where they were."""


class RankPool:
    """Processes of one gloo world.

    Args:
        world_size: number of ranks.
        env: further environment variables of the ranks, as PYTHONHASHSEED.
    """

    def __init__(self, world_size: int, env: dict[str, str] | None = None) -> None:
        self.world_size = world_size
        self.scratch = Path(tempfile.mkdtemp(prefix="moe-groups-ranks-"))
        # A killed process leaves a lock behind, and then every later compilation waits forever.
        for lock in EXTENSIONS.glob("**/lock"):
            lock.unlink()
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        before = dict(os.environ)
        for rank in range(world_size):
            os.environ.update(_rank_environment(rank, world_size, port), **(env or {}))
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, str(self._stack_file(rank))), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        os.environ.clear()
        os.environ.update(before)

    def run(self, job: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> Any:
        """Results of ``job(*args, **kwargs)`` on all ranks, in rank order.

        Raises:
            RankError: a rank raised, died, or was not done after ``timeout`` seconds.
        """
        target = (job.__module__, job.__qualname__)
        for pipe in self.pipes:
            pipe.send((target, args, kwargs))
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.world_size:
            waiting = [rank for rank in range(self.world_size) if rank not in answers]
            ready = wait([self.pipes[rank] for rank in waiting], timeout)
            if not ready:
                self._fail(f"{target[1]}: not done after {timeout:g} s", answers)
            for rank in (rank for rank in waiting if self.pipes[rank] in ready):
                try:
                    answers[rank] = self.pipes[rank].recv()
                except EOFError:
                    answers[rank] = False, "the process died"
                if not answers[rank][0]:
                    timeout = min(timeout, 5)  # the others are likely waiting for this one
        if not all(ok for ok, _ in answers.values()):
            self._fail(f"{target[1]} failed", answers)
        return [answers[rank][1] for rank in range(self.world_size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
        shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def alive(self) -> bool:
        return bool(self.processes)

    def _stack_file(self, rank: int) -> Path:
        return self.scratch / f"stack-{rank}.txt"

    def _fail(self, what: str, answers: dict[int, tuple[bool, Any]]) -> None:
        lines = [what]
        for rank, process in enumerate(self.processes):
            if rank in answers:
                ok, value = answers[rank]
                lines.append(f"rank {rank}: " + ("finished" if ok else str(value)))
            else:
                lines.append(f"rank {rank} is waiting in:\n{self._stack(rank, process.pid)}")
        self.close()
        raise RankError("\n".join(lines))

    def _stack(self, rank: int, pid: int | None) -> str:
        """Where a rank is: its innermost Python frames, with the collective it waits in."""
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        self.processes[rank].join(1)
        text = self._stack_file(rank).read_text() if self._stack_file(rank).exists() else ""
        main = text.rpartition("Current thread")[2] or text.rpartition("Thread")[2]
        return "\n".join(main.splitlines()[1:16])


_pools: dict[int, RankPool] = {}


def run_on_ranks(world_size: int, job: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``job`` on the shared pool of this world size; starts it when needed."""
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        pool = _pools[world_size] = RankPool(world_size)
    return pool.run(job, *args, **kwargs)


def run_in_fresh_processes(
    world_size: int,
    job: Callable[..., Any],
    *args: Any,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """Run ``job`` in processes of its own, as a restarted training would."""
    pool = RankPool(world_size, env)
    try:
        return pool.run(job, *args, **kwargs)
    finally:
        pool.close()


def close_pools() -> None:
    for pool in _pools.values():
        pool.close()
    _pools.clear()


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection, stack_file: str) -> None:
    """Main loop of a rank."""
    stacks = open(stack_file, "w")  # noqa: SIM115  (faulthandler writes to it until the end)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    if not os.environ.get("MOE_GROUPS_VERBOSE"):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (DeepSpeed prints a lot)
    import deepspeed
    from deepspeed.utils import groups, logger

    logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    while True:
        (module, name), args, kwargs = pipe.recv()
        for registry in (
            groups._EXPERT_PARALLEL_GROUP,
            groups._EXPERT_PARALLEL_GROUP_RANKS,
            groups._EXPERT_DATA_PARALLEL_GROUP,
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        ):
            registry.clear()
        groups.mpu = None
        try:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            pipe.send((True, target(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
