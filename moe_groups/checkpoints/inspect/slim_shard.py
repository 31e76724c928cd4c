"""One rank's optimizer state as sizes and places alone, so that many ranks' fit into memory."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_groups.checkpoints.inspect.report import MASTER_NAME
from moe_groups.checkpoints.inspect.scan import FLOATS, Segment
from moe_groups.checkpoints.layout import FlatGroup, fragments
from moe_groups.checkpoints.shard import CONTENT, MASTER, STATE, Shard, read_shard
from moe_groups.checkpoints.torch_file import tensor_start, tensors_in

_ZERO_STAGE = "zero_stage"


class Extent(NamedTuple):
    """A tensor of a file.

    Attributes:
        start: offset of its first element in the file.
        size: elements.
        dtype: of the elements.
    """

    start: int
    size: int
    dtype: torch.dtype

    def numel(self) -> int:
        """As a tensor's, for :class:`Shard`."""
        return self.size

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize


def read_slim_shard(path: Path) -> Shard:
    """:func:`read_shard` with an :class:`Extent` for each tensor, and numbers for counters.

    A skeleton's tensors take kilobytes each, these some hundred bytes.

    Raises:
        CheckpointError: as :func:`read_shard`.
    """
    full = read_shard(path)
    state = full.optimizer[STATE]
    with open(path, "rb") as file:
        slim_state = {
            "param_groups": [_slim(options, file.fileno()) for options in full.options],
            "state": {key: _slim(own, file.fileno()) for key, own in state["state"].items()},
        }
        master = [extent_of(tensor) for tensor in full.optimizer[MASTER]]
    optimizer = {**full.optimizer, STATE: slim_state, MASTER: master}
    return Shard(path, {**full.content, CONTENT: optimizer})


def _slim(values: Mapping[str, Any], file: int) -> dict[str, Any]:
    return {
        key: value
        if not isinstance(value, torch.Tensor)
        else extent_of(value)
        if value.dim()
        else _number(value, file)
        for key, value in values.items()
    }


def extent_of(tensor: torch.Tensor) -> Extent:
    """Where a loaded fake tensor is."""
    return Extent(tensor_start(tensor), tensor.numel(), tensor.dtype)


def _number(tensor: torch.Tensor, file: int) -> Any:
    data = bytearray(os.pread(file, tensor.itemsize, tensor_start(tensor)))
    return torch.frombuffer(data, dtype=tensor.dtype).item()


def wrapper_of(shard: Shard) -> str:
    """Who saved it, in the words of the manifest."""
    if not shard.lean:
        return "BF16_Optimizer"
    return f"ZeRO-{int(shard.optimizer[_ZERO_STAGE])}"


def state_bytes(shard: Shard, index: int) -> int:
    """Bytes of the rank's master weights and optimizer state of a group."""
    found = [shard.optimizer[MASTER][index], *shard.states(index).values()]
    return sum(extent.nbytes for extent in found if isinstance(extent, Extent))


def extents(shard: Shard, index: int) -> dict[str, Extent]:
    """The master weights and optimizer state of a group that are as long as its partition."""
    states = {MASTER_NAME: shard.optimizer[MASTER][index], **shard.states(index)}
    lengths = (shard.partition(index), states[MASTER_NAME].size)
    return {
        name: value
        for name, value in states.items()
        if isinstance(value, Extent) and value.size in lengths
    }


def segments(shard: Shard, index: int, group: FlatGroup, rank: int) -> Iterator[Segment]:
    """The numbers of each parameter in a data-parallel rank's partition of a group."""
    found = [(n, extent) for n, extent in extents(shard, index).items() if extent.dtype in FLOATS]
    for piece in fragments(group, rank):  # with round_robin_gradients the file tells them wrong
        for state, (first, size, dtype) in found:
            count = min(piece.numel, size - piece.start)  # less where files contradict each other
            key = index, piece.param.name, state
            if count > 0:
                yield Segment(first + piece.start * dtype.itemsize, count, dtype, key)


def step_of(shard: Shard, index: int) -> float | None:
    """What the group's counter says; 0 before the first step, None where nothing counts."""
    states = shard.states(index)
    counter = states.get("step", shard.options[index].get("step"))
    if counter is None and not states:
        return 0.0
    return float(counter) if isinstance(counter, int | float) else None


def name_record(path: Path, start: int, stop: int) -> str | None:
    """What a shard keeps between two offsets: ``exp_avg of group 'dense'``."""
    shard = read_shard(path)
    for index, options in enumerate(shard.options):
        states = {MASTER_NAME: shard.optimizer[MASTER][index], **shard.states(index)}
        for name, value in states.items():
            if any(start <= tensor_start(tensor) < stop for tensor in tensors_in(value)):
                return f"{name} of group {index} ({str(options.get('name', ''))!r})"
    return None
