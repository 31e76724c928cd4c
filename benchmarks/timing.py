"""Time what all ranks do together."""

import time
from collections.abc import Callable

import torch


def milliseconds(function: Callable[[], object]) -> float:
    """How long ``function`` takes, begun on all ranks at once and done on the GPU too."""
    torch.distributed.barrier()
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
