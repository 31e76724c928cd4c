"""Lightning's own DeepSpeedStrategy, which wants CUDA, over our groups."""

import subprocess
import sys

import pytest
import torch

from tests.support import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def test_example() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(ROOT / "docs/examples/lightning_moe.py")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lr/ep_size_2_moe.expert.0.override.0" in done.stdout
