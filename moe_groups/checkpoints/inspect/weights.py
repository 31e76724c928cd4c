"""Are the files sound that hold the model's weights and the engine's counters?"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_groups.checkpoints.files import CheckpointFiles
from moe_groups.checkpoints.inspect.figures import FLOATS, changed_text, examine_values
from moe_groups.checkpoints.inspect.report import Problem, unreadable
from moe_groups.checkpoints.torch_file import (
    DAMAGE,
    PICKLE,
    compare_crcs,
    read_torch_file,
    reading,
)
from moe_groups.errors import CheckpointError


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
    content = read_torch_file(path)
    if not isinstance(content, Mapping):
        return EngineState()
    with reading(path):
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


def parameters_in(path: Path) -> dict[str, torch.Tensor]:
    """The parameters of a file of weights by name, without buffers.

    Raises:
        CheckpointError: the file cannot be read.
    """
    content = read_torch_file(path)
    module = content.get("module", content) if isinstance(content, Mapping) else None
    if not isinstance(module, Mapping):
        return {}
    buffers = set(content.get("buffer_names") or ())  # a mask may be infinite
    return {
        str(name): tensor
        for name, tensor in module.items()
        if isinstance(tensor, torch.Tensor) and name not in buffers
    }


def examine_engines(
    files: CheckpointFiles,
) -> tuple[dict[int, EngineState], list[Problem]]:
    """The engine's counters by model-parallel rank, and what is wrong with their files."""
    engines, problems = {}, []
    for model, path in files.models.items():
        try:
            if compare_crcs(path, names=[PICKLE]).changed:
                problems.append(Problem("checksum", path.name, changed_text(path.name, PICKLE)))
            else:
                engines[model] = read_engine_state(path)
        except CheckpointError as error:
            problems.append(unreadable(path, path.name, error))
    return engines, problems


def examine_file(
    path: Path, name: str, data: bool, progress: Callable[[int], None]
) -> tuple[list[Problem], int]:
    """Problems of a file of weights, and its number of records without a CRC."""
    problems: list[Problem] = []
    unstated = 0
    try:
        changed, unstated = compare_crcs(path, progress, None if data else [PICKLE])
        problems += [Problem("checksum", name, changed_text(name, record)) for record in changed]
        if data and PICKLE not in changed:
            problems += _not_finite(path, name)
    except (CheckpointError, *DAMAGE) as error:
        problems.append(unreadable(path, name, error))
    return problems, unstated


def _not_finite(path: Path, name: str) -> Iterator[Problem]:
    for param, tensor in parameters_in(path).items():
        if tensor.dtype in FLOATS and (count := examine_values(tensor)[1]):
            text = f"{name}: {count:,} values of {param} are NaN or infinite."
            yield Problem("not finite", name, text)
