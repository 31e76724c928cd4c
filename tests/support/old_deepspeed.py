"""Repair, for the tests, defects of DeepSpeed and older torch in steps of MoE layers on CPUs.

They are only in the code for CPUs, and would keep the tests from reaching anything else.
"""

import functools
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from packaging.version import Version


def repair() -> None:
    """Repair DeepSpeed; does nothing with releases that need no repair."""
    old = Version(deepspeed.__version__) < Version("0.19")
    if old:
        # get_norm_with_moe_layers calls it with a number, which only the GPU version accepts.
        number = functools.partial(torch.tensor, dtype=torch.float32)
        CPU_Accelerator.FloatTensor = property(lambda self: number)
    if old or Version(torch.__version__) < Version("2.9"):
        # gloo copies its results into views, which autograd refuses while it records.
        DeepSpeedZeroOptimizer.step = torch.no_grad()(DeepSpeedZeroOptimizer.step)
        gather = bf16_optimizer.all_gather_dp_groups

        def on_detached(
            groups_flat: list[torch.Tensor], partitioned_param_groups: Any, **options: Any
        ) -> None:
            gather(
                groups_flat=[flat.detach() for flat in groups_flat],
                partitioned_param_groups=[
                    [part.detach() for part in parts] for parts in partitioned_param_groups
                ],
                **options,
            )

        bf16_optimizer.all_gather_dp_groups = on_detached
