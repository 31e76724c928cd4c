"""A gate with a bias beside DeepSpeed's own: one of 0 changes no bit, another the choice alone."""

import copy
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn

from moe_groups import MoE
from moe_groups._deepspeed.layers import give_bias
from tests.support.checkpointed_models import different, gradients, initialized
from tests.support.models import FFN, HIDDEN
from tests.support.pairwise import Row, few_now, pairwise
from tests.support.ranks import run_on_ranks

EXPERTS = 4
SETTINGS: dict[str, list[Any]] = {
    "k": [1, 2, 3],
    "drop_tokens": [True, False],
    "noisy_gate_policy": [None, "RSample", "Jitter"],
    "use_rts": [True, False],
    "top2_2nd_expert_sampling": [True, False],
    "use_residual": [False, True],
    "capacity_factor": [0.5, 2.0],
    "ep_size": [2, 1],
    "layer": ["ours", "DeepSpeed's"],
    "used": [False, True],
    "training": [True, False],
}
LAYERS: dict[str, Any] = {"ours": MoE, "DeepSpeed's": DeepSpeedMoE}
"""By name, because a row is the test's name too."""


def made(row: Row) -> nn.Module:
    torch.manual_seed(torch.distributed.get_rank())
    options = {key: row[key] for key in SETTINGS if key not in ("layer", "used", "training")}
    layer = LAYERS[row["layer"]](HIDDEN, FFN(), num_experts=EXPERTS, min_capacity=2, **options)
    return initialized(layer).train(row["training"])


def batch(used: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    x = torch.randn(3, 8, HIDDEN, generator=generator)
    return x, (torch.arange(24) % 5 > 0).long() if used else None


def run(layer: nn.Module, used: bool) -> dict[str, Any]:
    torch.manual_seed(7)
    layer.zero_grad()
    x, tokens = batch(used)
    x.requires_grad_()
    y, loss, counts = layer(x, tokens)
    (y.square().sum() + 3 * loss).backward()
    outputs = {"y": y.detach(), "loss": loss.detach(), "counts": counts, "x": x.grad}
    return {**outputs, **gradients(layer), "random": torch.get_rng_state()}


def gate_outputs(layer: Any, x: torch.Tensor, tokens: torch.Tensor | None) -> Any:
    torch.manual_seed(7)
    return layer.deepspeed_moe.gate(x.flatten(0, 1), tokens, True)


def extended(layer: Any, bias: torch.Tensor) -> Any:
    """DeepSpeed's gate with the bias as the weight of one more input, which is 1."""
    gate = copy.copy(layer.deepspeed_moe.gate)
    wg = nn.Linear(HIDDEN + 1, EXPERTS, bias=False)
    wg.weight.data = torch.cat([gate.wg.weight.data, bias.unsqueeze(1)], dim=1)
    gate._modules = {"wg": wg}
    return gate


def compared(row: Row) -> list[str]:
    """What differs from DeepSpeed's layer with a bias of 0; then checks of another bias."""
    layer: Any = made(row)
    expected = run(layer, row["used"])
    bias = torch.tensor([0.0, 1.5, -1.0, 0.5])
    x, tokens = batch(row["used"])
    with_one = torch.cat([x, torch.ones(3, 8, 1)], dim=-1).flatten(0, 1)
    gate = extended(layer, bias)
    module, name = give_bias(layer)
    changed = different(run(layer, row["used"]), expected)
    if row["noisy_gate_policy"] == "Jitter":
        return changed  # jitter of the one more input would be jitter of the bias
    module.get_buffer(name).copy_(bias)
    loss, capacity, _, indices, locations, weights, counts = gate_outputs(layer, x, tokens)
    torch.manual_seed(7)
    other = gate(with_one, tokens, True)
    assert capacity == other[1]
    assert torch.equal(indices, other[3])
    assert torch.equal(locations, other[4])
    assert torch.equal(counts, other[6])
    assert not torch.equal(counts, expected["counts"])
    scores = torch.softmax(x.flatten(0, 1) @ layer.deepspeed_moe.gate.wg.weight.T, -1).tolist()
    for token, (chosen, own) in enumerate(
        zip(indices.t().tolist(), weights.t().tolist(), strict=True)
    ):
        kept = [scores[token][expert] if expert >= 0 else 0.0 for expert in chosen]
        total = 1.0 if row["k"] == 1 or not sum(kept) else sum(kept)
        assert own == pytest.approx([one / total for one in kept], abs=1e-6)
    if row["k"] != 2:
        shares = (counts / 24).tolist()
        mean = [sum(one) / 24 for one in zip(*scores, strict=True)]
        by_hand = sum(a * b for a, b in zip(shares, mean, strict=True)) * EXPERTS / row["k"]
        assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    return changed


@pytest.mark.parametrize("row", few_now(pairwise(SETTINGS), 6))
def test_bias_of_zero_changes_nothing_and_another_only_the_choice(row: Row) -> None:
    assert run_on_ranks(2, compared, row) == [[], []]
