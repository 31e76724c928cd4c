"""The ordered plan: which parameter goes to which group. Pure, without DeepSpeed."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from moe_groups.names import GroupNames
from moe_groups.packing import pack
from moe_groups.rules import Variant

SplitBy: TypeAlias = Literal["parallel_group", "module", "expert"]
LEVELS: tuple[SplitBy, ...] = ("parallel_group", "module", "expert")

Place: TypeAlias = tuple[str, str | None, int | None]
"""Parallel group, layer and expert number of an expert parameter."""


Run: TypeAlias = tuple[int, int, Place | None, torch.dtype]
"""Neighbouring rows ``start`` to ``stop`` that share place and dtype."""


@dataclass(frozen=True, slots=True)
class Table:
    """What the plan needs to know of the parameters, which are its rows.

    Attributes:
        sizes: elements of each.
        runs: the rows that are to be grouped, in order; the others are left out.
        variants: index into ``kinds`` of each.
        kinds: the variants, those of one source together and in the sources' order.
    """

    sizes: list[int]
    runs: list[Run]
    variants: list[int]
    kinds: list[Variant]


class Key(NamedTuple):
    """What all parameters of a group have in common. None: not split at this level."""

    parallel_group: str | None
    layer: str | None
    expert_number: int | None
    variant: Variant
    dtype: torch.dtype


class PlannedGroup(NamedTuple):
    """One group of the plan.

    Attributes:
        name: unique in the plan; for experts a valid process-group key.
        key: what its parameters have in common.
        members: rows of its parameters, in order.
    """

    name: str
    key: Key
    members: list[int]


def make_plan(
    table: Table,
    split_by: SplitBy,
    cap_of: Callable[[Key], int | None],
    sources: Sequence[Mapping[str, Any]],
) -> list[PlannedGroup]:
    """Split the parameters by key and size; dense groups first, then experts.

    Expert groups stand in the order in which their parallel group and layer first appear,
    then by expert number, variant and dtype, so order and names depend on the order of
    the input alone.

    Args:
        split_by: the finest level at which groups are kept apart.
        cap_of: largest number of elements of a group with this key, None for no cap.
        sources: the caller's groups, for their names.
    """
    buckets = _split(table, split_by)
    names = GroupNames([source.get("name") for source in sources], [key for key, _ in buckets])
    size_of = table.sizes.__getitem__
    plan: list[PlannedGroup] = []
    for key, members in buckets:
        cap = cap_of(key)
        if cap is None or len(members) == 1 or sum(map(size_of, members)) <= cap:
            plan.append(PlannedGroup(names.of(key), key, members))
            continue
        for number, (start, stop) in enumerate(pack(list(map(size_of, members)), cap)):
            plan.append(PlannedGroup(names.of(key, number), key, members[start:stop]))
    return plan


def _split(table: Table, split_by: SplitBy) -> list[tuple[Key, list[int]]]:
    """Rows by key, in the order that the plan promises.

    Values are replaced by the rank of their first appearance, so that the buckets sort as
    tuples of integers.
    """
    groups: dict[str | None, int] = {None: 0}
    layers: dict[str | None, int] = {None: 0}
    dtypes: dict[torch.dtype, int] = {}
    by_layer, by_expert = split_by != "parallel_group", split_by == "expert"
    one_variant = len(table.kinds) == 1
    buckets: dict[tuple[int, int, int, int, int], list[int]] = {}
    for start, stop, place, dtype in table.runs:
        group = layer = 0
        expert = -1
        if place is not None:
            group = groups.setdefault(place[0], len(groups))
            if by_layer:
                layer = layers.setdefault(place[1], len(layers))
            if by_expert and place[2] is not None:
                expert = place[2]
        dtype_rank = dtypes.setdefault(dtype, len(dtypes))
        if one_variant:
            bucket = group, layer, expert, 0, dtype_rank
            if bucket in buckets:
                buckets[bucket].extend(range(start, stop))
            else:
                buckets[bucket] = list(range(start, stop))
            continue
        for row in range(start, stop):
            bucket = group, layer, expert, table.variants[row], dtype_rank
            buckets.setdefault(bucket, []).append(row)
    group_of, layer_of, dtype_of = list(groups), list(layers), list(dtypes)
    return [
        (Key(group_of[g], layer_of[la], None if e < 0 else e, table.kinds[v], dtype_of[d]), rows)
        for (g, la, e, v, d), rows in sorted(buckets.items())
    ]


def padded_partition(numel: int, ranks: int) -> int:
    """Elements of one rank's partition: DeepSpeed pads a group to a multiple of 2 x ranks."""
    return math.ceil(numel / (2 * ranks)) * 2


def largest_group(partition_bytes: int, itemsize: int, ranks: int) -> int:
    """Most elements of a group whose padded partition takes at most ``partition_bytes``."""
    return partition_bytes // itemsize // 2 * 2 * ranks


def fingerprint(parts: Iterable[object]) -> bytes:
    """A digest of ``parts`` that is the same in every process; 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.digest()
