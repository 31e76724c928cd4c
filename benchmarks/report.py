"""Print a benchmark's rows as a table and keep them as data in ``results/``."""

import json
import platform
from pathlib import Path
from typing import Any

import tabulate
import torch

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``results/<name>.json`` (rows and versions) and print the rows."""
    import deepspeed

    RESULTS.mkdir(exist_ok=True)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    text = json.dumps({"benchmark": name, "versions": versions, "rows": rows}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(tabulate.tabulate(rows, headers="keys", tablefmt="github"))
