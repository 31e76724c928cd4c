"""Run functions on real ranks: a pool of gloo processes per world size, started once.

A job is a module-level function; it runs on every rank, and its results are returned in rank
order. If a job raises or hangs, the pool ends, because ranks may be stuck in a collective; the
next job starts a new pool. Ranks fork from a server that has imported only DeepSpeed, so
fresh processes start in one second instead of ten.
"""

import contextlib
import faulthandler
import fcntl
import gc
import importlib
import io
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

from packaging.version import Version

from tests.support import ROOT

EXTENSIONS = ROOT / ".cache" / os.environ.get("MOE_GROUPS_TEST_EXTENSIONS", "torch_extensions")
START_TIMEOUT = 900.0  # DeepSpeed's communication op is compiled at first use
PRELOAD = ["deepspeed", "deepspeed.moe.layer", "torch._dynamo", "torch._inductor.compile_fx"]
HANG = 3.0
"""Seconds after which a job that should hang counts as hanging; its work takes a tenth."""


class RankError(AssertionError):
    """A job failed or hung; the message has the ranks and their stacks."""


class RankPool:
    """Processes of one gloo world.

    Args:
        world_size: number of ranks.
        env: further environment variables of the ranks, such as PYTHONHASHSEED.
        join: make the ranks a world; otherwise their first job does.
    """

    def __init__(
        self, world_size: int, env: dict[str, str] | None = None, join: bool = True
    ) -> None:
        self.world_size = world_size
        self.scratch = Path(tempfile.mkdtemp(prefix="moe-groups-ranks-"))
        self.extensions = _use_extensions()
        self.started = False
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        context: Any = multiprocessing.get_context("spawn" if env else "forkserver")
        if not env:
            context.set_forkserver_preload(PRELOAD)
        port = _free_port()
        before = dict(os.environ)
        for rank in range(world_size):
            variables = _rank_environment(rank, world_size, port) | (env or {})
            os.environ.update(variables)  # for interpreters that start here, including the server
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, str(self._stack_file(rank)), variables, join),
                daemon=True,
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
        if not self.started:
            self._answers("start of the ranks", START_TIMEOUT)
            self.started = True
        for pipe in self.pipes:
            pipe.send((job.__module__, job.__qualname__, args, kwargs))
        return self._answers(job.__qualname__, timeout)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
        os.close(self.extensions)
        shutil.rmtree(self.scratch, ignore_errors=True)

    @property
    def alive(self) -> bool:
        return bool(self.processes)

    def _answers(self, what: str, timeout: float) -> list[Any]:
        """One answer from each rank, in rank order."""
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout
        while len(answers) < self.world_size:
            waiting = [rank for rank in range(self.world_size) if rank not in answers]
            ready = wait([self.pipes[rank] for rank in waiting], max(0, end - time.monotonic()))
            if not ready:
                late = not any(ok is False for ok, _ in answers.values())
                self._fail(f"{what}: not done after {timeout:g} s" if late else what, answers)
            for rank in (rank for rank in waiting if self.pipes[rank] in ready):
                try:
                    answers[rank] = self.pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = False, "the process died"
                if not answers[rank][0]:  # the others probably wait for this rank
                    end = min(end, time.monotonic() + 5)
        if not all(ok for ok, _ in answers.values()):
            self._fail(what, answers)
        return [answers[rank][1] for rank in range(self.world_size)]

    def _stack_file(self, rank: int) -> Path:
        return self.scratch / f"stack-{rank}.txt"

    def _fail(self, what: str, answers: dict[int, tuple[bool, Any]]) -> NoReturn:
        lines = [what]
        for rank, process in enumerate(self.processes):
            if rank in answers:
                ok, value = answers[rank]
                lines.append(f"rank {rank}: " + ("finished" if ok else str(value)))
            else:
                lines.append(f"rank {rank} is waiting in:\n{self._stack(rank, process.pid)}")
        self.close()
        raise RankError("\n".join(lines))

    def _stack(self, rank: int, pid: int) -> str:
        """The innermost Python frames of a rank, with the collective in which it waits."""
        text = self._dumped(rank, pid)
        main = text.rpartition("Current thread")[2] or text.rpartition("Thread")[2]
        return "\n".join(main.splitlines()[1:16])

    def _dumped(self, rank: int, pid: int, patience: float = 20) -> str:
        """The stacks that a rank writes; on a busy machine it may be slow."""
        file, text = self._stack_file(rank), ""
        os.kill(pid, signal.SIGUSR1)
        end = time.monotonic() + patience
        while self.processes[rank].is_alive() and time.monotonic() < end:
            self.processes[rank].join(0.5)
            before, text = text, file.read_text() if file.exists() else ""
            if text and text == before:
                break
        return text or (file.read_text() if file.exists() else "")


_pools: dict[tuple[int, str], RankPool] = {}


def run_on_ranks(world_size: int, job: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``job`` on the shared pool of this world size; starts it if needed."""
    return _pool(world_size, "shared").run(job, *args, **kwargs)


def run_on_stock(world_size: int, job: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run ``job`` on a pool for unmodified DeepSpeed, in which this library groups nothing."""
    pool = _pool(world_size, "stock")
    answers = pool.run(job, *args, **kwargs)
    pool.run(check_stock)
    return answers


def _pool(world_size: int, kind: str) -> RankPool:
    found = _pools.get((world_size, kind))
    if found is None or not found.alive:
        found = _pools[world_size, kind] = RankPool(world_size)
    return found


def run_in_fresh_processes(
    world_size: int,
    job: Callable[..., Any],
    *args: Any,
    env: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """Run ``job`` in new processes, like a restarted training."""
    pool = RankPool(world_size, env)
    try:
        return pool.run(job, *args, **kwargs)
    finally:
        if pool.alive:
            pool.close()


def run_program(world_size: int, program: Path, *args: str, timeout: float = 300) -> str:
    """Run a Python program like torchrun, in processes that have already imported DeepSpeed.

    Returns:
        Its output, one rank after the other.
    """
    pool = RankPool(world_size, join=False)
    try:
        printed: list[str] = pool.run(_run_program, str(program), *args, timeout=timeout)
    finally:
        if pool.alive:
            pool.close()
    return "".join(printed)


def _run_program(program: str, *args: str) -> str:
    sys.argv = [program, *args]
    sys.path.insert(0, str(Path(program).parent))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(program, run_name="__main__")
    return printed.getvalue()


def close_pools() -> None:
    for pool in _pools.values():
        if pool.alive:
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


def _use_extensions() -> int:
    """Mark the compiled extensions as used; removes stale locks if no other process uses them.

    A killed process leaves a lock on which every later compilation waits forever, but the lock
    of a running compilation must stay.
    """
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    users = os.open(EXTENSIONS / "users", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in EXTENSIONS.glob("**/lock"):
            lock.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    fcntl.flock(users, fcntl.LOCK_SH)
    return users


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection, stack_file: str, variables: dict[str, str], join: bool) -> None:
    """Main loop of a rank."""
    import torch

    os.environ.update(variables)
    stacks = open(stack_file, "w")  # noqa: SIM115  (faulthandler writes to it until the end)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    if not os.environ.get("MOE_GROUPS_VERBOSE"):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (DeepSpeed prints a lot)
    try:
        if join:
            _join_world()
    except BaseException:
        return pipe.send((False, traceback.format_exc()))
    pipe.send((True, None))
    linear = torch.nn.functional.linear
    while True:
        try:
            module, name, args, kwargs = pipe.recv()
        except EOFError:
            return
        # Again for each job, because Lightning resets signals to Python's default handlers.
        faulthandler.unregister(signal.SIGUSR1)
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        done = False
        try:
            target: Any = _module(module)
            for part in name.split("."):
                target = getattr(target, part)
            pipe.send((True, target(*args, **kwargs)))
            done = True
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        if not join:
            return
        if done:  # another rank may still be connecting to a group that this one would destroy
            torch.distributed.barrier()
        torch.nn.functional.linear = linear  # ZeRO-3 replaces it by one that rounds differently
        forget_process_groups()
        if not gc.get_freeze_count():  # the job measured memory, which tracks all objects again
            gc.freeze()


def _module(name: str) -> Any:
    """Import a module and freeze gc, because BF16_Optimizer collects garbage twice a group."""
    if name not in sys.modules:
        importlib.import_module(name)
        gc.freeze()
    return sys.modules[name]


def _join_world() -> None:
    import deepspeed
    from deepspeed.utils import logger

    from tests.support.old_deepspeed import repair

    repair()
    build_nothing()
    logger.setLevel("ERROR")
    backend = "gloo" if os.environ["DS_ACCELERATOR"] == "cpu" else None  # NCCL for CUDA
    deepspeed.init_distributed(backend, verbose=False)


def build_nothing() -> None:
    """Leave out the extension that DeepSpeed compiles when it starts on CPUs, for over a minute.

    It is for inference alone, and exchanges by gloo where there is no compiler.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_stock() -> None:
    """Assert that in no job of this process this library changed DeepSpeed."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    changed = hasattr(DeepSpeedEngine.save_checkpoint, "_moe_groups_original")
    assert not changed, (
        "a job of the pool for DeepSpeed as it is grouped parameters with moe_groups"
    )


def forget_process_groups() -> None:
    """Reset DeepSpeed's registries of process groups to the state of a fresh process.

    Also transformers' DeepSpeed config, which partitions each model that is made under ZeRO-3.

    Destroys engines and groups: each group has threads that wake a hundred times a second, and
    a grid of pipelines makes dozens of groups.
    """
    import torch
    from deepspeed.utils import groups

    _destroy_engines()
    for known in (
        groups._EXPERT_PARALLEL_GROUP,
        getattr(groups, "_EXPERT_PARALLEL_GROUP_RANKS", {}),  # since DeepSpeed 0.17
        groups._EXPERT_DATA_PARALLEL_GROUP,
        getattr(groups, "_EXPERT_DATA_PARALLEL_GROUP_RANKS", {}),
        groups._ALL_TO_ALL_GROUP,
    ):
        known.clear()
    groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups.mesh_device = None
    groups.mpu, groups.expert_tensor_parallel_world_size = None, 1
    if "transformers.integrations.deepspeed" in sys.modules:
        _module("transformers.integrations.deepspeed").unset_hf_deepspeed_config()
    distributed: Any = torch.distributed
    if Version(torch.__version__) < Version("2.7"):
        return  # destroying a gloo group can hang there, while another rank makes the next one
    for group in list(distributed.distributed_c10d._world.pg_map):
        if group is not distributed.group.WORLD:
            distributed.destroy_process_group(group)


def _destroy_engines() -> None:
    """Destroy the job's engines: their gradients' hooks refer to them where gc does not look."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    engines = [it for it in gc.get_objects() if issubclass(type(it), DeepSpeedEngine)]
    while engines:
        with contextlib.suppress(Exception):  # its start may have failed
            engines.pop().destroy()
    if "moe_groups._deepspeed.engines" in sys.modules:
        _module("moe_groups._deepspeed.engines")._ENGINES.clear()  # hooks keep some alive
    gc.collect()
