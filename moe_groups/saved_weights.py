"""The files of a checkpoint that hold the model's weights and the engine's counters."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_groups.slim_shard import Extent, extent_of
from moe_groups.torch_file import read_skeleton

_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True, slots=True)
class EngineState:
    """What ``mp_rank_<NN>_model_states.pt`` says of the run; None where it does not say.

    Attributes:
        global_steps: steps of the engine.
        skipped_steps: those in which nothing was stepped because gradients overflowed.
        data_parallel_size: ranks.
        model_parallel_size: pipeline stages times tensor-parallel ranks.
        num_experts: of each of the rank's MoE layers, in order.
        version: of DeepSpeed.
    """

    global_steps: int | None = None
    skipped_steps: int | None = None
    data_parallel_size: int | None = None
    model_parallel_size: int | None = None
    num_experts: tuple[int, ...] = ()
    version: str | None = None


def read_engine_state(path: Path) -> EngineState:
    """Read the counters.

    Raises:
        CheckpointError: the file cannot be read.
    """
    content = read_skeleton(path)
    if not isinstance(content, Mapping):
        return EngineState()
    sizes = content.get("checkpoint_parallel_dimensions") or {}
    both = _number(sizes.get("pp_degree")), _number(sizes.get("tp_degree"))
    experts = map(_number, content.get("num_experts") or ())
    return EngineState(
        global_steps=_number(content.get("global_steps")),
        skipped_steps=_number(content.get("skipped_steps")),
        data_parallel_size=_number(content.get("dp_world_size")),
        model_parallel_size=None if None in both else both[0] * both[1],  # type: ignore[operator]
        num_experts=tuple(count for count in experts if count is not None),
        version=content.get("ds_version"),
    )


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def parameters_in(path: Path) -> dict[str, Extent]:
    """The parameters of a file of weights by name, without buffers.

    Raises:
        CheckpointError: the file cannot be read.
    """
    content = read_skeleton(path)
    module = content.get("module", content) if isinstance(content, Mapping) else None
    if not isinstance(module, Mapping):
        return {}
    buffers = set(content.get("buffer_names") or ())  # a mask may be infinite
    return {
        str(name): extent_of(tensor)
        for name, tensor in module.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_contiguous() and name not in buffers
    }


def missing_experts(
    names: Iterable[str], model_rank: int, num_experts: Iterable[int]
) -> Iterator[str]:
    """Files of experts that DeepSpeed's naming asks for, where it names any file so."""
    found = {match[0]: int(match[3]) for match in map(_EXPERT.fullmatch, names) if match}
    if model_rank not in found.values():
        return
    for layer, count in enumerate(num_experts):
        for expert in range(count):
            name = f"layer_{layer}_expert_{expert}_mp_rank_{model_rank:02d}_model_states.pt"
            if name not in found:
                yield name
