"""One rank's optimizer state in the new groups."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_groups.checkpoints.convert.copying import Chunk, Copier, combine
from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.layout import FlatGroup, Layout, Rank, fragments
from moe_groups.checkpoints.shard import (
    ALIGNMENT,
    CONTENT,
    COUNTS,
    MASTER,
    PADDINGS,
    SLICES,
    STATE,
    Shard,
    stated_fragments,
)
from moe_groups.checkpoints.torch_file import (
    ends_with_directory,
    fake_like,
    read_records,
    storage_of,
    storage_records,
    storage_start,
    tensor_start,
    tensors_in,
    write_crcs,
    write_skeleton,
)
from moe_groups.errors import CheckpointError
from moe_groups.tags import LABELS

_NAMES = ("params", "name", "moe", *LABELS)


class NewShard(NamedTuple):
    """A file that is to be written.

    Attributes:
        content: with fake tensors.
        fills: where the bytes of each storage come from.
    """

    content: dict[str, Any]
    fills: dict[int, list[Chunk]]


def new_shard(source: RegroupSource, target: Layout, rank: Rank) -> NewShard:
    """What a rank's file holds in the new groups.

    Raises:
        CheckpointError: groups with other hyperparameters or counters would become one, or the
            source is damaged.
    """
    like = source.shard(Rank(rank.model, rank.data % source.layout.data_parallel_size))
    lean = like.lean
    fills: dict[int, list[Chunk]] = {}
    master, states, param_groups = [], {}, []
    groups = target.of(rank)
    for index, group in enumerate(groups):
        size = group.filled(rank.data) if lean else group.partition
        tensor = fake_like(source.master_dtype(group), size)
        fills[storage_of(tensor)] = _flat(source, group, rank, None, size, tensor.itemsize)
        master.append(tensor)
        state, more = _state(source, group, rank)
        fills.update(more)
        if state:
            states[index] = state
        options, more = _options(source, group)
        fills.update(more)
        param_groups.append({**options, "params": [index]})
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
    content = {**like.content, CONTENT: optimizer}
    for tensor in tensors_in(content):  # the rest stays as it was
        whole = tensor.untyped_storage()
        if storage_of(tensor) not in fills:
            chunk = Chunk(like.path, storage_start(tensor), whole.nbytes())
            fills[storage_of(tensor)] = [chunk]
    return NewShard(content, fills)


def _flat(
    source: RegroupSource, group: FlatGroup, rank: Rank, key: str | None, size: int, itemsize: int
) -> list[Chunk]:
    """The bytes of a partition: its parameters, and zeros between and behind them."""
    chunks: list[Chunk] = []
    at = 0
    for piece in fragments(group, rank.data):
        if piece.start > at:
            chunks.append(Chunk(None, 0, (piece.start - at) * itemsize))
        chunks.extend(source.chunks(group, piece, key))
        at = piece.start + piece.numel
    if at < size:
        chunks.append(Chunk(None, 0, (size - at) * itemsize))
    return _joined(chunks)


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Runs that follow each other in one file as one: parameters mostly keep their neighbours."""
    joined = list(chunks[:1])
    for chunk in chunks[1:]:
        last = joined[-1]
        if chunk.start == last.start + last.size and chunk.path == last.path:
            joined[-1] = last._replace(size=last.size + chunk.size)
        else:
            joined.append(chunk)
    return joined


def _state(
    source: RegroupSource, group: FlatGroup, rank: Rank
) -> tuple[dict[str, Any], dict[int, list[Chunk]]]:
    """Optimizer state of a group: what has the size of a partition is laid out anew."""
    if any(shard.options[index].get("use_muon") for shard, index in source.saved(group)):
        raise CheckpointError(
            f"group {group.name!r} of the new groups would hold parameters that DeepSpeed's Muon "
            "steps, whose momentum is kept as whole matrices on each rank that has a part of them, "
            "and cannot be laid out anew. Load with the groups of the checkpoint, or its weights "
            "alone (load_module_only=True)."
        )
    olds = [(shard, shard.states(index)) for shard, index in source.saved(group)]
    kinds = sorted({str(sorted(states)) for _, states in olds})
    if len(kinds) > 1:
        raise CheckpointError(
            f"group {group.name!r} of the new groups would hold parameters with optimizer state "
            f"{' and '.join(kinds)}: their old groups cannot become one."
        )
    shard, index = source.saved(group)[0]
    partition, size = shard.partition(index), group.partition
    state: dict[str, Any] = {}
    fills: dict[int, list[Chunk]] = {}
    for key, value in shard.states(index).items():
        if isinstance(value, torch.Tensor) and value.dim() and value.numel() == partition:
            state[key] = fake_like(value.dtype, size)
            flat = _flat(source, group, rank, key, size, value.itemsize)
            fills[storage_of(state[key])] = flat
            continue
        values = [old.real(states[key]) for old, states in olds]
        _check_equal(group, f"optimizer state {key!r}", values)
        state[key] = _as_it_was(value, shard, fills)
    return state, fills


def _options(
    source: RegroupSource, group: FlatGroup
) -> tuple[dict[str, Any], dict[int, list[Chunk]]]:
    """Hyperparameters from the old groups, name and labels of the new one."""
    saved = source.saved(group)
    olds = [shard.real_options(index) for shard, index in saved]
    for key in sorted(set().union(*olds) - set(_NAMES)):
        _check_equal(group, key, [old.get(key) for old in olds])
    names: dict[str, Any] = {"name": group.name}
    if group.parallel_group is not None:
        names |= {"moe": True, **group.labels}
    shard, index = saved[0]
    fills: dict[int, list[Chunk]] = {}
    kept = {
        key: _as_it_was(value, shard, fills)
        for key, value in shard.options[index].items()
        if key not in _NAMES
    }
    return {**names, **kept}, fills


def _as_it_was(value: Any, shard: Shard, fills: dict[int, list[Chunk]]) -> Any:
    """A counter or an option; the bytes of one that is a tensor come from its file."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = fake_like(value.dtype, value.numel()).reshape(value.shape)
    size = value.numel() * value.itemsize
    fills[storage_of(copy)] = [Chunk(shard.path, tensor_start(value), size)]
    return copy


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
    from deepspeed.utils.tensor_fragment import fragment_address

    return OrderedDict(
        (name, fragment_address(start=start, numel=numel))
        for name, start, numel in stated_fragments(group, data_rank, reorders)
    )


def write_shard(shard: NewShard, path: Path, copier: Copier) -> None:
    """Write the file; nothing else writes to ``path``.

    Raises:
        CheckpointError: the source is cut off, or holds tensors where they cannot be seen.
        OSError: the file cannot be written.
    """
    records = write_skeleton(shard.content, path)
    crcs = copier.fill(path, [(record, shard.fills[of]) for of, record in records.items()])
    write_crcs(path, crcs)


def shard_is_kept(shard: NewShard, path: Path, copier: Copier) -> bool:
    """Did :func:`write_shard` write all of this file, and is it as it was then?"""
    try:
        records = storage_records(shard.content, path)
        starts = {record.start for record in records.values()}
        rest = [record for record in read_records(path) if record.start not in starts]
        wanted = [(record, shard.fills[of]) for of, record in records.items()]
    except (CheckpointError, ValueError):  # cut off, damaged, or with other tensors
        return False
    sound = all(combine(copier.cover(path, record, [])) == record.crc for record in rest)
    return sound and ends_with_directory(path) and copier.kept(path, wanted)
