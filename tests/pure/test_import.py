"""DeepSpeed is imported when it is used, not before; grouping needs neither values nor ranks."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from moe_groups import ExpertTag, create_moe_param_groups, describe, set_expert_tag
from moe_groups._common.arguments import SplitBy
from moe_groups._version import __version__
from moe_groups.errors import InvalidArgumentError, MissingPackageError
from moe_groups.groups.grouping import largest_group, padded_partition
from tests.support import ROOT

GROUP_A_MODEL = """
import torch
from moe_groups import create_moe_param_groups, describe, set_expert_tag, ExpertTag
model = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
for param in model[1].parameters():
    set_expert_tag(param, ExpertTag("ep_size_2", "moe", 0))
groups = create_moe_param_groups(model.parameters(), max_group_size=16)
assert "ep_size_2_moe.tile.0" in str(describe(groups))
"""


def run(code: str, *args: str) -> str:
    """What the code prints last, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


HEAVY = {"torch._dynamo", "torch._inductor", "torch._functorch", "torch.onnx", "sympy", "mpmath"}
"""Parts of torch, and what they bring, that take longer to import than the rest of it."""
HEAVY |= {"deepspeed", "transformers", "accelerate", "peft", "lightning", "pandas", "triton"}
HEAVY |= {"matplotlib", "rich", "safetensors", "tqdm", "tabulate"}


def loaded_by(code: str, *args: str, beside: str = "") -> set[str]:
    """Modules that the code imports, where those that ``beside`` imports are there."""
    before = f"import sys\n{beside}\nbefore = set(sys.modules)\n"
    return set(run(f"{before}{code}\nprint(*set(sys.modules) - before)", *args).split())


COMMAND = """
import sys
from moe_groups.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0
"""


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "plan --help",
        "topology --help",
        "topology --world-size 8 --ep 4 --json",
        "inspect-checkpoint --help",
        "regroup-checkpoint --help",
    ],
)
def test_what_no_command_line_needs_is_not_imported(command: str) -> None:
    assert not loaded_by(COMMAND, *command.split()) & (HEAVY | {"torch", "numpy"})


def test_an_import_brings_what_is_used_of_it() -> None:
    """All names together bring torch and numpy; the package alone brings neither."""
    package = loaded_by("import moe_groups; moe_groups.__version__; dir(moe_groups)")
    assert not package & (HEAVY | {"torch", "numpy"})
    everything = """
import moe_groups
for name in set(moe_groups.__all__) - {"MoE"}:  # the layer is DeepSpeed's
    getattr(moe_groups, name)
"""
    assert not loaded_by(everything, beside="import numpy, torch") & HEAVY


def test_another_deepspeed_is_refused_when_both_are_imported() -> None:
    run("""
import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine
del DeepSpeedEngine._do_optimizer_sanity_check
try:
    import moe_groups
except Exception as error:
    assert type(error).__name__ == "UnsupportedDeepSpeedError"
    assert "_do_optimizer_sanity_check" in str(error)
else:
    raise AssertionError("not refused")
""")


@pytest.mark.long
def test_each_module_can_be_the_first() -> None:
    """None needs that another one was imported before it."""
    run("""
import sys, torch, numpy
from pathlib import Path
import moe_groups
root = Path(moe_groups.__file__).parent
paths = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py")]
for name in sorted(".".join(path.parts) for path in paths if path.stem[:2] != "__"):
    for loaded in [loaded for loaded in sys.modules if loaded.startswith("moe_groups.")]:
        del sys.modules[loaded]
    __import__(name)
""")


def test_importing_and_grouping_a_dense_model_does_not_import_deepspeed() -> None:
    run("""
import sys
import moe_groups.groups.packing, moe_groups.groups.grouping, moe_groups.groups.rules
import torch
moe_groups.describe(moe_groups.create_moe_param_groups(torch.nn.Linear(4, 4)))
moe_groups.tag_experts(torch.nn.Linear(4, 4))
assert not [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]
moe_groups.MoE
assert "deepspeed" in sys.modules
""")


@pytest.mark.parametrize(
    ("module", "option", "said"),
    [
        ("moe_groups", "--help", "regroup-checkpoint"),
        ("moe_groups", "--version", f"moe-groups {__version__}\n"),
    ],
)
def test_the_command_line_runs_as_a_module(module: str, option: str, said: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, option], capture_output=True, text=True)
    assert done.returncode == 0
    assert said in done.stdout


PYPROJECT = ROOT / "pyproject.toml"
NEED = re.compile(r'\bneed\(\s*"(\w+)", "(\w+)"')


def test_a_missing_package_is_named_with_the_smallest_extra_that_has_it() -> None:
    table = (
        PYPROJECT.read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    )
    extras = {
        extra: set(re.findall(r'"(?:moe-groups\[)?([a-z]+)[^"]*"', packages))
        for extra, packages in re.findall(r"^(\w+) = \[(.*?)\]$", table, re.MULTILINE | re.DOTALL)
    }
    found = {}
    for path in (ROOT / "moe_groups").rglob("*.py"):
        if needs := NEED.findall(path.read_text()):
            packages = {package for package, _ in needs}
            fitting = [extra for extra in extras if packages <= extras[extra]]
            smallest = min(fitting, key=lambda extra: len(extras[extra]))
            assert {extra for _, extra in needs} == {smallest}, path
            found[path.name] = smallest
    assert len(found) > 7


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("integrations.hf_trainer", "transformers"),
        ("integrations.accelerate", "accelerate"),
        ("integrations.lightning", "lightning"),
    ],
)
def test_a_missing_package_is_an_import_error_of_ours(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"moe_groups.{module}", raising=False)
    with pytest.raises(MissingPackageError, match="pip install") as found:
        importlib.import_module(f"moe_groups.{module}")
    assert isinstance(found.value, InvalidArgumentError)
    assert isinstance(found.value, ImportError)
    assert found.value.name == package


def test_a_missing_torch_is_named() -> None:
    run("""
import sys
sys.modules["torch"] = None
import moe_groups
from moe_groups.cli import main
try:
    moe_groups.describe
except moe_groups.MoEGroupsError as error:
    assert "moe_groups.describe needs torch" in str(error) and "pip install torch" in str(error)
else:
    raise AssertionError
assert main(["topology", "--world-size", "8", "--json"]) == 0
assert main(["plan", "mixtral", "--world-size", "8", "--json"]) == 2
assert main(["inspect-checkpoint", "."]) == 2
""")


def test_what_works_offline_does_not_need_an_engine() -> None:
    loaded = loaded_by(
        "import moe_groups.checkpoints.inspect.inspect, moe_groups.checkpoints.convert.convert\n"
        "import moe_groups.topology"
    )
    ours = {name for name in loaded if name.startswith("moe_groups._deepspeed")}
    assert ours == {"moe_groups._deepspeed", "moe_groups._deepspeed.ports"}
    assert "deepspeed" not in loaded


def test_unconnected_ports_leave_deepspeed_as_it_is() -> None:
    from moe_groups._deepspeed.ports import Ports

    ports, engine = Ports(), object()
    assert ports.save_checkpoint(engine, dict, {"tag": "t"}) == {"tag": "t"}
    assert ports.load_checkpoint(engine, dict, {"tag": "t"}) == {"tag": "t"}
    assert ports.stage_problem([], None, True, True, "stage 0") == (False, None)
    for moment in ("engine_started", "process_groups_made", "checkpoint_loaded"):
        assert getattr(ports, moment)(engine) is None


def test_all_ports_are_connected_by_an_import() -> None:
    from moe_groups._deepspeed.ports import PORTS, Ports

    for field in fields(Ports):
        assert getattr(PORTS, field.name) is not getattr(Ports(), field.name), field.name


def test_no_plan_is_searched_for_to_warn() -> None:
    run("""
import sys, torch
from moe_groups import create_moe_param_groups
with torch.device("meta"):
    model = torch.nn.ModuleList(torch.nn.Linear(1 << 14, 1 << 14) for _ in range(8))
create_moe_param_groups(model, max_group_size=1 << 28, data_parallel_size=64)
assert "moe_groups.memory.step_cost" in sys.modules
assert "moe_groups.memory.search" not in sys.modules
""")


def test_what_comes_with_it() -> None:
    """Without extras: torch, and numpy, which DeepSpeed and transformers bring anyway."""
    listed = re.findall(r"^dependencies = \[(.*)\]", PYPROJECT.read_text(), re.MULTILINE)
    assert [re.findall(r'"([a-z]+)', line) for line in listed] == [["torch", "numpy"]]


def expert_model(device: str | None = None) -> nn.Module:
    model = nn.Module()
    model.dense = nn.Linear(8, 8, bias=False, device=device)
    model.experts = nn.ModuleList(nn.Linear(8, 4, bias=False, device=device) for _ in range(4))
    for number, param in enumerate(model.experts.parameters()):
        set_expert_tag(param, ExpertTag("ep_size_2", "moe", number, 4))
    return model


@pytest.mark.parametrize("split_by", ["parallel_group", "module", "expert"])
def test_meta_parameters_group_as_real_ones(split_by: SplitBy) -> None:
    real, meta = expert_model(), expert_model("meta")
    expected = create_moe_param_groups(real, split_by=split_by, max_group_size=70)
    found = create_moe_param_groups(meta, split_by=split_by, max_group_size=70)
    assert [g["name"] for g in found] == [g["name"] for g in expected]
    assert [[p.shape for p in g["params"]] for g in found] == [
        [p.shape for p in g["params"]] for g in expected
    ]
    assert str(describe(found)) == str(describe(expected))


def test_zero_3_placeholders_count_with_their_real_size() -> None:
    real, partitioned = expert_model(), expert_model()
    for param in partitioned.parameters():  # what ZeRO-3 leaves of a parameter
        param.ds_numel, param.ds_shape = param.numel(), param.shape  # type: ignore[attr-defined]
        param.data = torch.empty(0)
    for model in (real, partitioned):
        rows = describe(create_moe_param_groups(model, max_group_size=70)).rows
        assert [(row.tensors, row.elements) for row in rows] == [(1, 64), (2, 64), (2, 64)]


@given(
    numels=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    nbytes=st.integers(1, 200),
    world=st.sampled_from((2, 4, 8)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
)
def test_cap_in_bytes_bounds_the_partition_of_a_rank(
    numels: list[int], nbytes: int, world: int, dtype: torch.dtype
) -> None:
    """Dense parameters are shared by all ranks, experts of EP size 2 by half of them."""
    params = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in numels * 2]
    for param in params[: len(numels)]:
        set_expert_tag(param, ExpertTag("ep_size_2", "moe", 0))
    groups = create_moe_param_groups(params, max_group_bytes=nbytes, data_parallel_size=world)
    for row in describe(groups, data_parallel_size=world).rows:
        ranks = world // 2 if row.moe else world
        assert row.partition_bytes == padded_partition(row.elements, ranks) * dtype.itemsize
        assert row.partition_bytes <= nbytes or row.tensors == 1


@given(st.integers(1, 10**9), st.sampled_from((2, 4, 8)), st.integers(1, 1024))
def test_largest_group_is_the_largest(nbytes: int, itemsize: int, ranks: int) -> None:
    most = largest_group(nbytes, itemsize, ranks)
    assert padded_partition(most, ranks) * itemsize <= nbytes
    assert padded_partition(most + 1, ranks) * itemsize > nbytes


def test_the_smaller_cap_holds() -> None:
    params = [nn.Parameter(torch.zeros(10)) for _ in range(8)]

    def count(**caps: Any) -> int:
        return len(create_moe_param_groups(params, data_parallel_size=2, **caps))

    assert count(max_group_bytes=80) == 2  # 40 elements, 20 of them on each rank
    assert count(max_group_bytes=80, max_group_size=20) == 4
    assert count(max_group_bytes=80, max_group_size=80) == 2
