"""Which row each element of a partition counts for, and what a report makes of the sums."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from moe_groups.errors import InvalidArgumentError
from moe_groups.metrics.plot import draw_expert_map, write_expert_map
from moe_groups.metrics.report import MetricsReport, make_report
from moe_groups.metrics.rows import Piece, Row, Stepped, block_of, cut_runs, merge_neighbours
from moe_groups.metrics.sums import GRAD, LR, PARAM, SteppedPieces, StepSums


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("blocks.0.moe.deepspeed_moe.gate.wg.weight", "blocks.0"),
        ("lm_head.weight", "lm_head"),
        ("transformer.wte.weight", "transformer.wte"),
        ("scale", "scale"),
        ("3.norm.bias", "3"),
    ],
)
def test_block_of(name: str, block: str) -> None:
    assert block_of(name) == block


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 5),
)
def test_each_element_counts_once(runs: list[tuple[int, int]], ranks: int) -> None:
    rows = [(Row("moe", True, expert), numel) for expert, numel in runs]
    owner = [row for row, numel in rows for _ in range(numel)]
    size = math.ceil(len(owner) / ranks)
    found: list[Row] = []
    for rank in range(ranks):
        pieces = list(merge_neighbours(list(cut_runs(rows, -rank * size, 0, size))))
        assert all(
            one.start + one.numel < other.start or one.row != other.row
            for one, other in itertools.pairwise(pieces)
        )
        at = 0
        for piece in pieces:
            assert piece.start == at  # no gaps
            at += piece.numel
            found += [piece.row] * piece.numel
    assert found == owner


def test_gaps_are_kept() -> None:
    row = Row("dense")
    pieces = [Piece(row, 8, 2), Piece(row, 0, 3), Piece(row, 3, 1)]
    assert list(merge_neighbours(pieces)) == [Piece(row, 0, 4), Piece(row, 8, 2)]


ROWS = [Row("a"), Row("moe", True), Row("moe", True, 0), Row("moe", True, 1)]


def report() -> MetricsReport:
    tensor = torch.arange(1.0, 8.0)
    pieces = [Piece(ROWS[0], 0, 2), Piece(ROWS[3], 2, 3), Piece(ROWS[0], 6, 1)]
    part = SteppedPieces(Stepped(tensor, pieces), {row: i for i, row in enumerate(ROWS)})
    sums = StepSums()
    sums.add_elements(part, 0.5)
    sums.add_norms(GRAD, part, tensor)
    sums.add_norms(PARAM, part, 2 * tensor)
    sums.add_norms(PARAM, part, None)
    return make_report(7, ROWS, sums.total(len(ROWS), "cpu").tolist(), updates=False)


def test_sums_and_report() -> None:
    found = report()
    assert found.step == 7
    dense, layer = found.dense["a"], found.layers["moe"]
    assert dense.grad_norm == pytest.approx((1 + 4 + 49) ** 0.5)
    assert dense.param_norm == pytest.approx(2 * dense.grad_norm)
    assert (dense.elements, dense.lr) == (3, 0.5)
    assert math.isnan(dense.update_ratio)
    assert layer.experts == (None, layer.total)
    assert layer.total.grad_norm == pytest.approx((9 + 16 + 25) ** 0.5)
    assert found.total.elements == 6
    assert found.as_dict() == {
        f"{metric}/{name}": getattr(stats, metric)
        for name, stats in (("total", found.total), ("dense/a", dense), ("moe/moe", layer.total))
        for metric in ("lr", "grad_norm", "param_norm")
    }
    more = found.as_dict(per_expert=True)
    assert set(more) - set(found.as_dict()) == {
        f"{metric}/moe/moe/expert_1" for metric in ("lr", "grad_norm", "param_norm")
    }


def test_learning_rates_are_weighted() -> None:
    sums = StepSums()
    for lr, numel in ((1.0, 1), (2.0, 3)):
        stepped = Stepped(torch.ones(numel), [Piece(ROWS[0], 0, numel)])
        sums.add_elements(SteppedPieces(stepped, {ROWS[0]: 0}), torch.tensor(lr))
    assert sums.total(1, "cpu")[0, LR] == 7.0
    found = make_report(1, ROWS[:1], sums.total(1, "cpu").tolist(), updates=True)
    assert found.dense["a"].lr == pytest.approx(7 / 4)
    assert found.dense["a"].update_ratio == 0.0
    assert "update_ratio/dense/a" in found.as_dict()


def test_map_of_experts(tmp_path: Path) -> None:
    figure = draw_expert_map(report(), "grad_norm")
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["moe"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert axes.get_xlabel() == "expert, numbered over all ranks"
    assert bar.get_ylabel() == "gradient before clipping, L2 norm"
    shown: Any = axes.images[0].get_array()
    assert shown.mask.tolist() == [[True, False]]
    assert float(shown[0, 1]) == pytest.approx(50**0.5)
    write_expert_map(report(), tmp_path / "map.svg", "param_norm")
    assert "<svg" in (tmp_path / "map.svg").read_text()


@pytest.mark.parametrize(
    ("metric", "path", "message"),
    [
        ("norm", "map.png", "metric='norm' must be 'lr', "),
        ("update_ratio", "map.png", "no update_ratio of any expert"),
        ("lr", "map.doc", "cannot be written"),
        ("lr", "/no/such/map.png", "cannot be written"),
    ],
)
def test_maps_that_cannot_be(metric: Any, path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        write_expert_map(report(), tmp_path / path, metric)
