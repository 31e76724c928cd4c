"""The tests that tell whether a release of DeepSpeed works, in an environment for each release.

``make compatibility`` (``nox -f tests/noxfile.py``) runs all; each session writes what passed
into ``benchmarks/results/compatibility.json``, and the table into ``docs/compatibility.md``. Other
packages have the versions of ``constraints.txt``, which are the newest.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ["0.17.6", "0.18.9", "0.19.8"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
@nox.parametrize("deepspeed", RELEASES)
def compatibility(session: nox.Session, deepspeed: str) -> None:
    """Run the tests of :mod:`tests.compatibility` against one release."""
    session.install("torch==2.13.0", "setuptools", "wheel", "ninja", "packaging", "psutil", "numpy")
    session.install("--no-build-isolation", f"deepspeed=={deepspeed}")
    pinned = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    others = Path(session.create_tmp()) / "constraints.txt"
    others.write_text("".join(line for line in pinned if not line.startswith("deepspeed==")))
    session.chdir(ROOT)
    session.install("-c", str(others), "-e", ".[test]")
    session.run("python", "-m", "tests.compatibility")
