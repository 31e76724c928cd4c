"""Order and names of groups are the same in every process, whatever PYTHONHASHSEED says."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from moe_groups import create_moe_param_groups, is_norm_or_bias, tag_experts
from tests.support import ROOT
from tests.support.hash_seeds import two_hash_seeds

EP_SIZES = (1, 2, 4, 8, 16)

Layout = list[tuple[str, list[str]]]


def model() -> nn.Module:
    """Experts of many parallel groups, so that a set of their names has many orders."""
    root = nn.Module()
    for index, ep_size in enumerate(EP_SIZES * 2):
        layer = nn.Module()
        layer.norm = nn.LayerNorm(4)
        layer.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        for param in layer.experts.parameters():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = f"ep_size_{ep_size}"  # type: ignore[attr-defined]
        root.add_module(f"layer{index}", layer)
    return root


def callers_groups(root: nn.Module) -> list[dict[str, Any]]:
    named = list(root.named_parameters())
    return [
        {"params": named[::2], "name": "even", "lr": 0.1},
        {"params": named[1::2], "name": "odd", "lr": 0.2},
    ]


def layout(groups: list[dict[str, Any]], root: nn.Module) -> Layout:
    names = {id(param): name for name, param in root.named_parameters()}
    return [(group["name"], [names[id(p)] for p in group["params"]]) for group in groups]


def ours() -> dict[str, Layout]:
    found = {}
    for split_by in ("parallel_group", "module", "expert"):
        for cap in (None, 30):
            root = model()
            options: Any = {"split_by": split_by, "max_group_size": cap}
            options |= {"weight_decay": 0.1, "no_decay": is_norm_or_bias}
            options["overrides"] = [("layer3", {"lr": 0.3}), ("*.experts.1.*", {"eps": 1e-6})]
            groups = create_moe_param_groups(root, **options)
            found[f"module {split_by} {cap}"] = layout(groups, root)
            groups = create_moe_param_groups(callers_groups(root), **options)
            found[f"groups {split_by} {cap}"] = layout(groups, root)
    return found


def stock() -> Layout:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    root = model()
    tag_experts(root)
    named = callers_groups(root)
    plain = [{**group, "params": [p for _, p in group["params"]]} for group in named]
    return layout(split(plain), root)


def report() -> None:
    """What a fresh process prints."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # values must not matter
    print("REPORT" + json.dumps({"ours": ours(), "stock": stock()}))


@pytest.fixture(scope="module")
def reports() -> list[Any]:
    command = [sys.executable, "-c", f"from {__name__} import report; report()"]
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in two_hash_seeds([f"ep_size_{ep_size}" for ep_size in EP_SIZES])
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return [json.loads(output.rpartition("REPORT")[2]) for output in outputs]


def test_the_same_in_every_process(reports: list[Any]) -> None:
    for report in reports[1:]:
        assert report["ours"] == reports[0]["ours"]


def test_deepspeeds_own_split_is_not(reports: list[Any]) -> None:
    """Why this file exists. When this fails, DeepSpeed no longer orders by a set."""
    orders = {json.dumps(report["stock"]) for report in reports}
    assert len(orders) > 1
    members = {json.dumps(sorted(report["stock"])) for report in reports}
    assert len(members) == 1  # the same groups, in another order
