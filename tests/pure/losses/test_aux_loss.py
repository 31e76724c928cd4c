"""Load-balancing losses beside their formulas written out, and beside other people's code."""

from typing import Any

import pytest
import torch
from deepspeed.moe.sharded_moe import top1gating, top2gating, topkgating
from hypothesis import assume, given, settings, strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_groups import load_balancing_loss, router_z_loss
from moe_groups.errors import InvalidArgumentError


def routed(
    tokens: int, experts: int, k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, probabilities and the chosen experts."""
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2
    probs = torch.softmax(logits, -1)
    return logits, probs, probs.topk(k).indices


def written_out(probs: Any, chosen: Any, counts: Any) -> float:
    """The formula with loops and Python's numbers."""
    tokens = [t for t in range(len(probs)) if counts[t]]
    experts = len(probs[0])
    total = 0.0
    assigned = sum(1 for t in tokens for e in chosen[t] if e >= 0)
    for expert in range(experts):
        share = sum(1 for t in tokens for e in chosen[t] if e == expert) / max(assigned, 1)
        mean = sum(probs[t][expert] for t in tokens) / max(len(tokens), 1)
        total += share * mean
    return experts * total


@pytest.mark.numeric
@given(st.integers(1, 12), st.integers(3, 6), st.integers(1, 2), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_the_formula(tokens: int, experts: int, k: int, seed: int, data: st.DataObject) -> None:
    _, probs, chosen = routed(tokens, experts, k, seed)
    dropped = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=tokens * k, max_size=tokens * k))
    )
    assume(not dropped.all())
    chosen = torch.where(dropped.view(tokens, k), -1, chosen)
    counts = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    found = load_balancing_loss(probs, chosen, mask=counts)
    assert found.item() == pytest.approx(
        written_out(probs.tolist(), chosen.tolist(), counts.tolist()), rel=1e-5, abs=1e-6
    )


def test_a_one_hot_mask_of_integers_is_refused() -> None:
    _, probs, chosen = routed(5, 3, 1, 0)
    mask = torch.nn.functional.one_hot(chosen[:, 0], 3)
    with pytest.raises(InvalidArgumentError, match=r"give a one-hot mask as assigned.bool\(\)"):
        load_balancing_loss(probs, mask)
    expected = load_balancing_loss(probs, chosen)
    torch.testing.assert_close(load_balancing_loss(probs, mask.bool()), expected)


def test_a_sequence_of_padding_does_not_count() -> None:
    _, probs, chosen = routed(8, 3, 1, 0)
    probs, chosen = probs.view(2, 4, 3), chosen.view(2, 4, 1)
    mask = torch.tensor([[True] * 4, [False] * 4])
    found = load_balancing_loss(probs, chosen, balance="sequence", mask=mask)
    torch.testing.assert_close(found, load_balancing_loss(probs[0], chosen[0]))


@pytest.mark.numeric
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_by_sequence_is_the_mean_of_each(batch: int, length: int, experts: int, seed: int) -> None:
    _, probs, chosen = routed(batch * length, experts, 1, seed)
    probs, chosen = probs.view(batch, length, experts), chosen.view(batch, length, 1)
    each = [load_balancing_loss(p, c) for p, c in zip(probs, chosen, strict=True)]
    found = load_balancing_loss(probs, chosen, balance="sequence")
    torch.testing.assert_close(found, torch.stack(each).mean())


def test_uniform_routing_costs_one() -> None:
    probs = torch.full((12, 4), 0.25)
    chosen = torch.arange(12).remainder(4).unsqueeze(-1)
    assert load_balancing_loss(probs, chosen).item() == pytest.approx(1.0)
    assert load_balancing_loss(probs, chosen == torch.arange(4)).item() == pytest.approx(1.0)


@pytest.mark.numeric
@pytest.mark.parametrize("k", [1, 2, 3])
def test_deepspeeds_gates(k: int) -> None:
    logits, probs, chosen = routed(32, 8, k)
    if k == 1:
        theirs = top1gating(logits.clone(), 1.0, 0, use_rts=False)[0]
    elif k == 2:
        theirs = top2gating(logits.clone(), 1.0, 0, top2_2nd_expert_sampling=False)[0]
        chosen = chosen[:, :1]  # it counts the first choice
    else:
        theirs = topkgating(logits.clone(), k, 1.0, 0)[0]
    torch.testing.assert_close(load_balancing_loss(probs, chosen), theirs)


@pytest.mark.numeric
@pytest.mark.parametrize("k", [1, 2])
def test_hugging_faces_loss_is_k_times_ours(k: int) -> None:
    logits, probs, chosen = routed(32, 8, k)
    theirs = load_balancing_loss_func((logits,), 8, k)
    torch.testing.assert_close(k * load_balancing_loss(probs, chosen), theirs)


@pytest.mark.numeric
def test_gradient_goes_through_the_probabilities() -> None:
    logits, _, chosen = routed(32, 4, 1)
    logits.requires_grad_()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return load_balancing_loss(torch.softmax(x, -1), chosen)

    loss(logits).backward()
    assert logits.grad is not None
    step = 1e-2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    ahead, behind = (loss(logits.detach().double() + sign * step) for sign in (1, -1))
    assert (ahead - behind).item() == pytest.approx(2 * (logits.grad * step).sum().item(), rel=1e-2)


def test_z_loss_written_out() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0], [9.0, 9.0]])
    expected = (torch.log(torch.tensor(2.0)) ** 2 + torch.log(torch.exp(logits[1]).sum()) ** 2) / 2
    found = router_z_loss(logits, mask=torch.tensor([True, True, False]))
    torch.testing.assert_close(found, expected)


def test_half_precision_is_computed_in_fp32() -> None:
    logits, _, _ = routed(64, 8, 1)
    assert router_z_loss(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("probs", "assigned", "options", "says"),
    [
        ((4, 3), torch.zeros(5, 1, dtype=torch.long), {}, "do not fit"),
        ((4, 3), torch.zeros(4, 1), {}, "indices of experts"),
        ((4, 3), torch.zeros(4, 2, dtype=torch.bool), {}, "mask of shape"),
        ((4, 3), torch.zeros(4, 1, dtype=torch.long), {"balance": "sequence"}, "batch, sequence"),
        (
            (4, 3),
            torch.zeros(4, 1, dtype=torch.long),
            {"balance": "token"},
            "'token' must be",
        ),
        ((4, 3), torch.full((4, 1), 3), {}, "expert 3"),
        ((4, 3), torch.full((4, 1), -1), {}, "assigned has no expert"),
        ((4, 3), torch.zeros(4, 1, dtype=torch.long), {"mask": torch.ones(3)}, "mask of shape"),
    ],
)
def test_bad_shapes(probs: Any, assigned: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgumentError, match=says):
        load_balancing_loss(torch.full(probs, 1 / 3), assigned, **options)
