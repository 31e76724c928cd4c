"""Time a call that all ranks make together."""

import time
from collections.abc import Callable

import torch


def milliseconds(function: Callable[[], object]) -> float:
    """Time of ``function``, started on all ranks at once, until it is done on the GPU too."""
    torch.distributed.barrier()
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
