"""Balancing over the whole batch of several ranks."""

import pytest
import torch

from moe_groups import load_balancing_loss
from tests.support.ranks import run_on_ranks


def losses() -> tuple[float, float, float]:
    """Mean over the ranks of the loss with the group and without, and that of all tokens."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    logits = torch.randn(world, 6, 4, generator=torch.Generator().manual_seed(0)) * 2
    probs = torch.softmax(logits, -1)
    chosen = probs.topk(2).indices
    whole = torch.distributed.group.WORLD
    found = torch.stack(
        [
            load_balancing_loss(probs[rank], chosen[rank], group=whole),
            load_balancing_loss(probs[rank], chosen[rank]),
        ]
    )
    torch.distributed.all_reduce(found)
    together = load_balancing_loss(probs.flatten(0, 1), chosen.flatten(0, 1))
    return (*(found / world).tolist(), float(together))


@pytest.mark.numeric
def test_balance_over_all_ranks() -> None:
    for shared, own, together in run_on_ranks(4, losses):
        assert abs(shared - together) < 1e-5
        assert own > together + 1e-3  # each rank's part is less even than the whole
