"""No grouping of ours hangs where an expert has no gradient on one rank.

And it trains as if that gradient were zero. With ZeRO the ranks that share an expert must
agree on whether it has a gradient; ``test_contract.py`` shows that DeepSpeed's own split
needs that as well.
"""

from collections.abc import Collection
from typing import Any

import pytest

from tests.distributed.training.test_training_equal import fp16_runs
from tests.support.old_deepspeed import WRONG_NORM, known_before
from tests.support.ranks import run_on_ranks
from tests.support.skipping import train_skipping
from tests.support.training import NORM_TOLERANCE, largest_difference

WRAPPERS = ["zero1", "zero2", "zero2_fp32_grads", "bf16", "half", "half_unfused", "fp16"]
EXPERT_SKIPPED, LAYER_SKIPPED = (0,), ()


def against_zero_gradient(wrapper: str, skips: Collection[int], used: Collection[int]) -> list[str]:
    """What differs between no gradient and a zero gradient, with a name for each group."""
    problems = []
    for split in ("expert", "module"):
        without = train_skipping(wrapper, split, 2, skips, used)
        zeros = train_skipping(wrapper, split, 2, skips, used, explicit_zeros=True)
        if without[0] != zeros[0]:
            problems.append(f"{split}: {without[0]} instead of {zeros[0]}")
        if (difference := largest_difference(without[1], zeros[1])) != 0:
            problems.append(f"{split}: weights differ by {difference}")
    return problems


def check(wrapper: str, world: int, skips: Collection[int], used: Collection[int]) -> None:
    if wrapper == "fp16" and not all(run_on_ranks(world, fp16_runs)):
        pytest.skip("DeepSpeed refuses fp16 on this device; half runs the same optimizer in bf16")
    problems = run_on_ranks(world, against_zero_gradient, wrapper, skips, used, timeout=60)
    assert problems == [[]] * world


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("used", [EXPERT_SKIPPED, LAYER_SKIPPED], ids=["one expert", "no expert"])
@pytest.mark.parametrize(("world", "skips"), [(2, [1]), (4, [1, 3])])
def test_experts_without_gradient(
    wrapper: str, world: int, skips: list[int], used: Collection[int]
) -> None:
    check(wrapper, world, skips, used)


@pytest.mark.parametrize("wrapper", ["bf16", "half"])
@pytest.mark.parametrize("used", [EXPERT_SKIPPED, LAYER_SKIPPED], ids=["one expert", "no expert"])
def test_ranks_that_share_the_expert_disagree(wrapper: str, used: Collection[int]) -> None:
    check(wrapper, 4, [1], used)


def norms_of_experts_only(split: str) -> tuple[list[float], list[float]]:
    """Without clipping, so that both wrappers have the same weights in each step."""
    changes: Any = {"experts_only": True, "gradient_clipping": 0.0}
    bf16, zero = (
        train_skipping(wrapper, split, 2, [1], LAYER_SKIPPED, explicit_zeros, **changes)
        for wrapper, explicit_zeros in (("bf16", False), ("zero1", True))
    )
    return bf16[0]["norm"], zero[0]["norm"]


@pytest.mark.numeric
@pytest.mark.parametrize("split", ["expert", "module", "parallel_group"])
def test_bf16_without_dense_group(split: str) -> None:
    """Nothing but experts, and none of them has a gradient on rank 1."""
    for norms, expected in run_on_ranks(2, norms_of_experts_only, split, timeout=60):
        assert min(norms) > 0
        with known_before("0.19", WRONG_NORM):
            assert norms == pytest.approx(expected, rel=NORM_TOLERANCE)
