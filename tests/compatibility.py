"""What works in this environment? Runs the tests of each feature and keeps what became of them.

    python -m tests.compatibility ROW ROOT [FEATURE ...]

Puts the row, the installed versions and the outcomes into ``benchmarks/results/compatibility.json``
of the repository ``ROOT`` and writes the tables of its ``docs/compatibility.md`` anew; with ``-``
for ``ROOT`` only prints them. Exits with 1 if a test failed. ``tests/noxfile.py`` calls it in an
environment for each row. A test that ends in ``UnsupportedDeepSpeedError`` counts as refused where
DeepSpeed is older than the one in ``constraints.txt`` (``tests/conftest.py``).
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.version import Version
from tabulate import tabulate

from tests.support import ROOT

BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
FEATURES = {
    "core": ["test_core.py"],
    "ways in": ["test_integration.py"],
    "contract": ["test_contract.py", "test_contract_step.py", "test_contract_collectives.py"],
    "no hangs": ["test_no_hang.py"],
    "verify": ["test_verify.py"],
    "resume": ["test_resume.py"],
    "compact gradients": ["test_compact_gradients.py::test_trains_the_same"],
    "lean step": [
        "test_lean_step.py::test_trains_the_same",
        "test_lean_step.py::test_optimizers",
    ],
    "options, freezing": ["test_expert_control.py"],
    "metrics": ["test_group_metrics.py"],
    "losses": ["test_loss_tracker.py", "test_attach_loss.py"],
    "activations": ["test_checkpointing.py"],
    "load, save experts": ["test_load_experts.py"],
    "HF Trainer": ["test_hf_trainer.py", "test_moe_metrics.py"],
    "Accelerate": ["test_accelerate.py"],
    "Lightning": ["test_lightning.py"],
    "PEFT": ["test_peft.py"],
    "AutoEP": ["test_autoep.py"],
}
"""Files in ``tests/distributed`` (or a test of one), by feature."""

PACKAGES = ["torch", "deepspeed", "transformers", "accelerate", "peft", "lightning", "numpy"]


def run(features: Collection[str]) -> dict[str, dict[str, Any]]:
    """By feature: how many tests passed, and the messages of those that did not."""
    by_file, chosen = {}, []
    for feature in features:
        for name in FEATURES[feature]:
            file, _, test = name.partition("::")
            (path,) = (ROOT / "tests/distributed").rglob(file)
            chosen.append(f"{path}::{test}" if test else str(path))
            by_file[path.stem] = feature
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", *chosen]
        command += ["-m", "not long", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    found = {feature: _nothing() for feature in features}
    for case in cases:
        # A file that cannot be imported is a case whose name is that of the file.
        place = case.attrib["classname"] or case.attrib["name"]
        _count(case, found[by_file[place.rpartition(".")[2]]])
    return found


def _nothing() -> dict[str, Any]:
    return {"passed": 0, "refused": [], "skipped": [], "failed": {}}


def _count(case: ElementTree.Element, found: dict[str, Any]) -> None:
    bad = [part for part in case if part.tag in ("failure", "error", "skipped")]
    said = bad[0].attrib.get("message", "") if bad else ""
    if not bad:
        found["passed"] += 1
    elif bad[0].tag != "skipped":
        found["failed"][case.attrib["name"]] = _last_line(f"{said}\n{bad[0].text or ''}")
    elif said.startswith("refused: "):
        found["refused"].append(said.removeprefix("refused: "))
    else:  # a whole file that is skipped tells its place before the reason
        whole = re.search(r"Skipped: ([^']*)", bad[0].text or "")
        found["skipped"].append(whole[1] if whole and said == "collection skipped" else said)


def _last_line(text: str) -> str:
    """The error in a report of a failed test: the last line that names one."""
    named = re.findall(r"^E? *((?:\w+\.)*\w*(?:Error|Exception|Exit)\b.*)$", text, re.M)
    line = str(named[-1] if named else text.strip().rpartition("\n")[2])
    return re.sub(r"/\S*/", "", line)[:300]  # without the folders of this machine


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "none"
    return found


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Environments and outcomes; below them each refusal, skip and failure with its message."""
    rows = [[row, *found["versions"].values()] for row, found in results.items()]
    text = "### Environments\n\n" + _table(["", "Python", *PACKAGES], rows)
    ran = [name for name in FEATURES if any(name in one["features"] for one in results.values())]
    cells = [[name, *(_cell(found, name) for found in results.values())] for name in ran]
    text += "\n\n### Tests that pass (and those that are refused or skipped)\n\n"
    text += _table(["", *results], cells)
    for kind, title in (
        ("refused", "Refused with this message"),
        ("skipped", "Not run, for this reason"),
        ("failed", "Failures"),
    ):
        if lines := _messages(results, kind):
            text += f"\n\n### {title}\n\n" + "\n".join(lines)
    return text


def _table(head: list[str], rows: list[list[str]]) -> str:
    return str(tabulate(rows, headers=head, tablefmt="github", disable_numparse=True))


def _cell(found: dict[str, Any], feature: str) -> str:
    counts = found["features"].get(feature)
    if counts is None:
        return "not run"
    refused, failed = len(counts["refused"]) + len(counts["skipped"]), len(counts["failed"])
    text = f"{counts['passed']}" + f" ({refused})" * bool(refused)
    return text + f", **{failed} failed**" * bool(failed)


def _messages(results: dict[str, dict[str, Any]], kind: str) -> list[str]:
    """Each message once, with the rows and features that it is from."""
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row, found in results.items():
        for feature, counts in found["features"].items():
            said = counts.get(kind, [])
            for text in {*(said.values() if isinstance(said, dict) else said)}:
                same = re.sub(r"^deepspeed \d\S* ", "DeepSpeed ", text).replace("`", "")
                places[same][row].append(feature)
    lines = []
    for text, by_row in places.items():
        where = "; ".join(f"{row}: {', '.join(features)}" for row, features in by_row.items())
        lines.append(f"- `{text}` ({where})")
    return lines


def main() -> int:
    row, root, *chosen = sys.argv[1:]
    if unknown := {*chosen} - {*FEATURES}:
        sys.exit(f"unknown features {sorted(unknown)}: there are {', '.join(FEATURES)}")
    features = run(chosen or FEATURES)
    found = {"versions": versions(), "features": features}
    if root == "-":
        print(tables({row: found}))
    else:
        write(Path(root), row, found)
    return int(any(counts["failed"] for counts in features.values()))


def _newest_first(row: tuple[str, dict[str, Any]]) -> list[Version]:
    return [Version(row[1]["versions"][name]) for name in ("deepspeed", "torch", "python")]


def write(root: Path, row: str, found: dict[str, Any]) -> None:
    """Put ``found`` in the place of an earlier run of the row."""
    path, page = root / "benchmarks/results/compatibility.json", root / "docs/compatibility.md"
    results = json.loads(path.read_text()) if path.exists() else {}
    earlier = results.get(row, {"versions": None})
    if earlier["versions"] == found["versions"]:  # not all features need to run again
        found["features"] = earlier["features"] | found["features"]
    results[row] = found
    results = dict(sorted(results.items(), key=_newest_first, reverse=True))
    path.write_text(json.dumps(results, indent=1) + "\n")
    before, _, rest = page.read_text().partition(BEGIN)
    text = f"{before}{BEGIN}\n{tables(results)}\n\n{END}{rest.partition(END)[2]}"
    page.write_text(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
