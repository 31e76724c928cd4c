"""Run the parts of a benchmark in processes of their own, so that none takes the others with it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.support import ROOT
from tests.support.ranks import EXTENSIONS

LIMIT = 540.0
"""Seconds of all parts together."""


class Rows:
    """The rows of a part: each is in the file at once, so that a killed part has its first ones."""

    def __init__(self, file: str) -> None:
        self.file = file

    def add(self, **row: Any) -> None:
        print(row, flush=True)
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")


def run_parts(module: str, limits: dict[str, float], out: Path) -> bool:
    """Run parts one after the other, and write what they found into ``out`` after each.

    Args:
        module: ``python -m module part NAME FILE`` runs a part, which adds its rows to FILE. The
            part "machine" comes first; its row has the accelerator for the others.
        limits: seconds of each part, by name; all together have :data:`LIMIT`.
        out: the folder for ``cuda.json`` and ``log.txt``.

    Returns:
        Whether all parts passed.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    parts: dict[str, Any] = {}
    device, end = None, time.monotonic() + LIMIT
    for name, limit in limits.items():
        limit = max(1.0, min(limit, end - time.monotonic()))
        print(f"{name}, at most {limit:.0f} s", flush=True)
        found = parts[name] = _run_part(module, name, limit, out / "log.txt", device)
        print(*found["rows"], found["failure"] or "passed", sep="\n", flush=True)
        if name == "machine" and found["rows"]:
            device = found["rows"][0]["accelerator"]
        text = json.dumps({"benchmark": "cuda", "accelerator": device, "parts": parts}, indent=1)
        (out / "cuda.json").write_text(text + "\n")
    return not any(part["failure"] for part in parts.values())


def _run_part(
    module: str, name: str, limit: float, log: Path, device: str | None
) -> dict[str, Any]:
    """Its seconds, the rows that it wrote, and why it failed or None.

    What it prints is added to ``log``, and all processes that it started end with it.
    """
    begin, scratch = time.monotonic(), Path(tempfile.mkdtemp(prefix="moe-groups-cuda-"))
    rows, at = scratch / "rows", log.stat().st_size
    command = [sys.executable, "-m", module, "part", name, str(rows)]
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(device),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            failure = f"ended with code {code}" if code else None
        except subprocess.TimeoutExpired:
            failure = f"not done after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = rows.read_text().splitlines() if rows.exists() else []
    shutil.rmtree(scratch)
    if failure:
        failure += ": " + log.read_bytes()[at:][-2500:].decode(errors="replace")
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "failure": failure,
        "rows": [json.loads(row) for row in found],
    }


def _environment(device: str | None) -> dict[str, str]:
    """That of a world of one; fake worlds set their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # A machine without network has only the loopback interface.
    found = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"} | os.environ
    found |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONUNBUFFERED": "1"}
    found |= {"TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    found |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return found | ({"DS_ACCELERATOR": device} if device else {})
