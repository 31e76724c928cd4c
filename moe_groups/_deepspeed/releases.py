"""What older releases of DeepSpeed lack, by feature: the only place that knows their numbers."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_groups._deepspeed.patching import deepspeed_version
from moe_groups.errors import UnsupportedDeepSpeedError


class Feature(NamedTuple):
    """One thing that not all supported releases do.

    Attributes:
        lacks: what a release without it does instead, after "deepspeed 0.18.4".
        since: the first release with it.
        there: does the installed release have it?
    """

    lacks: str
    since: str
    there: Callable[[], bool]


def _since(release: str) -> Callable[[], bool]:
    return lambda: _at_least(deepspeed_version(), release)


def _at_least(installed: str, release: str) -> bool:
    from packaging.version import Version  # DeepSpeed needs it too; torch alone does not

    return bool(Version(installed) >= Version(release))


def _exact_partitions() -> bool:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    return all(callable(getattr(DeepSpeedZeroOptimizer, name, None)) for name in EXACT_MEANS)


def _bf16_optimizer() -> bool:
    from deepspeed.runtime import constants

    return bool(getattr(constants, "DDP_BFLOAT16", None) != constants.BFLOAT16)


def _top_k() -> bool:
    from deepspeed.moe import sharded_moe

    return hasattr(sharded_moe, "topkgating")


def _remapped_groups() -> bool:
    from deepspeed.runtime import engine

    return hasattr(engine, "_remap_client_optimizer_after_module_replacement")


def _pickled_files() -> bool:
    """0.16 says weights_only=False itself; before, torch 2.6 and newer take True."""
    forced = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0") in ("1", "y", "yes", "true")
    return forced or _since("0.16.0")() or not _at_least(torch.__version__, "2.6")


EXACT_MEANS = (
    "_use_compact_grad_partition_buffer",
    "_build_compact_grad_partition_buffer",
    "_get_preflattened_grad_partition",
)
FEATURES = {
    "exact partitions": Feature(
        "cannot keep exact gradient partitions", "0.19.8", _exact_partitions
    ),
    "BF16_Optimizer": Feature(
        "steps with its fp16 optimizer where BF16_Optimizer is asked for", "0.18.5", _bf16_optimizer
    ),
    "fp32 states": Feature(
        "cannot load the optimizer's state of an MoE model in fp32 without ZeRO",
        "0.19.3",
        _since("0.19.3"),
    ),
    "bf16 states": Feature(
        "cannot load the optimizer's state of a bf16 model without ZeRO",
        "0.18.5",
        _since("0.18.5"),
    ),
    "BF16 masters": Feature(
        "copies each weight of BF16_Optimizer into the wrong part of its master weights",
        "0.16.4",
        _since("0.16.4"),
    ),
    "top-k gating": Feature("sends a token to at most two experts", "0.15.0", _top_k),
    "remapped groups": Feature(
        "does not put AutoEP's parameters into groups that were made before",
        "0.19.7",
        _remapped_groups,
    ),
    "pickled files": Feature(
        "cannot read its own checkpoints with torch 2.6 or newer, which loads tensors only",
        "0.16.0",
        _pickled_files,
    ),
}


def need(feature: str, or_else: str) -> None:
    """Refuse to go on without ``feature``.

    Args:
        feature: one of :data:`FEATURES`.
        or_else: what the user can do with this release.

    Raises:
        UnsupportedDeepSpeedError: the installed release lacks it.
    """
    lacks, since, there = FEATURES[feature]
    if not there():
        raise UnsupportedDeepSpeedError(
            f"deepspeed {deepspeed_version()} {lacks}: install deepspeed {since} or newer, "
            f"or {or_else}."
        )
