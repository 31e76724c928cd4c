"""One rank's optimizer state in the new groups."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moe_groups.checkpoints.convert.source import RegroupSource, Run
from moe_groups.checkpoints.layout import FlatGroup, Layout, Rank, fragments
from moe_groups.checkpoints.saved_objects import fragment_address
from moe_groups.checkpoints.shard import (
    ALIGNMENT,
    CONTENT,
    COUNTS,
    MASTER,
    PADDINGS,
    SLICES,
    STATE,
    stated_fragments,
)
from moe_groups.errors import CheckpointError
from moe_groups.tags import LABELS

_NAMES = ("params", "name", "moe", *LABELS)


def new_shard(source: RegroupSource, target: Layout, rank: Rank) -> dict[str, Any]:
    """What a rank's file holds in the new groups; its partitions are copied into memory.

    Raises:
        CheckpointError: groups with other hyperparameters or counters would become one, or the
            source is damaged.
    """
    like = source.shard(Rank(rank.model, rank.data % source.layout.data_parallel_size))
    lean = like.lean
    master, states, param_groups = [], {}, []
    groups = target.of(rank)
    for index, group in enumerate(groups):
        size = group.filled(rank.data) if lean else group.partition
        first, at = (source.saved(group) or [(like, 0)])[0]
        dtype = source.tensor(first, at, None).dtype
        master.append(_flat(source, group, rank, None, size, dtype))
        if state := _state(source, group, rank):
            states[index] = state
        param_groups.append({**_options(source, group, target), "params": [index]})
    optimizer = {
        **like.optimizer,
        STATE: {**like.optimizer[STATE], "state": states, "param_groups": param_groups},
        MASTER: master,
        PADDINGS: [_padding(group, rank.data, lean) for group in groups],
        COUNTS: [len(group.ranks) for group in groups],
        SLICES: [_slices(group, rank.data, like.reorders) for group in groups],
    }
    if lean:
        optimizer[ALIGNMENT] = [_gaps(group) for group in groups]
    return {**like.content, CONTENT: optimizer}


def _flat(
    source: RegroupSource,
    group: FlatGroup,
    rank: Rank,
    key: str | None,
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A new partition: its parameters, and zeros between and behind them."""
    runs: list[Run] = []
    at = 0
    for piece in fragments(group, rank.data):
        if piece.start > at:
            runs.append(Run(torch.zeros(piece.start - at, dtype=dtype), 0, piece.start - at))
        for run in source.runs(group, piece, key, dtype):
            last = runs[-1] if runs else None
            if last and last.tensor is run.tensor and last.stop == run.start:
                runs[-1] = last._replace(stop=run.stop)
            else:
                runs.append(run)
        at = piece.start + piece.numel
    if at < size or not runs:
        runs.append(Run(torch.zeros(size - at, dtype=dtype), 0, size - at))
    if dtypes := {run.tensor.dtype for run in runs} - {dtype}:
        raise CheckpointError(
            f"group {group.name!r} of the new groups would hold parameters with {key or MASTER} in "
            f"{dtype} and {dtypes.pop()}: their old groups cannot become one."
        )
    parts = [run.tensor.detach().flatten()[run.start : run.stop] for run in runs]
    return _alone(parts[0]) if len(parts) == 1 else _joined(parts, size, dtype)


def _alone(part: torch.Tensor) -> torch.Tensor:
    """The same bytes of the file as a storage of their own: torch saves whole storages."""
    first = part.storage_offset() * part.itemsize
    storage = part.untyped_storage()[first : first + part.nbytes]
    return torch.empty(0, dtype=part.dtype).set_(storage)


def _joined(parts: list[torch.Tensor], size: int, dtype: torch.dtype) -> torch.Tensor:
    memory = np.empty(size * dtype.itemsize, np.uint8)  # numpy asks the system for huge pages
    joined: torch.Tensor = torch.cat(parts, out=torch.from_numpy(memory).view(dtype))
    return joined


def _state(source: RegroupSource, group: FlatGroup, rank: Rank) -> dict[str, Any]:
    """Optimizer state of a group: what has the size of a partition is laid out anew.

    None for a group whose parameters were not trained: the optimizer makes it in the first step.
    """
    saved = source.saved(group)
    if not saved:
        return {}
    if any(shard.options[index].get("use_muon") for shard, index in saved):
        raise CheckpointError(
            f"group {group.name!r} of the new groups would hold parameters that DeepSpeed's Muon "
            "steps, whose momentum is kept as whole matrices on each rank that has a part of them, "
            "and cannot be laid out anew. Load with the groups and the ep_size of the checkpoint, "
            "or its weights alone (load_module_only=True)."
        )
    olds = [shard.states(index) for shard, index in saved]
    kinds = sorted({str(sorted(states)) for states in olds})
    if len(kinds) > 1:
        raise CheckpointError(
            f"group {group.name!r} of the new groups would hold parameters with optimizer state "
            f"{' and '.join(kinds)}: their old groups cannot become one."
        )
    shard, index = saved[0]
    partition = shard.partition(index)
    state: dict[str, Any] = {}
    for key, value in olds[0].items():
        if isinstance(value, torch.Tensor) and value.dim() and value.numel() == partition:
            state[key] = _flat(source, group, rank, key, group.partition, value.dtype)
        else:
            _check_equal(group, f"optimizer state {key!r}", [states[key] for states in olds])
            state[key] = _own(value)
    return state


def _options(source: RegroupSource, group: FlatGroup, target: Layout) -> dict[str, Any]:
    """Hyperparameters from the old groups, name and labels of the new one.

    A group whose parameters were not trained, and that has hyperparameters of its own, keeps them.
    """
    places = (source.place(old, old.ranks[0]) for old in source.models_for(group, target))
    olds = [shard.options[index] for shard, index in places]
    if not olds:
        olds = [{k: tuple(v) if isinstance(v, list) else v for k, v in group.options.items()}]
    for key in sorted(set().union(*olds) - set(_NAMES)):
        _check_equal(group, key, [old.get(key) for old in olds])
    names: dict[str, Any] = {"name": group.name}
    if group.parallel_group is not None:
        names |= {"moe": True, **group.labels}
    kept = {key: _own(value) for key, value in olds[0].items() if key not in _NAMES}
    if not source.homes(group):
        kept.pop("step", None)  # older optimizers of DeepSpeed count here
    return {**names, **kept}


def _own(value: Any) -> Any:
    """A counter or an option; one that is a tensor gets a storage of its own for each group."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _check_equal(group: FlatGroup, what: str, values: Sequence[Any]) -> None:
    first = values[0]
    for value in values[1:]:
        tensors = isinstance(first, torch.Tensor) and isinstance(value, torch.Tensor)
        if not (torch.equal(first, value) if tensors else first == value):
            raise CheckpointError(
                f"group {group.name!r} of the new groups would hold parameters with {what} "
                f"{first} and {value}: their old groups cannot become one."
            )


def _padding(group: FlatGroup, data_rank: int, lean: bool) -> int:
    """As ``runtime/zero/stage_1_and_2.py`` and ``runtime/bf16_optimizer.py`` count it."""
    if lean:
        return group.partition - group.filled(data_rank)
    last = data_rank == group.ranks[-1]
    used = sum(param.numel for param in group.params)
    return group.partition * len(group.ranks) - used if last else 0


def _gaps(group: FlatGroup) -> list[int]:
    """Elements between each parameter and the next one; 0 behind the last."""
    starts = [param.offset for param in group.params[1:]]
    return [start - param.end for param, start in zip(group.params, starts, strict=False)] + [0]


def _slices(group: FlatGroup, data_rank: int, reorders: bool) -> Mapping[str, Any]:
    return OrderedDict(
        (name, fragment_address(start=start, numel=numel))
        for name, start, numel in stated_fragments(group, data_rank, reorders)
    )
