"""The library in environments that people have: builds each, and runs the tests of each feature.

    make compatibility                    # all rows
    nox -f tests/noxfile.py -s "compatibility(oldest)" -- core

``make compatibility`` installs a wheel of this library without overriding any pin, beside the
releases of a row of :data:`ROWS`, in an environment that is deleted afterwards (torch with CUDA
takes 5 GB). What passed, what was refused and what failed goes into
``benchmarks/results/compatibility.json`` and the tables of ``docs/compatibility.md``. Names of
features (:data:`tests.compatibility.FEATURES`) after ``--`` run only these and print the tables;
with ``--write`` the outcomes replace those of the last run of the row.

``nox -s contract`` tries DeepSpeed from a folder, a wheel or a version, ``DEEPSPEED_SOURCE``, in
an environment with the versions of ``constraints.txt``: the tests of what we rely on in DeepSpeed,
and DeepSpeed's own MoE tests with our layer in place of its.
"""

import os
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".cache" / "compatibility"
FREE_BYTES = 12 * 2**30
nox.options.envdir = str(WORK / "environments")
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["compatibility"]
os.environ.setdefault("UV_HTTP_TIMEOUT", "300")  # seconds; torch with CUDA is 3 GB

TOOLS = ["transformers", "accelerate", "peft", "lightning", "safetensors"]
NEWEST = ("3.12", [])
"""A row: Python, and what is not the newest release that our own bounds allow."""
ROWS = {
    "newest": NEWEST,
    "torch 2.9": ("3.11", ["torch==2.9.1"]),
    "torch 2.6": ("3.11", ["torch==2.6.0"]),
    "torch 2.4": ("3.11", ["torch==2.4.1", "transformers==4.57.6"]),  # newer ones need torch 2.5
    "deepspeed 0.18.9": ("3.12", ["deepspeed==0.18.9"]),
    "deepspeed 0.17.6": ("3.12", ["deepspeed==0.17.6"]),
    "deepspeed 0.16.9": ("3.12", ["deepspeed==0.16.9"]),
    "deepspeed 0.14.5": ("3.11", ["deepspeed==0.14.5"]),
    "Python 3.10": ("3.10", []),
    "Python 3.13": ("3.13", []),
    "Python 3.14": ("3.14", []),
    "beside LlamaFactory": (
        "3.11",
        ["torch==2.11.0", "deepspeed==0.18.4", "transformers==5.8.1"],
    ),
    "a year ago": (
        "3.11",
        [
            *("torch==2.9.1", "deepspeed==0.18.2", "transformers==4.57.1"),
            *("accelerate==1.11.0", "peft==0.18.0", "lightning==2.5.6"),
        ],
    ),
    "oldest": (
        "3.10",
        [
            *("torch==2.4.1", "deepspeed==0.14.5", "numpy==1.26.4", "transformers==4.57.1"),
            *("accelerate==1.11.0", "peft==0.18.0", "lightning==2.5.6"),
        ],
    ),
}


@nox.session
@nox.parametrize(("python", "row"), [nox.param(at[0], row, id=row) for row, at in ROWS.items()])
def compatibility(session: nox.Session, row: str) -> None:
    """Run the tests of :mod:`tests.compatibility` in the environment of one row."""
    if shutil.disk_usage(ROOT).free < FREE_BYTES:
        session.skip(f"an environment needs {FREE_BYTES >> 30} GiB of free disk space")
    pins = ROWS[row][1]
    try:
        folder = WORK / row.replace(" ", "-")
        install(session, pins, folder)
        copy_tests(folder)
        session.chdir(folder)
        # DeepSpeed before 0.16 cannot read its own checkpoints with torch 2.6 or newer without it.
        trust = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"} if "deepspeed==0.14.5" in pins else {}
        features = [argument for argument in session.posargs if argument != "--write"]
        root = "-" if features and "--write" not in session.posargs else str(ROOT)
        command = ["python", "-m", "tests.compatibility", row, root, *features]
        session.run(*command, env={"PYTHONPATH": ".", **trust})
    finally:
        session.chdir(ROOT)
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def install(session: nox.Session, pins: list[str], folder: Path) -> None:
    """Install a wheel of ours, built in ``folder``, beside ``pins``, by its own bounds."""
    wheels = folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    session.chdir(ROOT)
    session.run("uv", "build", "-q", "--wheel", "-o", str(wheels), external=True)
    (wheel,) = wheels.glob("*.whl")
    others = [pin for pin in pins if not pin.startswith("deepspeed")]
    torch = next((pin for pin in pins if pin.startswith("torch=")), bound("torch"))
    numpy = next((pin for pin in pins if pin.startswith("numpy=")), "numpy")
    # DeepSpeed's setup imports torch.
    session.install("setuptools<81", "wheel", "ninja", "psutil", "packaging", torch, numpy)
    deepspeed = next((pin for pin in pins if pin.startswith("deepspeed")), bound("deepspeed"))
    session.install("--no-build-isolation", deepspeed)
    tests = ["pytest", "pytest-xdist", "hypothesis", "tqdm", "tabulate", "rich", "matplotlib"]
    tools = [tool for tool in TOOLS if not any(pin.startswith(f"{tool}=") for pin in pins)]
    session.install(str(wheel), *others, deepspeed, *tools, *tests)


def bound(package: str) -> str:
    """What we ourselves ask for."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    return next(one for one in needed if one.startswith(package))


def copy_tests(folder: Path) -> None:
    """Copy what tests need, without the package: they use the wheel."""
    for name in ("tests", "docs", "benchmarks"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name)
    for name in ("README.md", "pyproject.toml", "constraints.txt", "Makefile", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder / name)


@nox.session
def contract(session: nox.Session) -> None:
    """Try the DeepSpeed of ``DEEPSPEED_SOURCE``."""
    source = os.environ.get("DEEPSPEED_SOURCE") or session.error(
        "set DEEPSPEED_SOURCE to a checkout or a wheel of DeepSpeed, or to a version: "
        "DEEPSPEED_SOURCE=~/DeepSpeed make contract"
    )
    folder = WORK / "contract"
    install(session, [], folder)
    given = source if Path(source).exists() else f"deepspeed=={source}"
    session.install("--no-deps", "--no-build-isolation", "--force-reinstall", given)
    copy_tests(folder)
    session.chdir(folder)
    session.run("python", "-m", "tests.compatibility", "contract", "-", *session.posargs)
    session.run("python", "-m", "tests.deepspeed_suite")
