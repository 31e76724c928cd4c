"""Run functions as one rank of a world of any size, in a fresh process.

Torch's "fake" process group returns from every collective at once and moves no data, so
unmodified DeepSpeed can run as rank 37 of 64 in one process. It allocates what that rank
would allocate; the numbers that it computes are not those of a training run.
"""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.support.ranks import EXTENSIONS, PRELOAD, RankError, _use_extensions, build_nothing

_PORT = 29500  # no process listens there, but DeepSpeed reads one


def run_as_rank(
    rank: int, world_size: int, job: Callable[..., Any], *args: Any, timeout: float = 300
) -> Any:
    """The result of ``job(*args)`` as this rank of a fake world.

    The rank uses the accelerator that ``DS_ACCELERATOR`` names, or the CPU.

    Args:
        job: a module-level function.
        timeout: seconds.

    Raises:
        RankError: the job raised, died, or was not done in time.
    """
    extensions = _use_extensions()
    variables = _environment(rank, world_size)
    # Importing DeepSpeed counts the GPUs, after which a forked process cannot use them.
    forks = variables["DS_ACCELERATOR"] == "cpu"
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(PRELOAD)
    before = dict(os.environ)
    os.environ.update(variables)  # for the server, if it starts here
    ours, theirs = context.Pipe()
    target = job.__module__, job.__qualname__, args
    process = context.Process(target=_serve, args=(theirs, variables, target), daemon=True)
    process.start()
    os.environ.clear()
    os.environ.update(before)
    theirs.close()
    try:
        ok, result = _answer(ours, timeout)
    finally:
        process.kill()
        process.join()
        os.close(extensions)
    if not ok:
        raise RankError(f"{job.__qualname__} as rank {rank} of {world_size}: {result}")
    return result


def _answer(pipe: Connection, timeout: float) -> tuple[bool, Any]:
    end = time.monotonic() + timeout
    if not pipe.poll(max(0.0, end - time.monotonic())):
        return False, f"not done after {timeout:g} s"
    try:
        answer: tuple[bool, Any] = pipe.recv()
    except EOFError:
        return False, "the process died"
    return answer


def _environment(rank: int, world_size: int) -> dict[str, str]:
    return {
        "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"),
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_PORT),
        "OMP_NUM_THREADS": "1",
        "KINETO_LOG_LEVEL": "99",  # otherwise the profiler prints at every measurement
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    }


def _serve(pipe: Connection, variables: dict[str, str], target: tuple[str, str, Any]) -> None:
    os.environ.update(variables)
    if not os.environ.get("MOE_GROUPS_VERBOSE"):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (DeepSpeed prints a lot)
    try:
        join(int(variables["RANK"]), int(variables["WORLD_SIZE"]))
        module, name, args = target
        pipe.send((True, getattr(importlib.import_module(module), name)(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def join(rank: int, world_size: int) -> None:
    """Make this process rank ``rank`` of a fake world, which DeepSpeed then uses."""
    import deepspeed
    import torch
    from deepspeed.utils import logger
    from torch.testing._internal.distributed.fake_pg import FakeStore

    logger.setLevel("ERROR")
    torch.distributed.init_process_group(
        "fake", rank=rank, world_size=world_size, store=FakeStore()
    )
    build_nothing()
    deepspeed.init_distributed("gloo", verbose=False)
