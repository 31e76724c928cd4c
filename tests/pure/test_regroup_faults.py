"""Conversions that are killed, run out of disk, meet damaged files or each other.

Whatever happens, the source stays as it is, under the destination's name is nothing or all,
and the same call goes on when the cause is gone.
"""

import random
from pathlib import Path

import pytest
import torch

from moe_groups.errors import CheckpointError
from tests import conversion_faults as faults
from tests.conversion_faults import Conversion
from tests.fault_table import check


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Two megabytes."""
    return Conversion(tmp_path_factory.mktemp("small"), scale=100)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Some tens of megabytes; a conversion takes about a second."""
    return Conversion(tmp_path_factory.mktemp("large"), scale=1500)


def test_killed_at_its_end_and_in_its_middle(small: Conversion) -> None:
    seconds, operations = faults.seconds_and_operations(small)
    last = [operations - n for n in range(12)]
    check(
        faults.kills_at_operations(small, "kill -9 in the last steps", last),
        faults.kills(small, "kill -9", [[seconds * part] for part in (0.2, 0.6)]),
    )


def test_two_jobs_to_one_destination(small: Conversion) -> None:
    _, operations = faults.seconds_and_operations(small)
    check(faults.two_jobs(small, [2, 7, 9, operations - 6, operations - 4]))


@pytest.mark.long
def test_killed_at_random_moments(large: Conversion) -> None:
    seconds, _ = faults.seconds_and_operations(large)
    moments = random.Random(0)
    rows = [[seconds * moments.random() for _ in range(n)] for n in [1] * 20 + [2] * 5 + [3] * 5]
    check(faults.kills(large, "kill -9", rows[:20]))
    check(faults.kills(large, "kill -9, two or three times in a row", rows[20:]))


@pytest.mark.long
def test_killed_before_any_file_operation(small: Conversion) -> None:
    _, operations = faults.seconds_and_operations(small)
    check(faults.kills_at_operations(small, "kill -9", list(range(1, operations + 1))))


@pytest.mark.long
def test_two_jobs_at_any_moment(small: Conversion) -> None:
    seconds, operations = faults.seconds_and_operations(small)
    delays = [seconds * n / 9 for n in range(10)]
    check(
        faults.two_jobs(small, [*range(1, 14), *range(operations - 15, operations + 1)]),
        faults.two_jobs_at_random(small, delays),
    )


@pytest.mark.parametrize("manifest", [False, True])
def test_shards_of_two_saves(manifest: bool, tmp_path: Path) -> None:
    """A save over an older checkpoint that was stopped, by a run that leaves no marker."""
    conversion = Conversion(tmp_path, scale=1, manifest=manifest)
    path = sorted(conversion.source.glob("*/*pp_rank_3_*"))[0]
    content = torch.load(path, weights_only=False)
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"{path.name} was saved after 8 steps.* after 7"):
        faults.convert(conversion.source, tmp_path / "b", conversion.second)
    assert not (tmp_path / "b").exists()
