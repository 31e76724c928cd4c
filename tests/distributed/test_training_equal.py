"""Training with any grouping of ours equals training with DeepSpeed's own split.

What is equal bit for bit, and why the rest is not:

* BF16_Optimizer and fp32 (no wrapper): everything. The norm is summed over the parameters
  of a parallel group, and our names are merged to one list per parallel group.
* ZeRO-1, ZeRO-2 and the fp16 optimizers take one norm per group and add those up in
  another order for another grouping, so norms differ by rounding. Without clipping losses and
  weights are equal bit for bit. With it every gradient is scaled by the norm, and master
  weights differ by rounding too; there the weights stay until the last of the steps
  (:func:`tests.training.moving_in`), and the moments take the clipped gradients of all.
"""

from typing import Any, NamedTuple

import pytest

from tests.ranks import run_on_ranks
from tests.training import (
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

Split = tuple[str, int | None]
SPLITS: list[Split] = [
    (split, cap) for split in ("parallel_group", "module", "expert") for cap in (None, CAP)
]


class Difference(NamedTuple):
    """How far a run is from the run with DeepSpeed's own split."""

    split: Split
    wrapper: str
    groups: int
    loss: float
    norm: float
    weights: float
    clipped: bool


def half_of_the_norm(wrapper: str, ep_size: int, changes: dict[str, Any]) -> float:
    """Of the first step's gradient, as this processor computes it and the wrapper reports it."""
    wrapper = "bf16" if wrapper == "fp32" else wrapper  # no wrapper reports none
    changes = changes | {"gradient_clipping": 0.0}
    engine = start(wrapper, groups_by("stock"), model_options={"ep_size": ep_size}, **changes)
    return train(engine, engine.gradient_accumulation_steps())["norm"][-1] / 2


def compare(
    wrapper: str, ep_size: int, splits: list[Split], clip: bool, changes: dict[str, Any]
) -> list[Difference]:
    """Train 5 steps with DeepSpeed's split and with each of ``splits``."""
    found: list[Difference] = []
    threshold = half_of_the_norm(wrapper, ep_size, changes) if clip else 0.0
    options = changes | {"gradient_clipping": threshold, "model_options": {"ep_size": ep_size}}
    if clip and wrapper not in EXACT:
        steps = 5 // changes.get("gradient_accumulation_steps", 1)
        options["lr_scheduler"] = moving_in(steps - 1)
    for split in [("stock", None), *splits]:
        engine = start(wrapper, groups_by(*split), **options)
        before = weights(engine)
        history, after = train(engine, 5), weights(engine)
        assert largest_difference(before, after) > CLIPPED_TOLERANCE, "nothing moved"
        if not found:
            reference, reference_weights = history, after
        losses = zip(history["loss"], reference["loss"], strict=True)
        norms = [
            abs(ours - theirs) / max(theirs, 1e-9)
            for ours, theirs in zip(history["norm"], reference["norm"], strict=True)
        ]
        found.append(
            Difference(
                split,
                type(engine.optimizer).__name__,
                len(engine.optimizer.param_groups),
                max(abs(ours - theirs) for ours, theirs in losses),
                max(norms),
                largest_difference(after, reference_weights),
                max(history["norm"]) > threshold > 0,
            )
        )
    return found


def cases(wrappers: dict[str, list[tuple[int, int]]]) -> list[Any]:
    """``(wrapper, world size, ep size)`` for all; long but for those in ``wrappers``."""
    return [
        pytest.param(
            wrapper,
            world,
            ep_size,
            marks=[] if (world, ep_size) in wrappers.get(wrapper, []) else [pytest.mark.long],
        )
        for wrapper in WRAPPERS
        for world in (2, 4)
        for ep_size in (1, 2)
    ]


def check(wrapper: str, world: int, ep_size: int, clip: bool, **changes: Any) -> list[Difference]:
    """Run all splits and check what holds for every wrapper."""
    if wrapper == "fp16" and not all(run_on_ranks(world, fp16_runs)):
        pytest.skip("DeepSpeed refuses fp16 on this device; half runs the same optimizer in bf16")
    ranks = run_on_ranks(world, compare, wrapper, ep_size, SPLITS, clip, changes, timeout=300)
    differences: list[Difference] = [one for rank in ranks for one in rank]
    stock = differences[0]
    for one in differences:
        assert one.wrapper == WRAPPERS[wrapper]
        if one.split not in (stock.split, ("parallel_group", None)):
            assert one.groups > stock.groups, f"{one} splits nothing"
        if wrapper in EXACT:
            assert (one.loss, one.norm, one.weights) == (0, 0, 0), one
        assert one.loss == 0, one
        assert one.norm <= NORM_TOLERANCE, one
    return differences


def fp16_runs() -> bool:
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


@pytest.mark.parametrize(
    ("wrapper", "world", "ep_size"),
    cases(
        {
            "zero1": [(4, 2)],
            "zero2": [(2, 1)],
            "zero2_fp32_grads": [(2, 2)],
            "bf16": [(2, 2), (4, 1)],  # sums of four gradients show their order
            "fp32": [(2, 2)],
            "half": [(2, 2)],
            "half_unfused": [(2, 2)],
            "fp16": [(2, 2)],
        }
    ),
)
def test_equal_with_clipping(wrapper: str, world: int, ep_size: int) -> None:
    for one in check(wrapper, world, ep_size, clip=True):
        assert one.weights <= CLIPPED_TOLERANCE, one
        assert wrapper == "fp32" or one.clipped, one


@pytest.mark.parametrize(
    ("wrapper", "world", "ep_size"),
    cases({"zero1": [(2, 2)], "zero2": [(4, 2)], "zero2_fp32_grads": [(2, 1)], "half": [(4, 2)]}),
)
def test_bit_equal_without_clipping(wrapper: str, world: int, ep_size: int) -> None:
    for one in check(wrapper, world, ep_size, clip=False):
        assert one.weights == 0, one


OTHER_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((wrapper, {"gradient_accumulation_steps": 2}) for wrapper in WRAPPERS if wrapper != "fp16"),
    ("bf16", {"bf16": {"enabled": True, "immediate_grad_update": True}}),
    ("zero2", {"zero_optimization": {"stage": 2, "overlap_comm": True}}),
    ("zero2", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500}}),
]


@pytest.mark.long
@pytest.mark.parametrize(("wrapper", "changes"), OTHER_SETTINGS)
@pytest.mark.parametrize("world", [2, 4])
def test_equal_with_other_settings(wrapper: str, changes: dict[str, Any], world: int) -> None:
    for one in check(wrapper, world, 2, clip=True, **changes):
        assert one.weights <= CLIPPED_TOLERANCE, one
