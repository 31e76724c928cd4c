"""Skip what an old release of DeepSpeed refuses, with its message; end ranks with the session."""

import re
from collections.abc import Generator, Iterator
from importlib.metadata import version

import pytest
from packaging.version import Version

from moe_groups._deepspeed.patching import TESTED_VERSION
from tests.support.ranks import close_pools

# DeepSpeed refuses a config with NotImplementedError; AutoEP and others refuse some torch.
REFUSED = re.compile(
    r"(?:UnsupportedDeepSpeedError|NotImplementedError): (.*)"
    r"|(?:ImportError|ValueError): (PyTorch .* requires .*|Due to .* upgrade torch .*)"
    r"|RuntimeError: (GroupedExperts .* torch._grouped_mm is not available .*)"
)
OLD = Version(version("deepspeed")) < Version(TESTED_VERSION) or (
    Version(version("torch")) < Version("2.9")
)


@pytest.fixture(scope="session", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Refusing is right in a release that lacks something, never in the pinned ones."""
    report = yield
    if call.excinfo is not None and OLD:
        refused = REFUSED.search(str(call.excinfo.value)) or REFUSED.search(call.excinfo.exconly())
        if refused:
            report.outcome = "skipped"
            report.longrepr = (
                str(item.path),
                item.location[1] or 0,
                f"refused: {next(filter(None, refused.groups()))}",
            )
    return report
