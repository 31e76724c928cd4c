"""The program behind ``make demo``, run as a user would, and the figures that README quotes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.ranks import EXTENSIONS, run_program

SMALL = ["--steps", "2", "--batch", "2", "--length", "32"]


def run_example(name: str, *args: str, ranks: int = 2) -> str:
    """What it prints."""
    return run_program(ranks, ROOT / "docs" / "examples" / name, *args)


def run_by_torchrun(name: str, *args: str, ranks: int = 2) -> str:
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    }
    program = str(ROOT / "docs" / "examples" / name)
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
    return done.stdout


def rows_of(printed: str) -> dict[str, list[str]]:
    """Cells of the comparison's rows by their first one."""
    assert "The param groups, split by" in printed
    table = printed.partition("(worst rank):")[2]
    rows = [line.split("  ") for line in table.splitlines() if line.strip()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.long
@pytest.mark.parametrize("start", [run_example, run_by_torchrun])
def test_figures_in_the_readme(start: Callable[..., str]) -> None:
    """Once as a user starts it; all other runs of programs skip the imports."""
    rows = rows_of(start("train_moe_lm.py", "--steps", "2"))
    stock, ours = rows["DeepSpeed's split"], rows["moe-groups"]
    assert stock[3] == ours[3], "the loss depends on the grouping"
    lean, few = rows["by expert, lean_step"], rows["no split, lean_step"]
    assert stock[3] == lean[3] == few[3], "the loss depends on how the groups are stepped"
    readme = (ROOT / "README.md").read_text()
    for name, cells in (
        ("DeepSpeed's split", stock),
        ("moe-groups, by layer, cap 250,000", ours),
        ("moe-groups, by expert, `lean_step`", lean),
        ("moe-groups, no split, `lean_step`", few),
    ):
        # The loss depends on the text, Python's library, and on how the processor rounds.
        assert "| {} | {} | {} | {} | ".format(name, *cells[:3]) in readme


@pytest.mark.long
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
    printed = run_example("train_moe_lm.py", *SMALL, *args, "--text", str(text), ranks=ranks)
    rows = rows_of(printed)
    assert rows["DeepSpeed's split"][3] == rows["moe-groups"][3]


@pytest.mark.long
@pytest.mark.parametrize("args", [["--pp", "2", "--ep", "2"], ["--tp", "2", "--attach"]])
def test_pipeline_example(args: list[str]) -> None:
    printed = run_example("pipeline_moe.py", *args, "--steps", "20", "--blocks", "2", ranks=4)
    losses = [float(text.split()[0].rstrip(",")) for text in printed.split("LM loss ")[1:]]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 5.6  # log(256) is what knows nothing
    assert printed.count("blocks.1 ") == 2
