"""Are the optimizer states of all ranks of one step? Files of a save that was stopped are not."""

from pathlib import Path

import torch

from moe_groups.errors import CheckpointError
from moe_groups.shard import STATE, Shard
from moe_groups.torch_file import read_small


def step_of_shard(shard: Shard) -> float | None:
    """The most steps that the optimizer counts for a group; None where nothing is counted."""
    if not isinstance(shard.optimizer[STATE], dict):  # "elastic_checkpoint"
        return None
    counters = []
    for index, options in enumerate(shard.options):
        counter = shard.states(index).get("step", options.get("step"))
        if isinstance(counter, torch.Tensor) and counter.numel() == 1:
            counter = read_small(shard.path, counter).item()
        if isinstance(counter, int | float):
            counters.append(float(counter))
    return max(counters, default=None)


class SameStep:
    """Compares shards, one after the other, with the first one that counts."""

    def __init__(self) -> None:
        self.first: tuple[Path, float] | None = None

    def check(self, shard: Shard) -> None:
        """Compare one more.

        Raises:
            CheckpointError: it was saved at another step.
        """
        step = step_of_shard(shard)
        if step is None:
            return
        self.first = self.first or (shard.path, step)
        if step != self.first[1]:
            raise CheckpointError(
                f"{shard.path} was saved after {step:g} steps, {self.first[0].name} after "
                f"{self.first[1]:g}: a save over an older checkpoint was not finished. Use another "
                "tag."
            )
