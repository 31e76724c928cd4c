"""``moe-groups plan``: what it prints and draws, and one line for bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_groups import StepConfig, cli, estimate_step_memory, plan_param_groups
from moe_groups.cli.render import name_pattern, same_but_numbers
from moe_groups.memory.estimate import GroupMemory
from moe_groups.meta_models.rank import shard_for_rank
from moe_groups.meta_models.source import load_model
from tests.support import ROOT

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "vocab_size": 128,
}
MODULE = """
import torch
from torch import nn
from moe_groups import ExpertTag, set_expert_tag


def build():
    print("said while building")
    model = nn.Module()
    model.dense = nn.Linear(64, 64)
    model.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
    for number, expert in enumerate(model.experts):
        for param in expert.parameters():
            set_expert_tag(param, ExpertTag("ep_size_4", "layer", number, 2))
    return model


def fails():
    raise RuntimeError("first line\\nsecond line")
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "models_of_the_cli_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models_of_the_cli_test", raising=False)
    return "models_of_the_cli_test"


def run(*args: object) -> int:
    try:
        return cli.main(["plan", *map(str, args)])
    except SystemExit as stop:
        return int(stop.code or 0)


def as_json(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert run(*args, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def rank_model(config: str, ep_size: int) -> torch.nn.Module:
    return shard_for_rank(load_model(config), ep_size=ep_size)


# ---- what is computed -----------------------------------------------------------------


def test_json_is_what_the_library_says(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, config, "--world-size", 8, "--ep", 4, "--max-groups", 6)
    plan = plan_param_groups(rank_model(config, 4), max_groups=6, data_parallel_size=8)
    memory = plan.memory
    for figure in ("transient", "held", "step_peak", "first_step_peak", "least", "resident"):
        assert found["memory"][figure] == getattr(memory, figure)
    assert [group["name"] for group in found["groups"]] == [group[0] for group in plan.groups]
    assert found["curve"] == [
        {"groups": one.groups, "step_peak": one.step_peak, "lean_peak": one.lean_peak}
        for one in plan.curve
    ]
    lean = StepConfig(lean_step="64MiB")
    peak = estimate_step_memory(plan, step=lean).step_peak
    assert found["marks"]["plan"]["lean_peak"] == peak
    assert found["marks"]["plan"]["groups"] == len(plan.groups)
    assert found["topology"] == {
        "world_size": 8,
        "data_parallel_size": 8,
        "expert_parallel_sizes": [4],
        "tensor_parallel_size": 1,
        "pipeline_stages": 1,
        "pipeline_stage": 0,
    }
    parameters = found["parameters"]
    assert parameters["rank_experts"] == 3 * 2 * 3 * 64 * 96
    assert parameters["rank_experts"] < parameters["rank"] < parameters["model"]
    assert set(found["step"]) == set(StepConfig.__dataclass_fields__)


@pytest.mark.parametrize("cap", [178956971, 40000, 18432, 5000])
def test_stock_split_is_deepspeeds(
    config: str, cap: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    capsys.readouterr()  # what DeepSpeed says when it is imported
    monkeypatch.setattr("moe_groups.memory.plan.DEEPSPEED_MAX_GROUP_SIZE", cap)
    found = as_json(capsys, config, "--world-size", 8, "--ep", 4)["marks"]["stock"]
    params = list(rank_model(config, 4).parameters())
    groups = [g for g in split({"params": params, "name": "dense"}, cap) if g["params"]]
    memory = estimate_step_memory(groups, data_parallel_size=8)
    assert found["groups"] == len(groups)
    for figure in ("transient", "held", "step_peak"):
        assert found[figure] == getattr(memory, figure)


def test_a_cap_plans_nothing(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, config, "--world-size", 8, "--ep", 2, "--cap", "20_000")
    experts = [g for g in found["groups"] if g["name"].startswith("ep_size_2")]
    assert max(group["elements"] for group in experts) <= 20_000
    assert found["curve"] == found["hints"] == []
    assert found["marks"]["plan"]["label"] == "cap 20,000"


def test_stage_with_most_parameters_is_planned(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {}
    for stage in (0, 1):
        found = as_json(capsys, config, "--world-size", 8, "--pp", 2, "--pp-rank", stage)
        assert found["topology"]["data_parallel_size"] == 4
        sizes[stage] = found["parameters"]["rank"]
    found = as_json(capsys, config, "--world-size", 8, "--pp", 2)
    assert found["parameters"]["rank"] == max(sizes.values())
    assert found["topology"]["pipeline_stage"] == max(sizes, key=lambda stage: sizes[stage])


def test_offloading_has_a_host_and_no_curve(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, config, "--world-size", 8, "--optimizer", "CPUAdam")
    assert found["memory"]["step_peak"] == 0
    assert found["memory"]["host"]["optimizer state"] > 0
    assert found["curve"] == []


def test_lean_step_has_the_fewest_groups(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--world-size",
        8,
        "--ep",
        4,
        "--split-by",
        "expert",
        "--lean-step",
        "--tile",
        "12KiB",
    )
    found = as_json(capsys, config, *options)
    (point,) = found["curve"]
    assert point["groups"] == len(found["groups"]) == found["marks"]["no_cap"]["groups"]
    assert point["step_peak"] == point["lean_peak"] == found["memory"]["step_peak"]
    assert found["memory"]["transient"] <= 12 * 1024
    assert found["step"]["lean_step"] == "12KiB"
    assert not any("lean_step" in hint for hint in found["hints"])


@pytest.mark.long
def test_deepseek_v3_at_256_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "deepseek_v3", "--world-size", 256, "--ep", 32)
    assert 650e9 < found["parameters"]["model"] < 700e9
    assert found["topology"]["data_parallel_size"] == 256
    peaks = {key: mark["step_peak"] for key, mark in found["marks"].items()}
    assert peaks["plan"] <= min(peaks["stock"], peaks["no_cap"])


# ---- how it is shown ------------------------------------------------------------------


def test_text_fits_100_columns_and_has_all_parts(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(os.path.dirname(config))
    args = "config.json", "--world-size", 16, "--ep", 4, "--split-by", "expert"
    assert run(*args) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert max(map(len, shown.out.splitlines())) <= 100
    for part in (
        "on 16 ranks: DP 16, EP 4, TP 1, PP 1; ZeRO-2, foreach, bf16 gradients",
        "Memory on the worst rank",
        "ep_size_4_model.layers.{0..2}.mlp.expert.{0..1}",
        "DeepSpeed's split, cap 178,956,971",
        "by expert, no cap",
        "the plan",
    ):
        assert part.replace(" ", "") in "".join(shown.out.split())  # long names take two lines


def test_groups_fold_where_names_differ_in_numbers() -> None:
    rows = [GroupMemory(f"moe.{i}.tile.{j}", 10 * i, 4, i, i, j) for i in (2, 5) for j in (0, 1)]
    dense = GroupMemory("dense", 7, 8, 2, 3, 4)
    assert same_but_numbers([dense, *rows], lambda row: row.ranks) == [[dense], rows]
    assert name_pattern([row.name for row in rows]) == "moe.{2..5}.tile.{0..1}"


def test_plots(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, page = tmp_path / "plan.png", tmp_path / "plan.html"
    for path in (picture, page):
        assert run(config, "--world-size", 8, "--ep", 4, "--plot", path) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    source = page.read_text()
    assert "<svg" in source
    assert source.count("<path") > 20
    assert "step peak T + R" in source
    assert not re.search(r"<script|<link|src=", source)  # nothing is fetched


def test_output_is_json_alone_without_process_groups(module: str) -> None:
    code = (
        "import sys, torch\n"
        "from moe_groups.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert 'rich' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "sys.exit(status)"
    )
    args = ["plan", f"{module}:build", "--world-size", "8", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["topology"]["expert_parallel_sizes"] == [4]
    assert done.stderr == "said while building\n"


def test_page_runs_the_command_that_it_shows() -> None:
    page = (ROOT / "docs/step-memory.md").read_text()
    ran = re.findall(r'^main\("(.*)"\.split\(\)\)$', page, re.MULTILINE)
    shown = re.findall(r"^moe-groups (.*?)(?: \\)?$", page, re.MULTILINE)
    assert ran == shown != []


def test_readme_shows_what_its_commands_plan(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "README.md").read_text()
    for row, command in zip(
        re.findall(r"^\| planned.*\| ([\d.]+) GiB \| [\d.]+ GiB \|$", page, re.MULTILINE),
        re.findall(r"^`moe-groups plan (.*?)`", page, re.MULTILINE),
        strict=True,
    ):
        found = as_json(capsys, *command.split())
        assert f"{found['memory']['step_peak'] / 2**30:.2f}" == row


# ---- bad input ------------------------------------------------------------------------

EIGHT = ("--world-size", "8")
BAD = [
    (["CONFIG"], "--world-size"),
    (["CONFIG", "--world-size", "0"], "at least 1"),
    (["CONFIG", "--world-size", "many"], "invalid number value: 'many'"),
    (["CONFIG", *EIGHT, "--pp", "3"], "no multiple of --tp 1 times --pp 3"),
    (["CONFIG", *EIGHT, "--pp", "2", "--pp-rank", "2"], "--pp-rank 2"),
    (["CONFIG", *EIGHT, "--pp", "8"], "--pp 8 is more than the 3 layers"),
    (["CONFIG", *EIGHT, "--ep", "3"], "--ep 3 does not divide the 8 experts"),
    (["CONFIG", "--world-size", "6", "--ep", "4"], "does not divide the 6 ranks"),
    (["CONFIG", *EIGHT, "--budget", "lots"], "--budget 'lots' is not a size"),
    (["CONFIG", *EIGHT, "--budget", "1KiB"], "Give --budget "),
    (["CONFIG", *EIGHT, "--max-groups", "1"], "more than --max-groups 1"),
    (["CONFIG", *EIGHT, "--cap", "9", "--budget", "1GiB"], "not allowed with"),
    (["CONFIG", *EIGHT, "--cap", "1.5"], "invalid number value"),
    (["CONFIG", *EIGHT, "--zero-stage", "3"], "--zero-stage 3: the cost of ZeRO-3's step is not"),
    (["CONFIG", *EIGHT, "--optimizer", "sgd"], "invalid choice: 'sgd'"),
    (["CONFIG", *EIGHT, "--optimizer", "CPUAdam", "--budget", "1GiB"], "on the host"),
    (["CONFIG", *EIGHT, "--bf16-optimizer", "--compact-gradients"], "--compact-gradients is for"),
    (["CONFIG", *EIGHT, "--tile", "1MiB"], "--tile is of lean_step: give --lean-step too"),
    (["--lean-step", "CONFIG", *EIGHT, "--tile", "1KiB"], "--tile 1024 bytes is less than"),
    (["CONFIG", *EIGHT, "--lean-step", "--optimizer", "CPUAdam"], "needs the optimizer on the"),
    (["CONFIG", *EIGHT, "--plot", "plan.pdf"], "must end in .png or .html"),
    (["CONFIG", *EIGHT, "--plot", "no/such/plan.png"], "there is no directory 'no/such'"),
    (["no/config.json", *EIGHT], "'no/config.json' does not exist"),
    (["mixtrall", *EIGHT], "did you mean 'mixtral'"),
    (["MODULE:missing", *EIGHT], "no function 'missing'"),
    (["MODULE:fails", *EIGHT], "RuntimeError: first line second line"),
    (["MODULE:fails", *EIGHT, "--ep", "2"], "--ep: not with module:function"),
    (["CONFIG", *EIGHT, "--unknown"], "--unknown"),
]


@pytest.mark.parametrize(("args", "said"), BAD)
def test_bad_input_is_one_line(
    args: list[str], said: str, config: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [arg.replace("CONFIG", config).replace("MODULE", module) for arg in args]
    assert run(*args) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("moe-groups")
    assert said in shown.err


def test_no_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("package", "extra", "args"),
    [
        ("rich", "cli", []),
        ("matplotlib", "plot", ["--json", "--plot", "plan.png"]),
        ("transformers", "cli", ["--json"]),
    ],
)
def test_missing_package_names_the_extra(
    package: str,
    extra: str,
    args: list[str],
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run(config, *EIGHT, *args) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert f"pip install 'moe-groups[{extra}]'" in shown.err
