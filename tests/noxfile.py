"""The tests that tell whether a release of DeepSpeed works, in an environment for each release.

``make compatibility`` (``nox -f tests/noxfile.py``) runs all; each session writes what passed
into ``benchmarks/results/compatibility.json``, and the table into ``docs/compatibility.md``. Other
packages have the versions of ``constraints.txt``, which are the newest. DeepSpeed's own MoE tests
run too (:mod:`tests.deepspeed_suite`), from GitHub or from the checkout ``DEEPSPEED_SOURCE``.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ["0.17.6", "0.18.9", "0.19.8"]
nox.options.envdir = str(ROOT / ".cache" / "nox")
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
@nox.parametrize("deepspeed", RELEASES)
def compatibility(session: nox.Session, deepspeed: str) -> None:
    """Run the tests of :mod:`tests.compatibility` against one release."""
    session.chdir(ROOT)
    pinned = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    others = Path(session.create_tmp()).resolve() / "constraints.txt"
    others.write_text("".join(line for line in pinned if not line.startswith("deepspeed==")))
    project = nox.project.load_toml("pyproject.toml")["project"]
    needed = [one for one in project["dependencies"] if not one.startswith("deepspeed")]
    needed += project["optional-dependencies"]["test"]
    session.install("-c", str(others), "setuptools", "wheel", "ninja", "psutil", "torch", "numpy")
    session.install("--no-build-isolation", f"deepspeed=={deepspeed}")
    session.install("-c", str(others), *needed)
    session.install("--no-deps", "-e", ".")
    session.run("python", "-m", "tests.compatibility")
    session.run("python", "-m", "tests.deepspeed_suite")
