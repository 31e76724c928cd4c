"""``attach_loss`` on engines: the gradients of adding the loss up, however the engine scales it."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad

from moe_groups import MoE, attach_loss
from moe_groups.losses import gradient_scale
from tests.support.models import TinyMoE
from tests.support.ranks import run_on_ranks
from tests.support.training import batches, groups_by, start


class Attached(TinyMoE):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        for block in self.blocks:
            h, aux = block(h)
            h = attach_loss(h, 0.5 * aux)
        return torch.nn.functional.mse_loss(self.out(h).float(), y.float())


class Added(TinyMoE):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h, total = self.inp(x), torch.zeros(())
        for block in self.blocks:
            h, aux = block(h)
            total = total + 0.5 * aux
        return torch.nn.functional.mse_loss(self.out(h).float(), y.float()) + total


def gradients(
    kind: type[TinyMoE], wrapper: str, scale: float | None, torch_style: bool
) -> dict[str, torch.Tensor]:
    """fp32 gradients after two micro-batches, as they are held: times the loss scale."""
    model = kind(MoE, ep_size=2)
    engine = start(wrapper, groups_by("expert"), model, gradient_accumulation_steps=2)
    if scale is not None:
        engine.optimizer.override_loss_scale(scale)
    assert gradient_scale(engine) == (scale or 1.0) / 2
    found: dict[str, torch.Tensor] = {}
    original = engine.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        for name, param in engine.module.named_parameters():
            gradient = safe_get_full_grad(param)
            assert gradient is not None
            found[name] = gradient.float().clone()
        return original(*args, **kwargs)

    engine.optimizer.step = step
    for x, y in batches(2):
        loss = engine(x.bfloat16(), y.bfloat16())
        if torch_style:
            engine.scale(loss).backward()
        else:
            engine.backward(loss)
        engine.step()
    return found


@pytest.mark.numeric
@pytest.mark.parametrize("torch_style", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize(
    ("wrapper", "scale"), [("zero1", None), ("zero2", 64.0), ("bf16", None)], ids=str
)
def test_gradients_of_the_sum(wrapper: str, scale: float | None, torch_style: bool) -> None:
    """ZeRO-2 with a loss scale, which stands for that of fp16."""
    if torch_style and not hasattr(DeepSpeedEngine, "scale"):
        pytest.skip("this DeepSpeed has no engine.scale, only engine.backward")
    found = run_on_ranks(2, gradients, Attached, wrapper, scale, torch_style)[0]
    expected = run_on_ranks(2, gradients, Added, wrapper, scale, torch_style)[0]
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 0.02 * value.norm() + 1e-6, name
