"""Training with any grouping of ours equals training with DeepSpeed's own split.

What is equal bit for bit, and why the rest is not:

* BF16_Optimizer and fp32 (no wrapper): everything. The norm is summed over the parameters
  of a parallel group, and our names are merged to one list per parallel group.
* ZeRO-1, ZeRO-2 and the fp16 optimizers take one norm per group and add those up in
  another order for another grouping, so norms differ by rounding. Without clipping losses and
  weights are equal bit for bit. With it every gradient is scaled by the norm, and master
  weights differ by rounding too; there the weights stay until the last of the steps
  (:func:`tests.support.training.moving_in`), and the moments take the clipped gradients of all.
"""

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.pairwise import Row, label, long_on_four_ranks, pairwise
from tests.support.ranks import run_on_ranks
from tests.support.training import (
    CLIPPED_TOLERANCE,
    NORM_TOLERANCE,
    WRAPPERS,
    groups_by,
    largest_difference,
    moving_in,
    start,
    train,
    weights,
)

CAP = 400  # elements; an expert has 792
EXACT = ("bf16", "fp32")
STEPS = 5


class Run(NamedTuple):
    """What a run comes to on this rank."""

    wrapper: str
    groups: int
    loss: list[float]
    norm: list[float]
    weights: dict[str, torch.Tensor]


def run(
    wrapper: str,
    ep_size: int,
    clip: float,
    changes: dict[str, Any],
    split: str = "stock",
    cap: int | None = None,
) -> Run:
    """Train with these groups; DeepSpeed's own split if none are named."""
    options = {"ep_size": ep_size}
    changes = changes | {"gradient_clipping": clip}
    if clip and wrapper not in EXACT:
        changes["lr_scheduler"] = moving_in(STEPS - 1)
    engine = start(wrapper, groups_by(split, cap), model_options=options, **changes)
    before = weights(engine)
    history, after = train(engine, STEPS * engine.gradient_accumulation_steps()), weights(engine)
    assert largest_difference(before, after) > CLIPPED_TOLERANCE, "nothing moved"
    kind, groups = type(engine.optimizer).__name__, len(engine.optimizer.param_groups)
    return Run(kind, groups, history["loss"], history["norm"], after)


@cache
def stock_run(wrapper: str, ep_size: int, clip: float, accumulate: int) -> Run:
    return run(wrapper, ep_size, clip, {"gradient_accumulation_steps": accumulate})


def biting_clip(wrapper: str, ep_size: int, accumulate: int) -> float:
    """Half of the smallest norm that this processor gives: every step is clipped."""
    reports = "zero1" if wrapper == "fp32" else wrapper  # without a wrapper nothing reports a norm
    return min(norm for norm in stock_run(reports, ep_size, 0.0, accumulate).norm if norm) / 2


class Difference(NamedTuple):
    """How far a run is from the run with DeepSpeed's own split."""

    wrapper: str
    groups: int
    stock_groups: int
    loss: float
    norm: float
    weights: float
    clipped: bool


def compare(
    wrapper: str,
    ep_size: int,
    split: str,
    cap: int | None,
    clips: bool,
    accumulate: int,
    extra: dict[str, Any],
) -> Difference:
    """Train with DeepSpeed's split and with ours."""
    clip = biting_clip(wrapper, ep_size, accumulate) if clips else 0.0
    changes = {"gradient_accumulation_steps": accumulate} | extra
    if extra:
        stock = run(wrapper, ep_size, clip, changes)
    else:
        stock = stock_run(wrapper, ep_size, clip, accumulate)
    ours = run(wrapper, ep_size, clip, changes, split, cap)
    norms = [
        abs(a - b) / max(b, torch.finfo(torch.float32).tiny)
        for a, b in zip(ours.norm, stock.norm, strict=True)
    ]
    return Difference(
        ours.wrapper,
        ours.groups,
        stock.groups,
        max(abs(a - b) for a, b in zip(ours.loss, stock.loss, strict=True)),
        max(norms),
        largest_difference(ours.weights, stock.weights),
        wrapper == "fp32" or min(norm for norm in stock.norm if norm) > clip,
    )


def check(row: Row, extra: dict[str, Any] | None = None) -> None:
    """Run both and check what holds for this wrapper."""
    wrapper, world, clips = row["wrapper"], row["world"], row["clips"]
    if wrapper == "fp16" and not all(run_on_ranks(world, fp16_runs)):
        pytest.skip("DeepSpeed refuses fp16 on this device; half runs the same optimizer in bf16")
    settings = {key: value for key, value in row.items() if key != "world"}
    for one in run_on_ranks(world, compare, **settings, extra=extra or {}, timeout=300):
        assert one.wrapper == WRAPPERS[wrapper]
        if (row["split"], row["cap"]) != ("parallel_group", None):
            assert one.groups > one.stock_groups, f"{one} splits nothing"
        if wrapper in EXACT:
            assert (one.loss, one.norm, one.weights) == (0, 0, 0), one
        assert one.loss == 0, one
        assert one.norm <= NORM_TOLERANCE, one
        assert one.weights <= (CLIPPED_TOLERANCE if clips else 0), one
        assert one.clipped or not clips, "clipping does not bite"


def fp16_runs() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


SPLITS: dict[str, list[Any]] = {"split": ["parallel_group", "module", "expert"], "cap": [None, CAP]}
ROWS = pairwise(
    {
        "wrapper": list(WRAPPERS),
        "world": [2, 4],
        "ep_size": [1, 2],
        **SPLITS,
        "clips": [True, False],
        "accumulate": [1, 2],
    },
    # A scale that has grown in between makes steps of fp16 that overflow, for any groups.
    lambda wrapper, accumulate, **_: wrapper != "fp16" or accumulate == 1,
)


# What no pair shows: sums of four bf16 gradients depend on the order in which names are reduced.
ROWS += [
    {"wrapper": "bf16", "world": 4, "ep_size": 1, "split": split, "cap": None}
    | {"clips": True, "accumulate": 1}
    for split in ("expert", "module")
]


@pytest.mark.numeric
@pytest.mark.parametrize("row", ROWS, ids=label)
def test_equal(row: Row) -> None:
    check(row)


EXTRAS: dict[str, tuple[str, dict[str, Any]]] = {
    "immediate": ("bf16", {"bf16": {"enabled": True, "immediate_grad_update": True}}),
    "overlap": ("zero2", {"zero_optimization": {"stage": 2, "overlap_comm": True}}),
    "small buckets": ("zero2", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500}}),
}


@pytest.mark.parametrize(
    "row",
    long_on_four_ranks(
        pairwise({"extra": list(EXTRAS), "world": [2, 4], **SPLITS, "clips": [True, False]})
    ),
    ids=label,
)
def test_equal_with_other_settings(row: Row) -> None:
    wrapper, changes = EXTRAS[row["extra"]]
    settings = {key: value for key, value in row.items() if key != "extra"}
    check({"wrapper": wrapper, "ep_size": 2, "accumulate": 1, **settings}, changes)
