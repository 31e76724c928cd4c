"""Hash seeds under which a set of strings has different orders."""

import subprocess
import sys
from collections.abc import Sequence


def two_hash_seeds(names: Sequence[str]) -> tuple[str, str]:
    """Two values of PYTHONHASHSEED under which ``set(names)`` has different orders."""
    first = _order(names, "0")
    for seed in map(str, range(1, 50)):
        if _order(names, seed) != first:
            return "0", seed
    raise AssertionError(f"50 seeds give one order of {names}")


def _order(names: Sequence[str], seed: str) -> str:
    program = f"print(list(set({list(names)!r})))"
    return subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
