"""Which optimizers can go on from the state of which."""

from typing import Any

import pytest
import torch
from torch import optim

from moe_groups.checkpoints.kept_state import Kept, compare_kept, kept_by, other_options

ADAM = ("exp_avg", "exp_avg_sq", "step")


def made(cls: Any, steps: int = 0, **options: Any) -> Any:
    param = torch.ones(2, 2, requires_grad=True)
    optimizer = cls([param], lr=0.1, **options)
    for _ in range(steps):
        param.grad = torch.ones(2, 2)
        optimizer.step()
    return optimizer


CASES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (optim.AdamW, {}),
    "Adam": (optim.Adam, {}),
    "fused": (optim.AdamW, {"fused": True}),
    "amsgrad": (optim.AdamW, {"amsgrad": True}),
    "NAdam": (optim.NAdam, {}),
    "RAdam": (optim.RAdam, {}),
    "Adamax": (optim.Adamax, {}),
    "RMSprop": (optim.RMSprop, {}),
    "centered": (optim.RMSprop, {"centered": True}),
    "SGD": (optim.SGD, {}),
    "momentum": (optim.SGD, {"momentum": 0.9}),
    "Adagrad": (optim.Adagrad, {}),
    "Adafactor": (optim.Adafactor, {}),
}
SAME = {"AdamW", "Adam", "fused"}


@pytest.mark.parametrize("running", CASES)
@pytest.mark.parametrize("saved", CASES)
def test_state_of_torch_optimizers(saved: str, running: str) -> None:
    """What is kept is known before the first step; only Adam's kinds share it."""
    cls, options = CASES[saved]
    wanted = "same" if saved == running or {saved, running} <= SAME else "other"
    after = kept_by(made(cls, 1, **options))
    assert compare_kept(after, kept_by(made(cls, **options))) == "same"
    cls, options = CASES[running]
    assert compare_kept(after, kept_by(made(cls, **options))) == wanted


@pytest.mark.parametrize("running", CASES)
@pytest.mark.parametrize("saved", ["AdamW", "RAdam", "SGD"])
def test_options_of_torch_optimizers(saved: str, running: str) -> None:
    """Where neither class nor state is known, as without a manifest before the first step."""
    one, other = (made(CASES[name][0], **CASES[name][1]) for name in (saved, running))
    interchangeable = {
        "AdamW": SAME | {"amsgrad"},
        "RAdam": {"RAdam", "Adamax"},  # after a step their state tells
        "SGD": {"SGD", "momentum"},
    }
    answer = other_options(None, one.param_groups[0].keys(), other)
    assert (answer is None) is (running in interchangeable[saved]), answer


class Own(optim.AdamW):
    """The same under another name: nobody can tell."""


@pytest.mark.parametrize(
    ("saved", "verdict"),
    [
        (Kept("deepspeed.ops.adam.fused_adam.FusedAdam", ADAM), "same"),
        (Kept("deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam", ADAM[:2]), "same"),
        (Kept("deepspeed.ops.lion.fused_lion.FusedLion", ("exp_avg",)), "other"),
        (Kept("custom.Adam", ADAM), "unknown"),
        (Kept("custom.Adam", None), "unknown"),
        (Kept("custom.Adam", ("exp_avg",)), "other"),
        (Kept(None, ADAM), "same"),
        (Kept(None, None), "same"),
        (Kept(None, ("momentum_buffer",)), "other"),
    ],
)
def test_into_adamw(saved: Kept, verdict: str) -> None:
    for steps in (0, 1):
        assert compare_kept(saved, kept_by(made(optim.AdamW, steps))) == verdict


def test_into_a_class_of_ones_own() -> None:
    own = kept_by(made(Own))
    assert own == Kept(f"{__name__}.Own", None)
    assert compare_kept(own, own) == "same"
    assert compare_kept(kept_by(made(optim.AdamW, 1)), own) == "unknown"
    options = made(optim.SGD).param_groups[0].keys()
    assert other_options("torch.optim.sgd.SGD", options, made(Own)) == "without betas, eps"
    assert other_options(None, made(optim.AdamW).param_groups[0].keys(), made(Own)) is None
