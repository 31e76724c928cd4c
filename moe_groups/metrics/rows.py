"""Which layer and expert each piece of a stepped tensor belongs to.

ZeRO and BF16_Optimizer step flat partitions: a partition begins and ends inside of a parameter
(with ZeRO-3 it has a slice of each), and holds pieces of many layers and experts. Here each piece
gets the row in which it counts.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed

from moe_groups._deepspeed.engines import Engine
from moe_groups._deepspeed.process_groups import expert_parallel_rank
from moe_groups._deepspeed.step.around_step import placed_parameters
from moe_groups.experts.find import find_experts
from moe_groups.tags import ExpertTag, numel_of, shape_of
from moe_groups.topology import ep_size_of


class Row(NamedTuple):
    """The layer and expert of a number.

    Attributes:
        layer: label of an MoE layer, or the block of dense parameters.
        moe: True for experts of the layer, False for dense parameters of a block.
        expert: the expert's global number; None if it has none.
    """

    layer: str
    moe: bool = False
    expert: int | None = None


class Piece(NamedTuple):
    """A run of elements of one row in a tensor that the optimizer steps."""

    row: Row
    start: int
    numel: int


class Stepped(NamedTuple):
    """A tensor that the optimizer steps, and the pieces of it that this rank counts."""

    tensor: torch.Tensor
    pieces: list[Piece]


def block_of(name: str) -> str:
    """The block that a dense parameter is reported under: its path up to the first number.

    Without a number it is the path of its module.

    Example:
        >>> block_of("model.layers.3.self_attn.q_proj.weight"), block_of("lm_head.weight")
        ('model.layers.3', 'lm_head')
    """
    parts = name.split(".")
    for end, part in enumerate(parts, 1):
        if part.isdigit():
            return ".".join(parts[:end])
    return ".".join(parts[:-1]) or name


def stepped_tensors(engine: Engine) -> tuple[list[Stepped], list[Row]]:
    """What this rank steps, and the rows of all that it shares, in the order of the groups.

    Each element of the model is in a piece of exactly one rank.
    """
    found = find_experts(engine.module)
    names, tags = found.name_of(), found.tags()
    stepped: list[Stepped] = []
    rows: dict[Row, None] = {}
    for tensor, placed in placed_parameters(engine):
        pieces: list[Piece] = []
        for name, param, begin, start, stop in placed:
            tag = tags.get(id(param))
            runs = list(_rows(names.get(id(param), name), param, tag))
            if any(row not in rows for row, _ in runs):
                rows |= dict.fromkeys(_all_rows(runs, tag))
            pieces += cut_runs(runs, begin, start, stop)
        if pieces:
            stepped.append(Stepped(tensor, list(merge_neighbours(pieces))))
    return stepped, list(rows)


def _rows(name: str, param: torch.Tensor, tag: ExpertTag | None) -> list[tuple[Row, int]]:
    """Rows of a parameter with their elements, in order."""
    numel = numel_of(param)
    if tag is None:
        return [(Row(block_of(name)), numel)]
    layer = tag.layer or "experts"
    rank = expert_parallel_rank(tag.parallel_group) or 0
    if not tag.fused:
        return [(Row(layer, True, tag.global_number(rank)), numel)]
    own = shape_of(param)[0]
    return [(Row(layer, True, rank * own + number), numel // own) for number in range(own)]


def _all_rows(runs: Sequence[tuple[Row, int]], tag: ExpertTag | None) -> list[Row]:
    """Rows of a parameter; for an expert, all rows of its layer, over all ranks."""
    if tag is None:
        return [row for row, _ in runs]
    layer = runs[0][0].layer
    own = len(runs) if tag.fused else tag.num_local_experts or 0
    everywhere = range(own * ep_size_of(tag.parallel_group))
    return [Row(layer, True), *(Row(layer, True, number) for number in everywhere)]


def cut_runs(runs: Sequence[tuple[Row, int]], begin: int, start: int, stop: int) -> Iterator[Piece]:
    """The parts between ``start`` and ``stop`` of runs that follow one another from ``begin``."""
    for row, numel in runs:
        first, end = max(begin, start), min(begin + numel, stop)
        if first < end:
            yield Piece(row, first, end - first)
        begin += numel


def merge_neighbours(pieces: list[Piece]) -> Iterator[Piece]:
    """Neighbours of one row as one piece."""
    last: Piece | None = None
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if last and last.row == piece.row and last.start + last.numel == piece.start:
            last = last._replace(numel=last.numel + piece.numel)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last


def rows_of_all_ranks(own: list[Row]) -> list[Row]:
    """Rows of every rank in one order, first of the stages; all ranks call it together."""
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, own)
    return list(dict.fromkeys(row for rows in everywhere for row in rows))
