"""Real ranks that are killed or run out of disk while they save, and damage met while loading.

What loads after that is what was saved under the tag, or nothing loads and an error says why.
"""

from pathlib import Path

from tests import saving_faults as faults
from tests.ranks import run_on_ranks


def test_deepspeed_loads_files_of_two_saves_and_the_guard_does_not(tmp_path: Path) -> None:
    """As a run leaves them that does not know this library and is killed in its save."""
    run_on_ranks(2, faults.save_halves_of_two, tmp_path)
    alone = run_on_ranks(2, faults.load, tmp_path, "zero2", regroup="off")
    assert {tag for tag, _ in alone} == {"first"}
    assert [value for _, value in alone] not in faults.saved(tmp_path, "first")
    for found in run_on_ranks(2, faults.load, tmp_path, "zero2"):
        assert found[0] == "refused"
        assert "of different saves (rank 0's after 4 steps, rank 1's after 2 steps)" in found[1]
