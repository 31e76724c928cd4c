"""Which DeepSpeed is it; repairs, for the tests, of its and older torch's MoE steps on CPUs.

The defects are only in the code for CPUs, and would keep the tests from reaching anything else.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from packaging.version import Version

from moe_groups._deepspeed.releases import FEATURES

NO_BF16 = "an fp16 optimizer stands in for BF16_Optimizer"
WRONG_NORM = "BF16_Optimizer clips by another norm than that of its gradients"


def before(release: str) -> bool:
    """Is the installed DeepSpeed older?"""
    return bool(Version(deepspeed.__version__) < Version(release))


def can_resume(wrapper: str) -> bool:
    """Does the installed DeepSpeed load what it saves with this wrapper?"""
    needed = {"bf16": "BF16_Optimizer", "half": "bf16 states", "fp32": "fp32 states"}
    return wrapper not in needed or FEATURES[needed[wrapper]].there()


@contextlib.contextmanager
def known_before(release: str, fault: str) -> Iterator[None]:
    """Skip, with the fault as reason, what fails in a DeepSpeed that is older than ``release``."""
    try:
        yield
    except AssertionError as error:
        if before(release) and "requires DeepSpeed" not in str(error):
            pytest.skip(f"DeepSpeed before {release}: {fault}")
        raise


def repair() -> None:
    """Repair DeepSpeed; does nothing with releases that need no repair."""
    old = before("0.19")
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
