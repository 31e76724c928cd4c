"""The programs of the pages on metrics and on experts' options, run as a user would."""

import re
from pathlib import Path

import pytest

from tests.distributed.test_demo import run_example
from tests.support import ROOT

EXAMPLES = ["group_metrics.py", "freeze_experts.py", "expert_lr.py"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name: str) -> None:
    assert len((ROOT / "docs/examples" / name).read_text().splitlines()) <= 60


@pytest.mark.long
def test_group_metrics(tmp_path: Path) -> None:
    picture = tmp_path / "experts.png"
    printed = run_example("group_metrics.py", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert re.findall(r"step (\d+): gradient norm 0\.\d+", printed) == ["10", "20", "30"]
    moved = [list(map(float, row.split())) for row in re.findall(r"moved by (.*) %", printed)]
    assert [len(row) for row in moved] == [8] * 3
    assert all(0 < value < 5 for row in moved for value in row)


@pytest.mark.long
def test_freeze_experts() -> None:
    printed = run_example("freeze_experts.py")
    assert "at first moved: [0, 1, 2, 3, 4, 5, 6, 7]" in printed
    assert "all but two frozen moved: [2, 5]" in printed


@pytest.mark.long
def test_expert_lr() -> None:
    rows = re.findall(
        r"step (\d+): dense (\S+), experts (\S+) (\S+) (\S+) (\S+)", run_example("expert_lr.py")
    )
    assert [row[0] for row in rows] == ["10", "20", "30"]
    for step, dense, *experts in rows:
        # The scheduler's rate of the step, that the multiplier is on top of.
        factor = min(1.0, (int(step) - 1) / 20)
        expected = [float(dense) * part for part in (0.5, 0.5, 0.5, factor)]
        assert list(map(float, experts)) == pytest.approx(expected, rel=0.01)
