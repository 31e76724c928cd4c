"""The program behind ``make demo``, run as a user would, and the figures that README quotes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import EXTENSIONS, ROOT

SMALL = ["--steps", "2", "--batch", "2", "--length", "32"]


def run_demo(*args: str, ranks: int = 2) -> dict[str, list[str]]:
    """Cells of the comparison's rows by their first one."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    }
    program = str(ROOT / "docs" / "examples" / "train_moe_lm.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc-per-node", str(ranks), program, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The param groups, split by" in done.stdout
    table = done.stdout.partition("(worst rank):")[2]
    rows = [line.split("  ") for line in table.splitlines() if line.strip()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells}


def test_figures_in_the_readme() -> None:
    rows = run_demo("--steps", "2")
    stock, ours = rows["DeepSpeed's split"], rows["moe-groups"]
    assert stock[3] == ours[3], "the loss depends on the grouping"
    readme = (ROOT / "README.md").read_text()
    assert "| DeepSpeed's split | {} | {} | {} |".format(*stock) in readme
    assert "| moe-groups, by layer, cap 250,000 | {} | {} | {} |".format(*ours) in readme
    compact = rows["moe-groups, compact gradients"]
    assert stock[3] == compact[3], "the loss depends on how gradients are held"
    assert "| the same with `compact_gradients` | {} | {} | {} |".format(*compact) in readme


@pytest.mark.parametrize(
    ("args", "ranks"),
    [
        (["--bf16-optimizer", "--split-by", "expert"], 2),
        (["--zero-stage", "1", "--ep-size", "1", "--split-by", "parallel_group"], 4),
    ],
)
def test_flags(args: list[str], ranks: int, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("to be, or not to be: that is the question\n" * 50)
    rows = run_demo(*SMALL, *args, "--text", str(text), ranks=ranks)
    assert rows["DeepSpeed's split"][3] == rows["moe-groups"][3]
