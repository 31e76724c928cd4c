"""The table of groups: what it says, and that it stays readable."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_groups import ExpertTag, create_moe_param_groups, describe, is_norm_or_bias, set_expert_tag

LAYER = "ep_size_2_layers.0"


def model(layers: int, experts: int, device: str = "meta") -> nn.Module:
    """A dense matrix of 64 elements and experts of 32."""
    root = nn.Module()
    root.dense = nn.Linear(8, 8, device=device)
    root.layers = nn.ModuleList()
    for layer in range(layers):
        bank = nn.ModuleList(nn.Linear(8, 4, bias=False, device=device) for _ in range(experts))
        for number, param in enumerate(bank.parameters()):
            set_expert_tag(param, ExpertTag("ep_size_2", f"layers.{layer}", number, experts))
        root.layers.append(bank)
    return root


def groups(layers: int = 1, experts: int = 2, **options: Any) -> list[dict[str, Any]]:
    return create_moe_param_groups(model(layers, experts), split_by="expert", **options)


def test_text_shows_every_group_the_total_and_the_largest() -> None:
    found = groups(weight_decay=0.1, no_decay=is_norm_or_bias, overrides=[("dense", {"lr": 3e-4})])
    text = str(describe(found, data_parallel_size=4)).splitlines()
    # dense: 64 and 8 elements over 4 ranks; experts: 32 over 4 / 2 ranks; 4 bytes each
    assert [line.split() for line in text[2:7]] == [
        ["dense.override.0", "1", "1", "64", "*", "64", "B", "0.0003", "0.1"],
        ["dense.no_decay.override.0", "1", "1", "8", "8", "B", "0.0003", "0"],
        [f"{LAYER}.expert.0", "layers.0", "0", "1", "1", "32", "64", "B", "default", "0.1"],
        [f"{LAYER}.expert.1", "layers.0", "1", "1", "1", "32", "64", "B", "default", "0.1"],
        ["total", "4", "4", "136", "200", "B"],
    ]
    assert text[7] == "* largest partition: dense.override.0, 64 B on each rank"


def test_rows_are_data() -> None:
    table = describe(groups(overrides=[("dense", {"lr": 0.5})]), data_parallel_size=4)
    dense, first, _ = table.rows
    assert (dense.name, dense.moe, dense.layer, dense.expert) == (
        "dense.override.0",
        False,
        None,
        None,
    )
    assert (dense.tensors, dense.elements, dense.partition_bytes) == (2, 72, 72)
    assert (dense.lr, dense.weight_decay) == (0.5, None)
    assert (first.name, first.layer, first.expert) == (f"{LAYER}.expert.0", "layers.0", 0)
    assert (first.moe, first.elements, first.partition_bytes) == (True, 32, 64)
    assert (table.elements, table.partition_bytes, table.largest) == (136, 200, dense)


def test_partitions_are_padded_as_deepspeed_pads_them() -> None:
    """To a multiple of twice the ranks that share the group."""
    param = nn.Parameter(torch.zeros(9, dtype=torch.bfloat16))
    (row,) = describe([{"params": [param]}], data_parallel_size=4).rows
    assert row.partition_bytes == 4 * 2  # 16 elements over 4 ranks


def test_an_optimizer_shows_the_values_in_use() -> None:
    found = groups(overrides=[("dense", {"lr": 0.5})])
    rows = describe(torch.optim.AdamW(found, lr=0.25, weight_decay=0.125)).rows
    assert [row.lr for row in rows] == [0.5, 0.25, 0.25]
    assert {row.weight_decay for row in rows} == {0.125}


def test_html_escapes_names_wherever_they_stand() -> None:
    found = create_moe_param_groups({"params": [nn.Parameter(torch.zeros(9))], "name": "<b>&x"})
    html = describe(found)._repr_html_()
    assert "<b>" not in html
    assert html.count("&lt;b&gt;&amp;x") == 2  # in its row, and as the largest
    assert "<table>" in html


@pytest.mark.parametrize(("layers", "experts"), [(1, 5000), (50, 100), (5000, 1)])
def test_thousands_of_groups_fold_to_what_fits_a_screen(layers: int, experts: int) -> None:
    table = describe(groups(layers, experts))
    text = str(table).splitlines()
    assert len(table.rows) == 5001
    assert len(text) <= 2 + 60 + 1 + 3  # headers, rows, total, notes
    assert max(map(len, text[:-2])) <= 150
    total = text[-4].split()
    assert total[:4] == ["total", "5,001", "5,002", "160,072"]  # folding loses nothing
    assert "5,001 groups folded into" in text[-2]
    assert "warning: 5,001 groups" in text[-1]


def test_folded_rows_say_what_they_hold() -> None:
    text = str(describe(groups(2, 8), max_rows=10)).splitlines()
    assert [line.split()[:6] for line in text[3:5]] == [
        [f"ep_size_2_layers.{layer}.expert.*", f"layers.{layer}", "0-7", "8", "8", "256"]
        for layer in range(2)
    ]
    assert len(str(describe(groups(2, 8), max_rows=17)).splitlines()) == 2 + 17 + 1 + 1


def test_only_many_groups_are_warned_about() -> None:
    assert "warning" not in str(describe(groups(4, 40)))
    assert "warning: 401 groups" in str(describe(groups(4, 100)))
