"""Print a benchmark's rows, and write them as data to ``results/`` and as a table to README.md."""

import json
import platform
from pathlib import Path
from typing import Any

import tabulate
import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def write(name: str, rows: list[dict[str, Any]], shown: list[dict[str, Any]] | None = None) -> None:
    """Write ``results/<name>.json`` (rows and versions) and the table at README's mark.

    Args:
        shown: rows of the table, if they differ from ``rows``.
    """
    import deepspeed

    RESULTS.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "machine": f"{device}, {torch.get_num_threads()} threads",
    }
    text = json.dumps({"benchmark": name, "versions": versions, "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    show(name, shown or rows)


def table(rows: list[dict[str, Any]]) -> str:
    return tabulate.tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """Print a table, and write it at README's mark."""
    shown = table(rows)
    print(shown)
    readme = HERE / "README.md"
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, _, rest = readme.read_text().partition(begin)
    after = rest.partition(end)[2]
    readme.write_text(f"{before}{begin}{shown}\n{end}{after}")
