"""Make README.md's tables from ``cuda.json``, which ``tests/gpu/run.sh`` wrote on a GPU.

The file is copied to ``results/``. The tables of a run on the CPU are only printed.

    python -m benchmarks.cuda_tables OUT/cuda.json
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, show, table

GIB = 2**30


def tables(parts: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of README's tables, by their marks."""
    found = {name: part["rows"] for name, part in parts.items()}
    memory, whole = found.get("step memory", []), found.get("iteration", [])
    prices = found.get("group price, stock", []) + found.get("group price, ours", [])
    return {
        "cuda_machine": found.get("machine", []),
        "cuda_group_price": [price_row(prices, *key) for key in dict.fromkeys(map(kind, prices))],
        "cuda_step_memory": [memory_row(row) for row in memory],
        "cuda_iteration": [iteration_row(row) for row in whole],
    }


def kind(row: dict[str, Any]) -> tuple[str, str]:
    return row["wrapper"], row["split"]


def price_row(prices: list[dict[str, Any]], wrapper: str, split: str) -> dict[str, Any]:
    rows = [row for row in prices if kind(row) == (wrapper, split)]
    few, many = rows[0], rows[-1]
    more = max(1, many["groups"] - few["groups"])
    shown: dict[str, Any] = {"wrapper": wrapper, "split": split}
    for what in ("groups", "initialize, s", "step, ms"):
        shown[what] = " / ".join(str(row[what]) for row in rows)
    for name, what, unit in (
        ("start-up per group, ms", "initialize, s", 1e3),
        ("step per group, ms", "step, ms", 1.0),
    ):
        shown[name] = round(unit * (many[what] - few[what]) / more, 3)
    return shown


def memory_row(row: dict[str, Any]) -> dict[str, Any]:
    predicted, measured = row["predicted T + R, bytes"], row["measured T + R, bytes"]
    return {
        "groups": row["groups"],
        "number": row["number"],
        "rank": row["rank"],
        "predicted T + R, GiB": f"{predicted / GIB:.3f}",
        "measured T + R, GiB": f"{measured / GIB:.3f}",
        "off by, bytes": f"{measured - predicted:,}",
        "peak of an iteration, GiB": f"{row['peak of an iteration, bytes'] / GIB:.3f}",
        "set by": row["set by"],
        "step, ms": row["step, ms"],
    }


def iteration_row(row: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: value for key, value in row.items() if key.endswith(", bytes")}
    shown = {key: value for key, value in row.items() if key not in ("by phase", *sizes)}
    return shown | {
        key.replace("bytes", "GiB"): f"{value / GIB:.3f}" for key, value in sizes.items()
    }


def write_tables(file: Path) -> None:
    """Print the tables; of a run on a GPU write them too."""
    found = json.loads(file.read_text())["parts"]
    machine = found["machine"]["rows"]
    on_gpu = bool(machine) and machine[0]["accelerator"] == "cuda"
    for name, rows in tables(found).items():
        if on_gpu and rows:
            show(name, rows)
        else:
            print(table(rows))
    if on_gpu:
        shutil.copy(file, RESULTS / "cuda.json")
    else:
        print("This run was not on a GPU: README.md and results/ are as before.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    write_tables(parser.parse_args().file)


if __name__ == "__main__":
    main()
