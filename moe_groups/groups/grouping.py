"""The ordered plan: which parameter goes to which group. Pure, without DeepSpeed."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.keys import NO_EXPERT, Families, Key, Line, PlannedGroup, Rows, Table, Tiles
from moe_groups.groups.names import GroupNames
from moe_groups.groups.packing import fill, pack
from moe_groups.groups.rules import Variant
from moe_groups.topology import sharing_ranks, world_size


def make_plan(
    table: Table,
    cap_of: Callable[[Key], int | None],
    sources: Sequence[Mapping[str, Any]],
) -> list[PlannedGroup]:
    """Cut the families by size and put them in order; dense groups first, then experts.

    Expert groups have the order in which their parallel group and layer first appear, then
    expert number, variant, dtype and mesh, so order and names depend on the order of
    the input alone.

    Args:
        cap_of: largest number of elements of a group with this key, None for no cap.
        sources: the caller's groups, for their names.
    """
    size_of = table.sizes.__getitem__
    last: Key | None = None
    cap: int | None = None

    def tiles(key: Key, rows: Rows) -> Tiles | None:
        nonlocal last, cap
        if key is not last:
            last, cap = key, cap_of(key)
        if cap is None or len(rows) == 1 or sum(map(size_of, rows)) <= cap:
            return None
        return pack(list(map(size_of, rows)), cap)

    return name_groups(
        ((line, tiles(line[0], line[2])) for line in lines(table.families)), table, sources
    )


def name_groups(
    cut_lines: Iterable[tuple[Line, Tiles | None]],
    table: Table,
    sources: Sequence[Mapping[str, Any]],
) -> list[PlannedGroup]:
    """The groups that are the tiles of these lines; a line without tiles is one group."""
    names = GroupNames([source.get("name") for source in sources], table.families)
    plan: list[PlannedGroup] = []
    for (key, expert, rows), tiles in cut_lines:
        if tiles is None:
            plan.append((names.of(key, expert), key, expert, rows))
            continue
        for tile, (start, stop) in enumerate(tiles):
            plan.append((names.of(key, expert, tile), key, expert, rows[start:stop]))
    return plan


def split_like_deepspeed(table: Table, cap: float) -> list[tuple[str | None, Variant, Rows]]:
    """Parallel group, variant and rows of the groups that DeepSpeed's own split makes.

    ``split_params_into_different_moe_groups_for_optimizer`` in ``deepspeed/moe/utils.py`` leaves
    the dense parameters of each of the caller's groups together, whatever their number and their
    dtypes, and behind them fills tiles with the experts. Where experts are in several parallel
    groups, DeepSpeed has these in another order in every run; here they are in the model's.

    Args:
        table: with families of whole parallel groups. Each variant is one of the caller's groups.
        cap: most elements of a tile.
    """
    rows_of: dict[tuple[str | None, Variant], list[int]] = {}
    for key, experts in table.families.items():
        found = rows_of.setdefault((key.parallel_group, key.variant), [])
        found += chain.from_iterable(experts.values())
    parallel_groups = list(dict.fromkeys([None, *(group for group, _ in rows_of)]))
    groups: list[tuple[str | None, Variant, Rows]] = []
    for own in sorted(
        rows_of, key=lambda own: (bool(own[0]), own[1], parallel_groups.index(own[0]))
    ):
        rows = sorted(rows_of[own])
        tiles = fill(table.sizes_of(rows), cap if own[0] else math.inf)
        groups += [(*own, rows[start:stop]) for start, stop in tiles]
    return groups


def lines(families: Families) -> Iterator[Line]:
    """What would be one group each without a cap, in the order that the plan promises."""
    for cell in _cells(families):
        for number, rank, rows in _by_expert(cell):
            yield cell[rank][0], None if number == NO_EXPERT else number, rows


def _cells(families: Families) -> list[list[tuple[Key, dict[int, Rows]]]]:
    """The families of each layer together, in the order that the plan promises."""
    groups: dict[str | None, int] = {None: 0}
    layers: dict[str | None, int] = {None: 0}
    dtypes: dict[tuple[torch.dtype, Any], int] = {}
    for key in families:
        groups.setdefault(key.parallel_group, len(groups))
        layers.setdefault(key.layer, len(layers))
        dtypes.setdefault(key[3:], len(dtypes))
    cells: dict[tuple[int, int], list[tuple[Key, dict[int, Rows]]]] = {}
    for key, experts in sorted(families.items(), key=lambda f: (f[0].variant, dtypes[f[0][3:]])):
        cell = groups[key.parallel_group], layers[key.layer]
        cells.setdefault(cell, []).append((key, experts))
    return [cells[cell] for cell in sorted(cells)]


def _by_expert(cell: list[tuple[Key, dict[int, Rows]]]) -> list[tuple[int, int, Rows]]:
    """``(expert number, index of the family, rows)``, sorted."""
    return sorted(
        (number, rank, rows)
        for rank, (_, experts) in enumerate(cell)
        for number, rows in experts.items()
    )


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


if TYPE_CHECKING:
    from moe_groups.groups.keys import Key


DEEPSPEED_MAX_GROUP_SIZE = 178956971
"""Default cap of DeepSpeed's split, in elements (``deepspeed/moe/utils.py``)."""


class Caps:
    """``max_group_size`` and ``max_group_bytes`` of :func:`create_moe_param_groups`.

    Raises:
        InvalidArgumentError: a cap in bytes while the number of ranks is not known.
    """

    def __init__(
        self,
        size: int | float | None,
        nbytes: int | float | None,
        world: int | None,
        tensor_ranks: int = 1,
    ) -> None:
        self.tensor_ranks = tensor_ranks
        self.size, self.nbytes, self.world = _whole(size), _whole(nbytes), world
        if self.nbytes is not None and self.world is None:
            self.world = world_size()
            if self.world is None:
                raise InvalidArgumentError(
                    "max_group_bytes counts the bytes on one rank, but the number of ranks is not "
                    "known yet: call deepspeed.init_distributed() first or pass "
                    "data_parallel_size."
                )

    def of(self, key: "Key") -> int | None:
        """The cap of groups with this key, in elements."""
        if self.nbytes is None:
            return self.size
        assert self.world is not None
        ranks = sharing_ranks(key.parallel_group, self.world, self.tensor_ranks)
        most = max(1, largest_group(self.nbytes, key.dtype.itemsize, ranks))
        return most if self.size is None else min(most, self.size)


def _whole(cap: int | float | None) -> int | None:
    return None if cap is None or cap == float("inf") else int(cap)
