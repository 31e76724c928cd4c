"""``compact_gradients``: trains the same bit for bit, and holds exactly the partitions."""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad

from moe_groups._deepspeed.releases import EXACT_MEANS
from moe_groups._deepspeed.step import exact_partitions as exact
from moe_groups.engine.lean import compact_gradients
from tests.support import ROOT
from tests.support.pairwise import Row, label, long_on_four_ranks, pairwise
from tests.support.ranks import HANG, RankError, run_on_ranks
from tests.support.skipping import SkippingMoE, skip
from tests.support.training import batches, groups_by, start, train
from tests.support.zero_runs import (
    CLIP,
    ZERO,
    Case,
    Cost,
    against_plain,
    changed_late,
    changed_too_late,
    changed_without,
    cost,
    dense_against_plain,
    differences,
    overflow_against_plain,
    refusal,
    resume,
    skipping_an_expert,
    snapshot,
    start_dense,
    start_muon,
    start_without_optimizer,
)

# ---- training -------------------------------------------------------------------------


def check(world: int, cases: list[Case]) -> None:
    assert run_on_ranks(world, against_plain, compact_gradients, cases, timeout=300) == [[]] * world


@pytest.mark.parametrize(
    "row",
    long_on_four_ranks(
        pairwise(
            {
                "world": [1, 2, 4],
                "wrapper": ZERO,
                "split": ["expert", "module", "stock"],
                "ep_size": [1, 2, 4],
                "accumulate": [1, 4],
                "clip": [0.0, CLIP],
            },
            lambda world, ep_size, **_: ep_size <= world,
        )
    ),
    ids=label,
)
def test_trains_the_same(row: Row) -> None:
    settings = {key: value for key, value in row.items() if key not in ("world", "clip")}
    check(row["world"], [Case(**settings, other={"gradient_clipping": row["clip"]})])


SETTINGS = [
    Case(accumulate=2, zero={"overlap_comm": True}),
    Case(accumulate=2, zero={"reduce_bucket_size": 500}),
    Case(accumulate=2, zero={"reduce_bucket_size": 100}),  # smaller than a parameter
    Case(accumulate=2, zero={"round_robin_gradients": True}),
    Case(accumulate=2, zero={"use_multi_rank_bucket_allreduce": False}),
    Case(other={"communication_data_type": "fp32"}),
    Case(other={"bf16": {"enabled": True, "check_grad_overflow": True}}),
    Case(other={"bf16": {"enabled": False}, "data_types": {}}),
    Case(other={"managed_gradient_accumulation": False}),
    Case(zero={"compute_grad_norm": False}, other={"gradient_clipping": 0.0}),
]


def _changed(case: Case) -> str:
    return str(case.zero | case.other)


@pytest.mark.parametrize(
    "row",
    long_on_four_ranks(
        pairwise({"setting": range(len(SETTINGS)), "world": [2, 4], "wrapper": ZERO})
    ),
    ids=lambda row: f"{row['world']}-{row['wrapper']}-{_changed(SETTINGS[row['setting']])}",
)
def test_trains_the_same_with_other_settings(row: Row) -> None:
    check(row["world"], [SETTINGS[row["setting"]]._replace(wrapper=row["wrapper"])])


@pytest.mark.parametrize(
    "row",
    pairwise(
        {
            "wrapper": ZERO,
            "off": ["contiguous_gradients", "reduce_scatter"],
            "overlap": [False, True],
        }
    ),
    ids=label,
)
def test_dense_model_trains_the_same(row: Row) -> None:
    zero = {row["off"]: False, "overlap_comm": row["overlap"]}
    assert run_on_ranks(2, dense_against_plain, compact_gradients, row["wrapper"], zero) == [[], []]


@pytest.mark.parametrize("wrapper", ZERO)
def test_expert_without_gradient_on_one_rank(wrapper: str) -> None:
    assert run_on_ranks(2, skipping_an_expert, compact_gradients, wrapper, 2, timeout=60) == [
        [],
        [],
    ]


@pytest.mark.long
@pytest.mark.parametrize("compact", [False, True])
def test_ranks_that_share_an_expert_must_agree(compact: bool) -> None:
    """As without: collectives do not match. Neither mends it nor adds a case."""
    with pytest.raises(RankError):
        run_on_ranks(2, train_where_sharing_ranks_disagree, compact, timeout=HANG)


def train_where_sharing_ranks_disagree(compact: bool) -> None:
    skip([1], (0,))
    train(Case(ep_size=1).engine(compact_gradients if compact else None, layer=SkippingMoE), 3)


def test_overflow_skips_the_same_step() -> None:
    assert run_on_ranks(2, overflow_against_plain, compact_gradients) == [[], []]


def full_gradients(compact: bool) -> list[torch.Tensor]:
    engine = Case(accumulate=2, split="module").engine(compact_gradients if compact else None)
    train(engine, 3)
    x, y = next(batches(1, first=9))
    engine.backward(engine(x.bfloat16(), y.bfloat16()))
    return [safe_get_full_grad(param).clone() for param in engine.module.parameters()]


def full_gradients_against_plain() -> bool:
    pairs = list(zip(full_gradients(False), full_gradients(True), strict=True))
    assert any(float(plain.abs().max()) > 0 for plain, _ in pairs)
    return all(torch.equal(plain, compacted) for plain, compacted in pairs)


def test_gradients_can_be_read_before_the_step() -> None:
    assert run_on_ranks(2, full_gradients_against_plain) == [True, True]


def norms_when_a_step_is_left_out(wrapper: str, compact: bool) -> list[float]:
    engine = Case(wrapper, other={"gradient_clipping": 0.0}).engine(
        compact_gradients if compact else None
    )
    x, y = (data.bfloat16() for data in next(batches(1)))
    norms = []
    for backwards in (1, 2):
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0  # the same gradient each time
        for _ in range(backwards):
            engine.backward(engine(x, y))
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def test_backward_without_step_adds_up() -> None:
    """The one difference that the docstring tells of; DeepSpeed's fp32 accumulation has it too."""
    runs = [("zero1", False, 1), ("zero1", True, 2), ("zero2", False, 1), ("zero2", True, 2)]
    for wrapper, compact, times in [*runs, ("zero2_fp32_grads", False, 2)]:
        for once, both in run_on_ranks(2, norms_when_a_step_is_left_out, wrapper, compact):
            assert both == pytest.approx(times * once, rel=1e-2), (wrapper, compact)


# ---- checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    long_on_four_ranks(
        pairwise(
            {
                "around": ["after", "before", "both"],
                "wrapper": ZERO,
                "split": ["expert", "module", "stock"],
                "world": [2, 4],
                "accumulate": [1, 4],
            }
        )
    ),
    ids=label,
)
def test_resume(row: Row, tmp_path: Path) -> None:
    case = Case(row["wrapper"], row["split"], accumulate=row["accumulate"])
    around = (
        compact_gradients if row["around"] in (when, "both") else None
        for when in ("before", "after")
    )
    found = run_on_ranks(row["world"], resume, case, *around, tmp_path, timeout=60)
    assert found == [[]] * row["world"]


def test_may_be_called_between_steps_and_twice(tmp_path: Path) -> None:
    assert run_on_ranks(2, changed_late, compact_gradients, compact_gradients, tmp_path) == [[], []]


# ---- memory ---------------------------------------------------------------------------


def costs(cases: list[Case], compact: bool) -> list[Cost]:
    return [
        cost(case.engine(compact_gradients if compact else None, model_options={"num_experts": 8}))
        for case in cases
    ]


EP1 = [
    Case("zero1", "expert", ep_size=1),
    Case("zero1", "module", ep_size=1, accumulate=4),
    Case("zero2", "expert", ep_size=1, accumulate=4),
    Case("zero2", "parallel_group", ep_size=1),
]
"""A group of one expert has 3 parameters: fewer than 4 ranks."""


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_holds_exactly_the_partitions(world: int) -> None:
    for rank in run_on_ranks(world, costs, EP1, True):
        for case, one in zip(EP1, rank, strict=True):
            assert one.held == 2 * one.partitions, case
    for rank in run_on_ranks(world, costs, EP1, False):
        for case, one in zip(EP1, rank, strict=True):
            assert one.held == 2 * one.whole, case
            assert one.whole > one.partitions or case.split != "expert", case


def test_small_groups_cost_no_more_than_a_big_one() -> None:
    cases = [Case(split=split, ep_size=1) for split in ("parallel_group", "module", "expert")]
    plain, compacted = (
        [max(one.peak for one in ranks) for ranks in zip(*answers, strict=True)]
        for answers in (run_on_ranks(4, costs, cases, compact) for compact in (False, True))
    )
    assert compacted == sorted(compacted, reverse=True)
    assert compacted[-1] < plain[-1]


# ---- where it cannot be used ----------------------------------------------------------


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bf16": (lambda: start("bf16", groups_by("expert")), "one fp32 buffer for the whole run"),
    "fp32": (lambda: start("fp32", groups_by("expert")), "steps with AdamW, without ZeRO"),
    "half": (lambda: start("half", groups_by("expert")), "steps with FP16_Optimizer, without ZeRO"),
    "ZeRO-3": (lambda: start_dense(zero={"stage": 3}), "ZeRO-3 already keeps nothing but"),
    "offload": (
        lambda: start_dense(
            zero={"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False
        ),
        "Leave out the call, or the offload",
    ),
    "DeepCompile": (lambda: start_dense(compile={"deepcompile": True}), "Leave out the call, or"),
    "Muon": (start_muon, "Muon needs the whole gradient of each parameter"),
    "no optimizer": (start_without_optimizer, "it has no optimizer"),
    "no engine": (
        lambda: object(),
        "engine=<object> must be an engine",
    ),
}


def refuse(what: str) -> str:
    return refusal(compact_gradients, REFUSED[what][0]())


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    for message in run_on_ranks(2, refuse, what, timeout=900):
        assert REFUSED[what][1] in message


@pytest.mark.parametrize("wrapper", ZERO)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_refused_while_gradients_are_held(wrapper: str, accumulate: int) -> None:
    case = Case(wrapper, accumulate=accumulate)
    for message, problems in run_on_ranks(2, changed_too_late, compact_gradients, case):
        assert "after the engine.step() that ends a gradient accumulation" in message
        assert problems == []


@pytest.mark.parametrize("name", EXACT_MEANS)
def test_unsupported_deepspeed(name: str) -> None:
    for message, unchanged in run_on_ranks(2, changed_without, compact_gradients, name):
        assert "cannot keep exact gradient partitions: install deepspeed 0.19.8 or newer" in message
        assert unchanged


# ---- what is relied on in DeepSpeed ---------------------------------------------------

READERS = {
    "_add_full_reduction_to_compact_grad_partition",
    "_finalize_cpu_offload_gradient_accumulation",
    "_get_compact_grad_partition_slice",
    "copy_grads_in_partition",
    "finalize_gradient_accumulation_boundary",
    "independent_gradient_partition_epilogue",
    "reduce_ipg_grads",
}


def names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def test_places_where_deepspeed_asks() -> None:
    """A new one may ask for something that does not hold under bf16 accumulation."""
    methods = {
        name: method
        for name, method in vars(DeepSpeedZeroOptimizer).items()
        if inspect.isfunction(method)
    }
    readers = {name for name, one in methods.items() if exact.EXACT in set(names_in(one.__code__))}
    assert readers == READERS
    assert str(inspect.signature(methods[exact.EXACT])) == "(self, group_idx)"
    assert "_get_preflattened_grad_partition" in set(names_in(methods["step"].__code__))


def deepspeed_decides() -> tuple[list[bool], list[bool], bool]:
    """Under bf16 and fp32 accumulation; does our call leave the latter alone?"""
    answers = []
    for wrapper in ("zero2", "zero2_fp32_grads"):
        engine = start(wrapper, groups_by("module"), model_options={"ep_size": 2})
        indices = range(len(engine.optimizer.bit16_groups))
        answers.append([engine.optimizer._use_compact_grad_partition_buffer(i) for i in indices])
    compact_gradients(engine)
    return answers[0], answers[1], exact.EXACT in vars(engine.optimizer)


def test_deepspeed_keeps_exact_partitions_under_fp32_accumulation_only() -> None:
    assert run_on_ranks(2, deepspeed_decides) == [([False] * 3, [True] * 3, False)] * 2


# ---- the patch on the page ------------------------------------------------------------

PAGE = ROOT / "docs" / "compact-gradients.md"


def patched_decision() -> Any:
    """DeepSpeed's method with the patch of the page applied."""
    patch = PAGE.read_text().partition("```diff\n")[2].partition("```")[0].splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in patch if line[0] in " " + sign) for sign in "-+")
    original = vars(DeepSpeedZeroOptimizer)[exact.EXACT]
    assert inspect.getsource(original) == before
    namespace: dict[str, Any] = {}
    exec(textwrap.dedent(after), original.__globals__, namespace)
    return namespace[exact.EXACT]


def patched_against_plain() -> list[str]:
    case = Case(accumulate=2, ep_size=1)
    plain = case.engine()
    runs = [(train(plain, 4), snapshot(plain))]
    with mock.patch.object(DeepSpeedZeroOptimizer, exact.EXACT, patched_decision()):
        patched = case.engine()
        runs.append((train(patched, 4), snapshot(patched)))
        one = cost(case.engine())
    assert one.held == 2 * one.partitions < 2 * one.whole
    return differences(*runs)


def test_patch_of_the_page() -> None:
    assert run_on_ranks(2, patched_against_plain) == [[], []]
