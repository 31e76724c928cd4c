"""The step of BF16_Optimizer in tiles, with few collectives for any groups.

Goes through ``BF16_Optimizer.step`` (``runtime/bf16_optimizer.py``).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from moe_groups._deepspeed.step import tiles
from moe_groups._deepspeed.step.gathering import Gathering


class Bf16Step:
    """What is lean in the step of ``BF16_Optimizer``: its optimizer's, and the gathering.

    Its fp32 gradients stay, and all groups have one all-reduce per process group already.
    """

    tile_bytes: int
    most: int
    gathering: Gathering

    def __init__(self, bf16: Any) -> None:
        self.bf16, self._step = bf16, bf16.step
        bf16.step = self.step
        bf16.update_lp_params = self.update_lp_params

    @staticmethod
    def gathers(bf16: Any, tile_bytes: int) -> Gathering:
        """The gradients stay."""
        return Gathering(bf16.bf16_groups_flat, bf16.real_dp_process_group, tile_bytes, 0)

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """DeepSpeed's, with an optimizer that steps in tiles."""
        optimizer = self.bf16.optimizer
        self.bf16.optimizer = _Tiled(optimizer, self.most)
        try:
            self._step(closure)
        finally:
            self.bf16.optimizer = optimizer

    def update_lp_params(self) -> None:
        """As DeepSpeed's, with few collectives."""
        bf16 = self.bf16
        for index, master in enumerate(bf16.fp32_groups_flat_partition):
            rank = torch.distributed.get_rank(bf16.real_dp_process_group[index])
            bf16.bf16_partitioned_groups[index][rank].data.copy_(master.data)
        self.gathering.run()


class _Tiled:
    """Takes the place of an optimizer for one step, and differs from it only in ``step``."""

    def __init__(self, optimizer: torch.optim.Optimizer, most: int) -> None:
        self._optimizer, self._most = optimizer, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        optimizer, most = self._optimizer, self._most
        with tiles.around_hooks(optimizer):
            large = [g for g in optimizer.param_groups if g["params"][0].numel() > most]
            small = [g for g in optimizer.param_groups if g["params"][0].numel() <= most]
            with tiles.only(optimizer, small):
                optimizer.step()
            for group in large:
                gradient = group["params"][0].grad
                if gradient is not None:  # a hook removes that of a frozen group
                    part = functools.partial(_part, gradient)
                    tiles.step_in_tiles(optimizer, group, part, most)


def _part(gradient: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return gradient[start:end]
