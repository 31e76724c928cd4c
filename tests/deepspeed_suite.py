"""DeepSpeed's own tests of MoE layers, with ``MoE`` and the split of this library in place of its.

    python -m tests.deepspeed_suite

The tests are those of ``DEEPSPEED_SOURCE``, a checkout or a git URL; without it those of the
installed release on GitHub. They run on 4 CPU ranks, in a temporary copy, once as they are and
once with ours: a test that passes as it is has to pass with ours.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FILES = ["test_moe.py", "test_moe_tp.py", "test_moe_checkpoint.py"]
OURS = {"MoE", "split_params_into_different_moe_groups_for_optimizer"}
IMPORT = re.compile(r"^( *)from deepspeed\.moe\.(?:layer|utils) import (\w+(?:, \w+)*)$", re.M)
FP16 = """
# Processors that lack fp16 instructions compute it more slowly, but DeepSpeed refuses them.
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
CPU_Accelerator.is_fp16_supported = lambda self: True
CPU_Accelerator.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.float16]
"""


def get_tests(folder: Path) -> str | None:
    """Copy DeepSpeed's ``tests`` into ``folder``; returns why that was not possible."""
    source = os.environ.get("DEEPSPEED_SOURCE", "https://github.com/deepspeedai/DeepSpeed")
    checkout = Path(source)
    if not (checkout / "tests").is_dir():
        checkout = folder / "checkout"
        tag = f"v{version('deepspeed').partition('+')[0]}"
        command = ["git", "clone", "-q", "--depth=1", "--branch", tag, source, str(checkout)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{source} at {tag} cannot be cloned: {done.stderr.strip()}"
    shutil.copytree(checkout / "tests", folder / "tests")
    with (folder / "tests/unit/__init__.py").open("a") as file:
        file.write(FP16)
    return None


def use_ours(tests: Path) -> None:
    """Change the imports of the tests, and of the models that they share."""

    def changed(line: re.Match[str]) -> str:
        names, module = line[2].split(", "), line[0].split()[1]
        ours = [name for name in names if name in OURS]
        theirs = [name for name in names if name not in OURS]
        parts = [f"{line[1]}from moe_groups import {', '.join(ours)}"] * bool(ours)
        parts += [f"{line[1]}from {module} import {', '.join(theirs)}"] * bool(theirs)
        return "\n".join(parts)

    unit = tests / "unit"
    for path in [unit / "simple_model.py", unit / "checkpoint/common.py", *find(tests)]:
        path.write_text(IMPORT.sub(changed, path.read_text()))


def find(tests: Path) -> list[Path]:
    return [path for name in FILES for path in sorted((tests / "unit").rglob(name))]


def run(tests: Path) -> dict[str, str]:
    """What became of each test: "passed", "skipped", or the error."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LOCAL_SIZE": "4",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(ROOT / f".cache/torch_extensions-{version('deepspeed')}"),
    }
    report = tests.parent / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [*map(str, find(tests)), f"--junitxml={report}"]
    subprocess.run(command, cwd=tests, env=environment, check=False, stdout=subprocess.DEVNULL)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [part for part in case if part.tag in ("failure", "error", "skipped")]
        text = "passed" if not bad else f"{bad[0].tag}: {bad[0].attrib.get('message', '')[:300]}"
        found[f"{case.attrib['classname']}.{case.attrib['name']}"] = text
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if problem := get_tests(folder):
            print(f"SKIPPED: {problem}. Set DEEPSPEED_SOURCE to a checkout of DeepSpeed.")
            return 0
        theirs = run(folder / "tests")
        use_ours(folder / "tests")
        ours = run(folder / "tests")
    worse = {test: ours.get(test, "not run") for test, what in theirs.items() if what == "passed"}
    worse = {test: what for test, what in worse.items() if what != "passed"}
    for what, result in (("DeepSpeed's own", theirs), ("ours", ours)):
        kinds = [text.partition(":")[0] for text in result.values()]
        print(what, {kind: kinds.count(kind) for kind in sorted(set(kinds))})
    print(
        json.dumps(worse, indent=1) if worse else "every test that passes as it is does with ours"
    )
    return len(worse)


if __name__ == "__main__":
    sys.exit(main())
