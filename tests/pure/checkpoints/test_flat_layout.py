"""Flat buffers against brute force: every element of every buffer spelled out as a list."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import pytest
from hypothesis import assume, given, settings, strategies as st

from moe_groups.checkpoints.layout import (
    FlatGroup,
    FlatParam,
    Layout,
    Piece,
    Rank,
    fragments,
    lay_out,
    merge_ranks,
    pieces,
)

Element: TypeAlias = tuple[str, int] | None
"""Name of a parameter and index in it; None for a gap or padding."""

SIZES = st.integers(0, 13)


def spell_params(params: Sequence[FlatParam], alignment: int) -> list[Element]:
    """The buffer of parameters behind each other, without padding at its end."""
    buffer: list[Element] = []
    for param in params:
        while len(buffer) % alignment:
            buffer.append(None)
        buffer += [(param.name, index) for index in range(param.numel)]
    return buffer


def spell(group: FlatGroup) -> list[Element]:
    """The buffer of a group with padding, from the offsets that the group states."""
    buffer: list[Element] = [None] * max((p.offset + p.numel for p in group.params), default=0)
    for param in group.params:
        for index in range(param.numel):
            assert buffer[param.offset + index] is None, "two parameters at one place"
            buffer[param.offset + index] = (param.name, index)
    while len(buffer) % (2 * len(group.ranks)):  # DeepSpeed's padding
        buffer.append(None)
    return buffer


def partitions(group: FlatGroup) -> list[list[Element]]:
    """What each rank holds, in the order of the group's ranks."""
    buffer, count = spell(group), len(group.ranks)
    size = len(buffer) // count
    return [buffer[index * size : (index + 1) * size] for index in range(count)]


@st.composite
def groups(draw: st.DrawFn) -> FlatGroup:
    sizes = draw(st.lists(SIZES, min_size=1, max_size=6))
    params = [FlatParam(f"p{number}", size, -1) for number, size in enumerate(sizes)]
    ranks = draw(st.permutations(range(7)))[: draw(st.integers(1, 5))]
    placed = lay_out(params, draw(st.sampled_from([1, 2, 4, 8])))
    return FlatGroup("g", tuple(ranks), placed)


@given(st.lists(SIZES, max_size=8), st.integers(1, 9))
def test_lay_out(sizes: list[int], alignment: int) -> None:
    params = [FlatParam(f"p{number}", size, -1, (size,)) for number, size in enumerate(sizes)]
    placed = lay_out(params, alignment)
    buffer = spell_params(params, alignment)
    assert [param._replace(offset=-1) for param in placed] == params
    for param in placed:
        assert buffer[param.offset : param.end] == [(param.name, i) for i in range(param.numel)]
        assert param.offset % alignment == 0
    group = FlatGroup("g", (0,), placed)
    assert group.numel == len(buffer)
    assert [element for element in spell(group) if element] == [e for e in buffer if e]


@given(groups())
def test_partition_and_filled(group: FlatGroup) -> None:
    held = partitions(group)
    end = max(param.offset + param.numel for param in group.params)
    assert group.numel == end
    assert [group.partition] * len(group.ranks) == [len(part) for part in held]
    start = 0
    for rank, part in zip(group.ranks, held, strict=True):
        assert group.filled(rank) == sum(start <= at < start + len(part) for at in range(end))
        start += len(part)


def test_empty_group() -> None:
    group = FlatGroup("g", (3, 1), ())
    assert (group.numel, group.partition, group.filled(1)) == (0, 0, 0)
    assert list(fragments(group, 3)) == []


def spell_piece(piece: Piece) -> list[tuple[int, int, tuple[str, int]]]:
    """``(rank, place in the partition, element)`` of each element."""
    return [
        (piece.rank, piece.start + index, (piece.param.name, piece.skip + index))
        for index in range(piece.numel)
    ]


@given(groups(), st.data())
def test_pieces(group: FlatGroup, data: st.DataObject) -> None:
    """They name the place of each element asked for, in order, one piece for each rank."""
    param = data.draw(st.sampled_from(group.params))
    start = data.draw(st.integers(0, param.numel))
    stop = data.draw(st.none() | st.integers(start, param.numel))
    found = list(pieces(group, param, start, stop))
    held = dict(zip(group.ranks, partitions(group), strict=True))
    named = [place for piece in found for place in spell_piece(piece)]
    assert all(held[rank][at] == element for rank, at, element in named)
    wanted = range(start, param.numel if stop is None else stop)
    assert [element for *_, element in named] == [(param.name, index) for index in wanted]
    assert all(piece.numel > 0 for piece in found)
    assert len({piece.rank for piece in found}) == len(found)


@given(groups())
def test_fragments(group: FlatGroup) -> None:
    """They are the whole content of the partition, in order."""
    for rank, part in zip(group.ranks, partitions(group), strict=True):
        found = list(fragments(group, rank))
        places = [place for piece in found for place in spell_piece(piece)]
        assert places == [(rank, at, e) for at, e in enumerate(part) if e is not None]
        assert all(piece.numel > 0 for piece in found)


@given(groups())
def test_fragments_are_the_pieces(group: FlatGroup) -> None:
    by_rank = [piece for rank in group.ranks for piece in fragments(group, rank)]
    by_param = [piece for param in group.params for piece in pieces(group, param)]
    assert sorted(by_rank) == sorted(by_param)


# ---- all ranks ------------------------------------------------------------------------


Columns: TypeAlias = list[tuple[Rank, list[FlatGroup]]]


@st.composite
def columns(draw: st.DrawFn) -> Columns:
    """Groups from a small domain, so that two draws are sometimes the same.

    Every group is on all of its ranks, in an order of the rank's own.
    """
    world = draw(st.integers(1, 2))
    made = []
    for number in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 2), min_size=1, max_size=2))
        params = [FlatParam(f"{number}.{index}", size, 0) for index, size in enumerate(sizes)]
        params = draw(st.permutations(params))
        ranks = draw(st.sampled_from([(0,), (1,), (0, 1), (1, 0)] if world == 2 else [(0,)]))
        placed = lay_out(params, draw(st.sampled_from([1, 4])))
        made.append(FlatGroup(f"g{draw(st.integers(0, 9))}", ranks, placed))
    return [
        (Rank(0, rank), draw(st.permutations([group for group in made if rank in group.ranks])))
        for rank in range(world)
    ]


def spell_columns(found: Columns) -> dict[Rank, list[Any]]:
    """Everything that is anywhere: for each rank, who shares each group and the whole buffer."""
    return {rank: [(group.ranks, partitions(group)) for group in own] for rank, own in found}


@given(columns(), columns())
@settings(max_examples=300)
def test_fingerprints_are_equal_where_all_elements_are(one: Columns, other: Columns) -> None:
    same = spell_columns(one) == spell_columns(other)
    assert (merge_ranks(one).fingerprint() == merge_ranks(other).fingerprint()) == same


@given(columns(), st.randoms(use_true_random=False))
def test_names_and_order_of_description_do_not_matter(
    found: Columns, randomness: random.Random
) -> None:
    renamed = [
        (rank, [replace(g, name=f"other {g.name}", options={"lr": 1.0}) for g in own])
        for rank, own in found
    ]
    randomness.shuffle(renamed)
    assert merge_ranks(renamed).fingerprint() == merge_ranks(found).fingerprint()


@pytest.mark.parametrize("change", ["swap", "name", "gap", "size", "ranks", "model", "order"])
def test_every_move_changes_the_fingerprint(change: str) -> None:
    a, b = FlatParam("a", 3, 0), FlatParam("b", 3, 3)
    groups = [FlatGroup("g", (0, 1), (a, b)), FlatGroup("h", (0, 1), (FlatParam("c", 3, 0),))]
    changed = {
        "swap": (a._replace(offset=3), b._replace(offset=0)),
        "name": (a, b._replace(name="B")),
        "gap": (a, b._replace(offset=4)),
        "size": (a, b._replace(numel=2)),
    }
    first = groups[0]
    if change in changed:
        first = replace(first, params=tuple(sorted(changed[change], key=lambda p: p.offset)))
    elif change == "ranks":
        first = replace(first, ranks=(1, 0))
    elif change == "model":
        first = replace(first, model_rank=1)
    others = [groups[1], first] if change == "order" else [first, groups[1]]
    before, after = ([(Rank(0, data), g) for data in (0, 1)] for g in (groups, others))
    assert merge_ranks(before).fingerprint() != merge_ranks(after).fingerprint()
    if change != "order":
        assert groups[0].place() != first.place()


@given(columns())
def test_merge_ranks_keeps_each_rank_and_each_group_once(found: Columns) -> None:
    assume(all(len({g.name for g in own}) == len(own) for _, own in found))
    layout = merge_ranks(found)
    assert {rank: layout.of(rank) for rank in layout.order} == dict(found)
    places = [(group.name, group.place()) for group in layout.groups]
    assert len(set(places)) == len(places)
    assert set(places) == {(group.name, group.place()) for _, own in found for group in own}


def test_sizes_of_the_world() -> None:
    ranks = [Rank(model, data) for model in (3, 1) for data in (2, 0, 1)]
    layout = merge_ranks([(rank, []) for rank in ranks])
    assert layout.data_parallel_size == 3
    assert layout.model_ranks == [1, 3]
    assert Layout((), {}).data_parallel_size == 0
