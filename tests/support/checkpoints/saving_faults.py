"""Real ranks that are killed while they save, and what other ranks load after that."""

import contextlib
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_groups import protect_checkpoints
from moe_groups.checkpoints.guard.guard import Regroup
from moe_groups.errors import MoEGroupsError
from tests.support.checkpoints.fault_table import REFUSED, RIGHT, Tally
from tests.support.ranks import RankPool, run_on_ranks
from tests.support.training import groups_by, start, train

WORLD = 2
SPLIT = "module"
_OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir")


class Kill(NamedTuple):
    """When which ranks are killed.

    Attributes:
        wrapper: see :data:`tests.support.training.WRAPPERS`.
        over: is the checkpoint that was saved before written over?
        ranks: that are killed; the others have a second more.
        moment: seconds of processor time of the first of them, from the beginning of the save.
        operation: file operation of rank 0 before which it kills itself; 0 for none.
    """

    wrapper: str
    over: bool
    ranks: tuple[int, ...]
    moment: float
    operation: int = 0


def engine_of(wrapper: str, split: str = SPLIT) -> Any:
    options = {"ep_size": 2, "layers": 4, "num_experts": 16}
    return start(wrapper, groups_by(split), model_options=options)


def digest(engine: Any) -> str:
    """Of all numbers that a rank has."""
    found = hashlib.sha256(str(engine.global_steps).encode())
    for tensor in _tensors([engine.optimizer.state_dict(), engine.module.state_dict()]):
        found.update(str(tensor.dtype).encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def save_twice(folder: Path, wrapper: str, second: str, operation: int = 0) -> tuple[float, int]:
    """Save "first", train on, and save ``second`` when there is a file ``go``.

    Leaves what each save should hold in ``<tag>-<step>-<rank>``; ``operation`` as in :class:`Kill`.
    Returns seconds of processor time and file operations of the second save.
    """
    rank = torch.distributed.get_rank()
    engine = engine_of(wrapper)
    checkpoints = folder / "checkpoints"
    train(engine, 2)
    (folder / f"first-2-{rank}").write_text(digest(engine))
    engine.save_checkpoint(str(checkpoints), tag="first")
    train(engine, 2, first=2)
    (folder / f"{second}-4-{rank}").write_text(digest(engine))
    (folder / f"ready-{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
    count = 0

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _OPERATIONS and str(values[0]).startswith(str(checkpoints)):
            count += 1
            if count == operation and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    begun = time.process_time()
    engine.save_checkpoint(str(checkpoints), tag=second)
    return time.process_time() - begun, count


def load(
    folder: Path,
    wrapper: str,
    tag: str | None = None,
    split: str = SPLIT,
    regroup: Regroup = "refuse",
    scratch: Path | None = None,
) -> tuple[str, str]:
    """What a rank of a new run gets: the path and the digest, or "refused" and the error."""
    engine = engine_of(wrapper, split)
    protect_checkpoints(engine, regroup=regroup, scratch_dir=scratch)
    before = digest(engine)
    try:
        path, _ = engine.load_checkpoint(str(folder / "checkpoints"), tag=tag)
    except MoEGroupsError as error:
        assert digest(engine) == before, "an error after something was loaded"
        return "refused", str(error)
    return Path(path).parent.name if path else "nothing", digest(engine)


class SavingRanks:
    """A world that saves, up to the second save."""

    def __init__(self, folder: Path, kill: Kill) -> None:
        self.folder, self.kill = folder, kill
        folder.mkdir()
        self.pool = RankPool(WORLD)
        args = folder, kill.wrapper, "first" if kill.over else "second", kill.operation
        for pipe in self.pool.pipes:
            assert pipe.recv() == (True, None)
            pipe.send((save_twice.__module__, save_twice.__qualname__, args, {}))
        for rank in range(WORLD):
            while not (folder / f"ready-{rank}").exists():
                assert all(process.is_alive() for process in self.pool.processes), "it died"
                time.sleep(0.005)

    def save(self) -> list[Any]:
        """Let the second save go to its end."""
        (self.folder / "go").touch()
        try:
            return [pipe.recv()[1] for pipe in self.pool.pipes]
        finally:
            self.pool.close()

    def save_and_die(self) -> None:
        """Let the second save begin, and kill."""
        pids = [process.pid for process in self.pool.processes]
        clock = (~pids[self.kill.ranks[0]] << 3) | 2  # clock_getcpuclockid(3)
        begun = time.clock_gettime(clock)
        (self.folder / "go").touch()
        if self.kill.operation:
            self.pool.processes[0].join(20)
        with contextlib.suppress(OSError):  # it has ended
            while time.clock_gettime(clock) - begun < self.kill.moment:
                if all(pipe.poll() for pipe in self.pool.pipes):
                    break
                time.sleep(0.0005)
        for rank in self.kill.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGKILL)
        if len(self.kill.ranks) < WORLD:
            time.sleep(1)
        self.pool.close()


def cost_of_save(place: Path, wrapper: str) -> tuple[float, int]:
    """Processor time of the slower rank, and file operations of rank 0, of the second save."""
    results = SavingRanks(place, Kill(wrapper, False, (0,), 0)).save()
    return max(seconds for seconds, _ in results), results[0][1]


def random_kills(count: int, seconds: float, seed: int = 0) -> list[Kill]:
    """As many with a new tag as over the old one, with one rank or both."""
    draw = random.Random(seed)
    return [
        Kill(
            draw.choice(["zero2", "bf16"]),
            bool(number % 2),
            draw.choice([(0,), (1,), (0, 1)]),
            1.2 * seconds * draw.random(),
        )
        for number in range(count)
    ]


def random_kills_while_saving(place: Path, every: int = 1) -> list[Tally]:
    """20 moments of the whole save, and all file operations of rank 0 that Python makes.

    One of ``every`` is done.
    """
    seconds, _ = cost_of_save(place / "first-run", "zero2")  # imports what later ones have
    seconds, operations = cost_of_save(place / "cost", "zero2")
    ends = [
        Kill("bf16" if operation % 3 else "zero2", bool(operation % 2), (0,), 0, operation)
        for operation in range(1, operations + 1)
    ]
    return [
        kill_saves(place, "kill -9 at a random moment", random_kills(20, seconds)[::every]),
        kill_saves(place, "kill -9 before a file operation", ends[::every]),
    ]


def kill_saves(place: Path, fault: str, kills: list[Kill]) -> Tally:
    """Kill, load in a new run, judge."""
    tally = Tally("saving", fault)
    for number, kill in enumerate(kills):
        folder = place / f"{fault}-{number}".replace(" ", "-")
        SavingRanks(folder, kill).save_and_die()
        found = run_on_ranks(WORLD, load, folder, kill.wrapper)
        problem = _problem(folder, kill, found)
        if problem:
            tally.wrong(f"{kill}: {problem}")
        else:
            tally.add(REFUSED if found[0][0] == "refused" else RIGHT)
    return tally


def _problem(folder: Path, kill: Kill, found: list[tuple[str, str]]) -> str | None:
    tags = {tag for tag, _ in found}
    if len(tags) > 1:
        return f"ranks differ: {found}"
    tag = tags.pop()
    if tag != "refused":
        if [value for _, value in found] not in saved(folder, tag):
            return f"{tag} was loaded, with other state than was saved"
        return None
    if str(folder) not in found[0][1]:
        return f"an error that names no file: {found[0][1]}"
    if not kill.over:
        return f"the checkpoint before is not loaded: {found[0][1]}"
    return None


def saved(folder: Path, tag: str) -> list[list[str]]:
    """What was saved under a tag, at each step that it was."""
    steps = sorted({path.name.split("-")[1] for path in folder.glob(f"{tag}-*-*")})
    return [[(folder / f"{tag}-{s}-{r}").read_text() for r in range(WORLD)] for s in steps]
