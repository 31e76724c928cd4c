"""Real ranks that are killed or run out of disk while they save, and damage met while loading.

What loads after that is what was saved under the tag, or nothing loads and an error says why.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import loading_faults, saving_faults as faults
from tests.support.checkpoints.fault_table import check
from tests.support.checkpoints.full_disk import SmallDisk, small_disk
from tests.support.checkpoints.saving_faults import WORLD, Kill
from tests.support.checkpoints.saving_runs import (
    how_it_ended,
    save_halves_of_two,
    save_on_full_disk,
)
from tests.support.ranks import RankError, run_in_fresh_processes, run_on_ranks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 8 << 20) as made:
        yield made


# ---- kill -9 while it saves -----------------------------------------------------------


def test_killed_while_it_saves(tmp_path: Path) -> None:
    kills = [Kill("zero2", False, (1,), 0.02), Kill("bf16", True, (0, 1), 0.03)]
    check(faults.kill_saves(tmp_path, "kill -9", kills))


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(7, id="some", marks=pytest.mark.long),
        pytest.param(1, id="all", marks=pytest.mark.campaign),
    ],
)
def test_killed_at_random_moments_of_saving(every: int, tmp_path: Path) -> None:
    check(*faults.random_kills_while_saving(tmp_path, every))


def test_deepspeed_loads_files_of_two_saves_and_the_guard_does_not(tmp_path: Path) -> None:
    """As a run leaves them that does not know this library and is killed in its save."""
    run_on_ranks(WORLD, save_halves_of_two, tmp_path)
    alone = run_on_ranks(WORLD, faults.load, tmp_path, "zero2", regroup="off")
    assert {tag for tag, _ in alone} == {"first"}
    assert [value for _, value in alone] not in faults.saved(tmp_path, "first")
    for found in run_on_ranks(WORLD, faults.load, tmp_path, "zero2"):
        assert found[0] == "refused"
        assert "of different saves (rank 0's after 4 steps, rank 1's after 2 steps)" in found[1]


def test_latest_that_names_nothing(tmp_path: Path) -> None:
    """As DeepSpeed leaves it when it is killed between opening and writing it."""
    run_on_ranks(WORLD, loading_faults.save, tmp_path, "zero2")
    (tmp_path / "checkpoints/latest").write_text("")
    for end, text in run_on_ranks(WORLD, faults.load, tmp_path, "zero2"):
        assert end == "refused"
        assert "latest is empty: a save was stopped while it was written" in text


# ---- full disk while it saves ---------------------------------------------------------


def saved_on_full_disk(disk: SmallDisk, second: str, room: str) -> list[Any]:
    """How it ended; then there is room again."""
    with contextlib.suppress(RankError):
        run_in_fresh_processes(WORLD, save_on_full_disk, disk.path, "zero2", second, room)
    disk.make_room()
    return [how_it_ended(disk.path, rank) for rank in range(WORLD)]


def loaded(disk: SmallDisk, tag: str | None = None) -> Any:
    return run_on_ranks(WORLD, faults.load, disk.path, "zero2", tag)


def is_right(disk: SmallDisk, tag: str, found: Any) -> bool:
    names, values = zip(*found, strict=True)
    return set(names) == {tag} and [*values] in faults.saved(disk.path, tag)


@pytest.mark.parametrize("second", ["first", "second"])
def test_no_room_for_anything(second: str, disk: SmallDisk) -> None:
    ends = saved_on_full_disk(disk, second, "none")
    assert any(end and end.error for end in ends)  # what torch or the system says
    for end, text in loaded(disk, second):
        assert end == "refused"
        assert f"{disk.path}/checkpoints/{second} was not saved to its end" in text
    if second == "second":  # nothing is lost
        assert is_right(disk, "first", loaded(disk))


def test_saved_over_where_there_is_no_more_room(disk: SmallDisk) -> None:
    assert saved_on_full_disk(disk, "first", "as much") == [("", []), ("", [])]
    assert is_right(disk, "first", loaded(disk))


def test_no_room_for_the_manifest(disk: SmallDisk) -> None:
    first, other = saved_on_full_disk(disk, "second", "files")
    assert (first.error, other.error, other.warnings) == ("", "", [])
    (text,) = first.warnings
    assert "moe_groups.json could not be written" in text
    assert "No space left on device" in text
    assert is_right(disk, "second", loaded(disk))


def test_no_room_for_latest(disk: SmallDisk) -> None:
    for end in saved_on_full_disk(disk, "second", "manifest"):
        assert end is not None  # both got the error
        assert end.error.startswith("CheckpointError: ")
        assert "second was saved, but" in end.error
        assert "latest cannot be written (No space left on device): give the tag" in end.error
    assert is_right(disk, "first", loaded(disk))
    assert is_right(disk, "second", loaded(disk, "second"))


# ---- damage met while other groups are loaded -----------------------------------------


@pytest.mark.parametrize("wrapper", ["zero2", pytest.param("bf16", marks=pytest.mark.long)])
def test_damaged_files_of_other_groups(wrapper: str, tmp_path: Path) -> None:
    check(*loading_faults.damaged_loads(tmp_path, wrapper, lengths=1, bits=1))


@pytest.mark.campaign
@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_damaged_files_of_other_groups_at_many_places(wrapper: str, tmp_path: Path) -> None:
    check(*loading_faults.damaged_loads(tmp_path, wrapper, lengths=6, bits=15))


def test_an_error_on_one_rank_while_other_groups_are_loaded(tmp_path: Path) -> None:
    run_on_ranks(WORLD, loading_faults.save, tmp_path, "bf16")
    with pytest.raises(RankError, match=r"rank 1: (?s:.*)an error of rank 1"):
        run_on_ranks(WORLD, loading_faults.load_with_error_on_rank_1, tmp_path, "bf16")


@pytest.mark.parametrize("pages", [3, -3])
def test_scratch_disk_too_small(pages: int, tmp_path: Path, disk: SmallDisk) -> None:
    """The error comes before anything is written, or in the middle of it."""
    run_on_ranks(WORLD, loading_faults.save, tmp_path, "zero2")
    files = [*(tmp_path / "checkpoints/first").glob("*_states.pt")]
    needed = sum(path.stat().st_size for path in files if "expert" not in path.name)
    disk.remount(f"size={needed + pages * 4096}")
    made = {"split": "expert", "regroup": "auto", "scratch": disk.path}
    for end, text in run_on_ranks(WORLD, faults.load, tmp_path, "zero2", **made):
        assert end == "refused"
        assert str(disk.path) in text
        assert "bytes" in text if pages < 0 else "No space left" in text or "torch.save" in text
    assert not [*disk.path.iterdir()]
