"""Repair, for the tests, two defects of DeepSpeed before 0.19 in steps of MoE layers on CPUs.

Both defects are only in its CPU code, and would keep the tests from reaching anything else.
"""

import functools

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def repair() -> None:
    """Repair DeepSpeed; does nothing with a release that needs no repair."""
    if tuple(map(int, deepspeed.__version__.split(".")[:2])) >= (0, 19):
        return
    # get_norm_with_moe_layers calls it with a number, which only the GPU version accepts.
    number = functools.partial(torch.tensor, dtype=torch.float32)
    CPU_Accelerator.FloatTensor = property(lambda self: number)
    # gloo copies its results into views, which autograd refuses while it records.
    DeepSpeedZeroOptimizer.step = torch.no_grad()(DeepSpeedZeroOptimizer.step)
