"""Conversions that are killed, run out of disk, meet damaged files or each other.

Whatever happens, the source stays as it is, under the destination's name is nothing or all,
and the same call goes on when the cause is gone.
"""

import random
from collections.abc import Iterator

import pytest

from tests import conversion_faults as faults
from tests.conversion_faults import Conversion
from tests.fault_table import check


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversion]:
    """Two megabytes."""
    yield Conversion(tmp_path_factory.mktemp("small"), scale=100)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Conversion]:
    """Some tens of megabytes; a conversion takes about a second."""
    yield Conversion(tmp_path_factory.mktemp("large"), scale=1500)


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
    seconds, operations = faults.seconds_and_operations(large)
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
