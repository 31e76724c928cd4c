"""What happens to a checkpoint when saving, loading or converting is disturbed?

Counts results of the campaigns of `make campaign`: processes killed at random moments and before
file operations, concurrent jobs, full disks, damaged and missing files.

    python -m benchmarks.checkpoint_faults
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import write
from tests.support.checkpoints import (
    conversion_faults,
    conversion_work,
    damaged_sources,
    loading_faults,
    saving_faults,
)
from tests.support.checkpoints.conversion_faults import Conversion
from tests.support.checkpoints.fault_table import Tally
from tests.support.checkpoints.full_disk import small_disk
from tests.support.ranks import close_pools


def converting(place: Path) -> Iterator[Tally]:
    """Kills, concurrent jobs, a full disk, changed unfinished work, damaged sources."""
    large, small, tiny = (
        Conversion(place / name, scale=scale)
        for name, scale in {"large": 1500, "small": 30, "tiny": 1}.items()
    )
    yield from conversion_faults.random_kills(large)
    yield conversion_faults.every_third_operation(small)
    yield from conversion_faults.meetings(small)
    size = sum(path.stat().st_size for path in small.source.rglob("*") if path.is_file())
    with small_disk(place / "disk", 2 * size) as disk:
        yield conversion_work.filled_at_many_moments(small, disk)
    yield conversion_work.changed_work(small)
    yield conversion_work.changed_source(small)
    yield from damaged_sources.every_damage(tiny, lengths=20, bits=60)


def saving_and_loading(place: Path) -> Iterator[Tally]:
    """Kill real ranks while they save; load damaged files of other groups."""
    (place / "saving").mkdir()
    yield from saving_faults.random_kills_while_saving(place / "saving")
    for wrapper in ("zero2", "bf16"):
        yield from loading_faults.damaged_loads(place / wrapper, wrapper, lengths=6, bits=15)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        tallies = [*converting(place), *saving_and_loading(place)]
    close_pools()
    merged: dict[tuple[str, str], Tally] = {}
    for tally in tallies:
        known = merged.setdefault((tally.what, tally.fault), Tally(tally.what, tally.fault))
        known.ends.update(tally.ends)
        known.problems += tally.problems
    write("checkpoint_faults", [tally.row() for tally in merged.values()])
    for problem in (problem for tally in tallies for problem in tally.problems):
        print(problem)


if __name__ == "__main__":
    main()
