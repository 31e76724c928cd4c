"""Does this DeepSpeed do what is relied on? Runs tests of each feature and keeps the counts.

    python -m tests.compatibility [FEATURE ...]

Adds the installed versions and the counts to ``benchmarks/results/compatibility.json``, and writes
the table in ``docs/compatibility.md`` anew. Meant for an environment of each release of DeepSpeed
(``tests/noxfile.py``).
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"

FEATURES = {
    "ways in": ["test_integration.py"],
    "the contract": ["test_contract.py", "test_contract_step.py", "test_contract_collectives.py"],
    "no hangs": ["test_no_hang.py"],
    "verify": ["test_verify.py"],
    "resume": ["test_resume.py"],
    "HF Trainer": ["test_hf_trainer.py"],
    "Accelerate": ["test_accelerate.py"],
    "Lightning": ["test_lightning.py"],
    "PEFT": ["test_peft.py"],
    "AutoEP": ["test_autoep.py"],
}
"""Files in ``tests/distributed`` by feature."""

PACKAGES = ["deepspeed", "torch", "transformers", "accelerate", "lightning", "peft"]


def run_feature(files: list[str]) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and the first lines of the errors."""
    paths = [str(next((ROOT / "tests/distributed").rglob(name))) for name in files]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *paths, "-m", "not long", f"--junitxml={report}"]
        # Compiled for one release: another one must not load it.
        extensions = f"torch_extensions-{version('deepspeed')}"
        environment = {**os.environ, "MOE_GROUPS_TEST_EXTENSIONS": extensions}
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or _broken(case)]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": sorted(case.attrib["name"] for case in failed),
        "skipped": len(skipped),
    }


def _broken(case: ElementTree.Element) -> bool:
    return case.find("error") is not None


def versions() -> dict[str, str]:
    """Of the packages that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_page(results: list[dict[str, Any]]) -> None:
    """Put the table of all runs between the marks of the page."""
    columns = []
    for result in sorted(results, key=lambda one: one["versions"]["deepspeed"], reverse=True):
        cells = [result["versions"][name] for name in PACKAGES]
        columns.append([*cells, *(_cell(result["features"].get(name)) for name in FEATURES)])
    head, *rows = zip([*PACKAGES, *FEATURES], *columns, strict=True)
    table = tabulate(rows, headers=head, tablefmt="github", disable_numparse=True)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + "\n" + table + "\n\n" + END + rest.partition(END)[2])


def _cell(counts: dict[str, Any] | None) -> str:
    if counts is None:
        return "not run"
    failed = len(counts["failed"])
    if not failed and not counts["passed"]:
        return "not there"
    return f"{counts['passed']} of {counts['passed'] + failed}"


def main() -> None:
    found: dict[str, Any] = {"versions": versions(), "features": {}}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    before = [one for one in results if one["versions"] == found["versions"]]
    for name, files in FEATURES.items():
        if name in (sys.argv[1:] or FEATURES):
            found["features"][name] = run_feature(files)
        elif before:
            found["features"][name] = before[0]["features"][name]
    mine = found["versions"]["deepspeed"]
    results = [one for one in results if one["versions"]["deepspeed"] != mine] + [found]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


if __name__ == "__main__":
    main()
