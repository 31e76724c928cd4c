"""Conversions that are killed, run out of disk, meet damaged files or each other."""

import contextlib
import hashlib
import random
import signal
from pathlib import Path
from typing import Any

from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.checkpoints.files import find_checkpoint, list_saved
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.checkpoints.manifest import FILE_NAME, Manifest, write_manifest
from moe_groups.errors import CheckpointError
from tests.support.checkpoints.fault_table import AGAIN, RIGHT, Tally
from tests.support.checkpoints.made_checkpoints import make_checkpoint, random_state, same, state_of
from tests.support.checkpoints.victims import Victim

WORLD, EP_SIZE = 4, 2
TAG = "global_step7"
Tree = dict[str, str]


def layout_of(dense: list[list[int]], experts: list[list[int]]) -> Layout:
    """Groups of parameters of these sizes; the sizes are their names too."""
    columns = []
    for rank in range(WORLD):
        own = [_group(f"dense.{i}", tuple(range(WORLD)), g) for i, g in enumerate(dense)]
        shared, ep_rank = tuple(range(rank % EP_SIZE, WORLD, EP_SIZE)), rank % EP_SIZE
        own += [
            _group(f"ep_size_{EP_SIZE}_{i}", shared, g, f"ep_size_{EP_SIZE}", ep_rank)
            for i, g in enumerate(experts)
        ]
        columns.append((Rank(0, rank), own))
    return merge_ranks(columns)


def _group(
    name: str,
    ranks: tuple[int, ...],
    sizes: list[int],
    parallel_group: str | None = None,
    ep_rank: int | None = None,
) -> FlatGroup:
    rows = lay_out([FlatParam(f"p{numel}", numel, 0) for numel in sizes])
    return FlatGroup(name, ranks, rows, 0, parallel_group, ep_rank)


def tree(directory: Path) -> Tree:
    """All files under a directory, by name, with what they hold."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def convert(source: Path, destination: Path, to: Layout, workers: int = 4) -> None:
    """What victims do."""
    regroup_checkpoint(source, destination, to, workers=workers)


class Conversion:
    """A checkpoint, the groups it is converted to, and what comes out.

    Args:
        place: an empty directory.
        scale: of the parameters' sizes; 1000 gives some 25 MB.
        manifest: has the checkpoint ours?
    """

    def __init__(self, place: Path, scale: int, manifest: bool = True) -> None:
        dense = [10 * scale + i for i in range(8)]
        experts = [60 * scale + i for i in range(12)]
        self.place, self.source = place, place / "source"
        self.first = layout_of([dense], [experts[:5], experts[5:]])
        self.second = layout_of([dense[:3], dense[3:]], [experts[i : i + 3] for i in (0, 3, 6, 9)])
        values = random_state(self.first)
        make_checkpoint(self.source, self.first, values)
        if manifest:
            made = Manifest(self.first, "ZeRO-2", {"step": 7}, list_saved(self.source / TAG))
            write_manifest(made, self.source / TAG / FILE_NAME)
        self.before = tree(self.source)
        self.numbers = 0
        convert(self.source, self.new_place(), self.second)
        assert same(state_of(self.place / "1", self.second), values)
        self.right = tree(self.place / "1")

    def new_place(self) -> Path:
        """A destination that was not used."""
        self.numbers += 1
        return self.place / str(self.numbers)

    def start(self, destination: Path, **how: Any) -> Victim:
        """A process that converts, one file operation after the other."""
        watched = self.place if how else None
        return Victim(
            convert, self.source, destination, self.second, 1 if how else 4, watched=watched, **how
        )

    def problem(self, destination: Path) -> str | None:
        """What is wrong between two attempts: nothing may be lost, nothing half there."""
        if tree(self.source) != self.before:
            return "the source was changed"
        if destination.exists():
            return None if tree(destination) == self.right else "the destination is not right"
        with contextlib.suppress(CheckpointError):
            find_checkpoint(destination)
            return "the destination is there and is not"
        return None

    def finish(self, destination: Path) -> str | None:
        """Call again; what is wrong then."""
        place = destination.with_name(destination.name + ".incomplete")
        if destination.exists():  # killed behind the rename: the lock may lie there
            left = [*place.rglob("*")] if place.exists() else []
            assert {path.name for path in left} <= {".lock", ".job.json"}, left
        else:
            convert(self.source, destination, self.second)
            if place.exists():
                return f"{[*place.rglob('*')]} is left behind"
        return self.problem(destination)


def seconds_and_operations(conversion: Conversion) -> tuple[float, int]:
    """How long a conversion takes, in processor time and in file operations."""
    outcome = conversion.start(conversion.new_place(), at=-1).go().end()
    assert outcome.kind == "done"
    return outcome.seconds, outcome.operations


def kills(
    conversion: Conversion, fault: str, moments: list[list[float]], how: int = signal.SIGKILL
) -> Tally:
    """Send the signal at moments of processor time, several times where a row has several."""
    tally = Tally("converting", fault)
    for row in moments:
        destination, problem = conversion.new_place(), None
        for moment in row:
            if destination.exists():
                break
            victim = conversion.start(destination).go()
            victim.send_after(moment, how)
            outcome = victim.end()
            problem = problem or conversion.problem(destination)
            if outcome.kind == "raised" and outcome.value != "KeyboardInterrupt":
                problem = problem or f"{outcome.value}: {outcome.text}"
        _judge(tally, conversion, destination, problem, f"at {row} s")
    return tally


def kills_at_operations(conversion: Conversion, fault: str, operations: list[int]) -> Tally:
    """Kill it before each of these file operations."""
    tally = Tally("converting", fault)
    for at in operations:
        destination = conversion.new_place()
        conversion.start(destination, at=at).go().end()
        problem = conversion.problem(destination)
        _judge(tally, conversion, destination, problem, f"before operation {at}")
    return tally


def random_kills(conversion: Conversion, seed: int = 0, every: int = 1) -> list[Tally]:
    """20 times; two or three times in a row; and by the signals that ask politely.

    Args:
        every: one of so many is done.
    """
    seconds, _ = seconds_and_operations(conversion)
    draw = random.Random(seed)

    def moments(count: int, in_a_row: int = 1) -> list[list[float]]:
        return [[seconds * draw.random() for _ in range(in_a_row)] for _ in range(count)]

    return [
        kills(conversion, "kill -9 at a random moment", moments(20)[::every]),
        kills(
            conversion, "kill -9, twice or three times", (moments(5, 2) + moments(5, 3))[::every]
        ),
        kills(conversion, "Ctrl-C", moments(5)[::every], signal.SIGINT),
        kills(conversion, "SIGTERM", moments(5)[::every], signal.SIGTERM),
    ]


def every_third_operation(conversion: Conversion, every: int = 1) -> Tally:
    """Killed before every third file operation, and before each of the last; one of ``every``."""
    _, operations = seconds_and_operations(conversion)
    first, last = range(1, operations - 20, 3), range(operations - 20, operations + 1)
    moments = [*first, *last][::every]
    return kills_at_operations(conversion, "kill -9 before a file operation", moments)


def meetings(conversion: Conversion, every: int = 1) -> list[Tally]:
    """Two jobs that meet while the first one begins, at random, and while it ends.

    One of ``every`` meetings is tried.
    """
    seconds, operations = seconds_and_operations(conversion)
    edges = [*range(1, 14), *range(operations - 14, operations + 1)]
    return [
        two_jobs(conversion, edges[::every]),
        two_jobs_at_random(conversion, [seconds * n / 9 for n in range(10)][::every]),
    ]


def _judge(
    tally: Tally, conversion: Conversion, destination: Path, problem: str | None, where: str
) -> None:
    end = RIGHT if destination.exists() else AGAIN
    try:
        problem = problem or conversion.finish(destination)
    except Exception as error:
        problem = f"calling again: {type(error).__name__}: {error}"
    if problem:
        tally.wrong(f"{where}: {problem}")
    else:
        tally.add(end)


def two_jobs(conversion: Conversion, moments: list[int]) -> Tally:
    """Stop a job before a file operation, let another one run to its end, and go on."""
    tally = Tally("converting", "another job to the same destination")
    for at in moments:
        destination = conversion.new_place()
        first = conversion.start(destination, at=at, how=signal.SIGSTOP).go()
        first.wait_until_stopped()
        second = conversion.start(destination).go().end()
        first.go_on()
        _judge_two(tally, conversion, destination, [first.end(), second], f"operation {at}")
    return tally


def two_jobs_at_random(conversion: Conversion, delays: list[float]) -> Tally:
    """Start a second job when the first has used some processor time."""
    tally = Tally("converting", "another job at a random moment")
    for delay in delays:
        destination = conversion.new_place()
        first, second = conversion.start(destination), conversion.start(destination)
        first.go().send_after(delay, signal.SIGCONT)  # does nothing to a process that runs
        second.go()
        _judge_two(tally, conversion, destination, [first.end(), second.end()], f"after {delay} s")
    return tally


def _judge_two(
    tally: Tally, conversion: Conversion, destination: Path, ends: list[Any], where: str
) -> None:
    done = [end for end in ends if end.kind == "done"]
    error_lines = [
        end
        for end in ends
        if end.value == "CheckpointError"
        and str(destination) in end.text
        and ("another process" in end.text or "exists" in end.text)
    ]
    if len(done) != 1 or len(error_lines) != 1:
        tally.wrong(f"{where}: {ends}")
    else:
        _judge(tally, conversion, destination, conversion.problem(destination), where)
