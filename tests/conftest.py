"""End the rank processes with the session."""

from collections.abc import Iterator

import pytest

from tests.support.ranks import close_pools


@pytest.fixture(scope="session", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()
