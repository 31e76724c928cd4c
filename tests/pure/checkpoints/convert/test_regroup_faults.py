"""Conversions that are killed, run out of disk, meet damaged files or each other.

Whatever happens, the source stays as it is, under the destination's name is nothing or all,
and the same call goes on when the cause is gone.
"""

import signal
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_groups.checkpoints.torch_file import check_crcs
from moe_groups.errors import CheckpointError
from tests.support.checkpoints import (
    conversion_faults as faults,
    conversion_work as work,
    damaged_sources as damage,
)
from tests.support.checkpoints.conversion_faults import TAG, Conversion
from tests.support.checkpoints.fault_table import check
from tests.support.checkpoints.full_disk import SmallDisk, small_disk

PAGE = 4096
ONE_OF = [
    pytest.param(5, id="some", marks=pytest.mark.long),
    pytest.param(1, id="all", marks=pytest.mark.campaign),
]
"""Of the moments of a campaign one in so many."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Files of a few KB, of which a good part is no tensor."""
    return Conversion(tmp_path_factory.mktemp("tiny"), scale=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Half a megabyte."""
    return Conversion(tmp_path_factory.mktemp("small"), scale=30)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Some tens of megabytes; a conversion takes about a second."""
    return Conversion(tmp_path_factory.mktemp("large"), scale=1500)


@pytest.fixture
def disk(small: Conversion, tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk for half of ``small``."""
    with small_disk(tmp_path / "disk", size_of(small) // 2) as made:
        yield made


def size_of(conversion: Conversion) -> int:
    return sum(path.stat().st_size for path in conversion.source.rglob("*") if path.is_file())


# ---- stopped --------------------------------------------------------------------------


@pytest.mark.long
def test_killed_in_its_middle_and_at_its_end(small: Conversion) -> None:
    seconds, operations = faults.seconds_and_operations(small)
    last = [operations - n for n in (1, 4, 7, 10)]
    check(
        faults.kills_at_operations(small, "kill -9 in the last steps", last),
        faults.kills(small, "kill -9", [[seconds * 0.3], [seconds * 0.6]]),
        faults.kills(small, "Ctrl-C", [[seconds * 0.4]], signal.SIGINT),
    )


@pytest.mark.parametrize("every", ONE_OF)
def test_killed_at_random_moments(large: Conversion, every: int) -> None:
    check(*faults.random_kills(large, every=every))


@pytest.mark.parametrize("every", ONE_OF)
def test_killed_before_file_operations(small: Conversion, every: int) -> None:
    check(faults.every_third_operation(small, every))


def test_threads_that_read_end_when_they_are_told(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    torch.save(torch.zeros(5_000_000), path)
    calls = []

    def stop(count: int) -> None:
        calls.append(count)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_crcs(path, stop)
    assert len(calls) == 1  # not called again, and the rest of the file is not read


# ---- another job ----------------------------------------------------------------------


def test_two_jobs_to_one_destination(small: Conversion) -> None:
    _, operations = faults.seconds_and_operations(small)
    check(faults.two_jobs(small, [2, 8, operations - 6, operations - 4]))


@pytest.mark.parametrize("every", ONE_OF)
def test_two_jobs_at_any_moment(small: Conversion, every: int) -> None:
    check(*faults.meetings(small, every))


# ---- full disk ------------------------------------------------------------------------


def test_full_disk(small: Conversion, disk: SmallDisk) -> None:
    check(
        work.too_small(small, disk, 2 * size_of(small)),
        work.filled(small, disk, [(0.5, 0), (1, 0)]),
    )


@pytest.mark.campaign
def test_full_disk_at_many_moments(small: Conversion, disk: SmallDisk) -> None:
    disk.remount(f"size={2 * size_of(small)}")
    check(work.filled_at_many_moments(small, disk))


def test_read_only_disk(small: Conversion, disk: SmallDisk) -> None:
    disk.remount("ro")
    with pytest.raises(CheckpointError, match=r"disk/b.incomplete: Read-only file system"):
        faults.convert(small.source, disk.path / "b", small.second)


# ---- changes while it is stopped ------------------------------------------------------


@pytest.mark.long
def test_unfinished_work_that_was_changed(small: Conversion) -> None:
    check(work.changed_work(small))


def test_a_source_that_changes(small: Conversion) -> None:
    check(work.changed_source(small))


# ---- damaged sources ------------------------------------------------------------------


def test_damaged_files(tiny: Conversion) -> None:
    check(*damage.every_damage(tiny, lengths=3, bits=4))


@pytest.mark.campaign
def test_damaged_files_at_many_places(tiny: Conversion) -> None:
    check(*damage.every_damage(tiny, lengths=20, bits=60))


def test_no_permission(tiny: Conversion) -> None:
    check(damage.forbidden(tiny))


@pytest.mark.parametrize("manifest", [False, True])
def test_shards_of_two_saves(manifest: bool, tmp_path: Path) -> None:
    """A save over an older checkpoint that was stopped, by a run that leaves no marker."""
    conversion = Conversion(tmp_path, scale=1, manifest=manifest)
    path = sorted(conversion.source.glob("*/*pp_rank_3_*"))[0]
    content = torch.load(path, weights_only=False)
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] += 1
    torch.save(content, path)
    problem_text = (
        "and moe_groups.json are of different saves" if manifest else "was saved after 8 steps"
    )
    with pytest.raises(CheckpointError, match=f"{path.name} {problem_text}"):
        faults.convert(conversion.source, tmp_path / "b", conversion.second)
    assert not (tmp_path / "b").exists()


def test_archives_that_are_not_deepspeeds_are_copied(tmp_path: Path) -> None:
    conversion = Conversion(tmp_path, scale=1)
    with zipfile.ZipFile(conversion.source / TAG / "logs.zip", "w", zipfile.ZIP_DEFLATED) as logs:
        logs.writestr("log", "x" * 1000)
    faults.convert(conversion.source, tmp_path / "b", conversion.second)
    assert (faults.tree(tmp_path / "b").items()) >= {
        (f"{TAG}/logs.zip", faults.tree(conversion.source)[f"{TAG}/logs.zip"])
    }
