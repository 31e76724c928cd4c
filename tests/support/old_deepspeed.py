"""What stops DeepSpeed before 0.19 from stepping MoE layers on CPU ranks, repaired for the tests.

Both are defects of its CPU side alone, which hide whether anything else works.
"""

import functools

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def repair() -> None:
    """Do nothing with a DeepSpeed that needs no repair."""
    if tuple(map(int, deepspeed.__version__.split(".")[:2])) >= (0, 19):
        return
    # Called with a number (get_norm_with_moe_layers), which only a GPU's takes.
    number = functools.partial(torch.tensor, dtype=torch.float32)
    CPU_Accelerator.FloatTensor = property(lambda self: number)
    # gloo copies what it gathered into views, which autograd refuses while it watches.
    DeepSpeedZeroOptimizer.step = torch.no_grad()(DeepSpeedZeroOptimizer.step)
