"""What is said about two runs' groups, against every element spelled out."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies as st

from moe_groups.checkpoints.layout import FlatGroup, FlatParam, lay_out
from moe_groups.checkpoints.layout_diff import compare_groups, moved_parameters

Groups = list[FlatGroup]


def group(name: str, *members: tuple[str, int], expert: int | None = None) -> FlatGroup:
    params = [FlatParam(param, numel, 0, (numel,), None, expert) for param, numel in members]
    return FlatGroup(name, (0,), lay_out(params))


A, B, C = ("a", 3), ("b", 3), ("c", 4)


# ---- against brute force --------------------------------------------------------------


@st.composite
def some_groups(draw: st.DrawFn) -> Groups:
    """Of few parameters, so that two draws are often of one model and sometimes equal."""
    names = draw(st.sampled_from(["ab", "abc", "abc", "abd"]))
    sizes = draw(st.sampled_from([{"a": 2}, {"a": 2}, {"a": 1}]))
    params = [(name, sizes.get(name, 2)) for name in draw(st.permutations(names))]
    cut = draw(st.integers(1, len(params) - 1))
    title = draw(st.sampled_from(["g", "h"]))
    return [group("first", *params[:cut]), group(title, *params[cut:])]


def spell(groups: Groups) -> list[list[tuple[str, int]]]:
    return [[(p.name, index) for p in g.params for index in range(p.numel)] for g in groups]


def sizes(groups: Groups) -> dict[str, int]:
    return {param.name: param.numel for group in groups for param in group.params}


@given(some_groups(), some_groups())
@settings(max_examples=500)
def test_verdict(saved: Groups, running: Groups) -> None:
    found = compare_groups(saved, running)
    if any(sizes(running).get(name, size) != size for name, size in sizes(saved).items()):
        wanted = "model"
    elif sizes(saved) != sizes(running):
        wanted = "trained"
    elif spell(saved) != spell(running):
        wanted = "regrouped"
    else:
        names = [[group.name for group in groups] for groups in (saved, running)]
        wanted = "same" if names[0] == names[1] else "renamed"
    assert found.verdict == wanted
    assert bool(found.lines) == (wanted != "same")
    assert len(set(found.lines)) == len(found.lines)


def first_places(groups: Groups) -> dict[str, tuple[int, int]]:
    return {
        name: (index, elements.index((name, 0)))
        for index, elements in enumerate(spell(groups))
        for name in {name for name, _ in elements}
    }


@given(some_groups(), some_groups())
@settings(max_examples=300)
def test_every_move_is_told(saved: Groups, running: Groups) -> None:
    """Every parameter that is elsewhere is named, or its whole group; and no other is."""
    if sizes(saved) != sizes(running):
        return
    before, after = first_places(saved), first_places(running)
    moved = {name for name in after if before[name] != after[name]}
    assert moved_parameters(saved, running) == (len(moved), len(after))
    mentioned = set()
    for line in compare_groups(saved, running).lines if moved else ():
        start = line.split()[0]
        if start == "group":
            mentioned |= {param.name for param in running[int(line.split()[1])].params}
        else:
            mentioned.add(start.rstrip(":"))
    assert mentioned == moved


# ---- in words -------------------------------------------------------------------------


def lines(saved: Sequence[FlatGroup], running: Sequence[FlatGroup]) -> list[str]:
    return list(compare_groups(saved, running).lines)


def test_renamed() -> None:
    saved, running = [group("x", A), group("y", B)], [group("x", A), group("z", B)]
    assert lines(saved, running) == ["group 1 was 'y', is 'z'"]


def test_moved_inside_a_group() -> None:
    assert lines([group("g", A, B, C)], [group("g", B, A, C)]) == [
        "b: saved in group 0 ('g') from element 3, now in group 0 ('g') from element 0",
        "a: saved in group 0 ('g') from element 0, now in group 0 ('g') from element 3",
    ]


def test_moved_to_another_group() -> None:
    saved = [group("g", A, B, expert=5)]
    running = [group("h", A, expert=5), group("k", B, expert=5)]
    assert lines(saved, running) == [
        "b (expert 5): saved in group 0 ('g') from element 3, now in group 1 ('k') from element 0"
    ]


def test_reordered_groups_are_told_by_group() -> None:
    saved, running = [group("x", A, C), group("y", B)], [group("y", B), group("x", A, C)]
    assert lines(saved, running) == [
        "group 0 ('y') was saved as group 1 ('y')",
        "group 1 ('x') was saved as group 0 ('x')",
    ]
    assert moved_parameters(saved, running) == (3, 3)


def test_reordered_and_renamed() -> None:
    saved, running = [group("x", A), group("y", B)], [group("new", B), group("x", A)]
    assert lines(saved, running)[0] == "group 0 ('new') was saved as group 1 ('y')"


def test_alignment_alone() -> None:
    tight = group("g", A, B)
    aligned = FlatGroup("g", (0,), lay_out(tight.params, 8))
    assert compare_groups([tight], [aligned]).verdict == "regrouped"
    assert lines([tight], [aligned]) == [
        "b: saved in group 0 ('g') from element 3, now in group 0 ('g') from element 8"
    ]


def test_other_parameters() -> None:
    found = compare_groups([group("g", A, B)], [group("g", A, C)])
    assert found.verdict == "trained"
    assert found.lines == (
        "b is in the checkpoint, but no group of the engine steps it",
        "c is stepped by the engine, but is not in the checkpoint",
    )


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ((2, 3), (3, 2), "a was saved with shape [2, 3], the model has shape [3, 2]"),
        ((6,), (7,), "a was saved with shape [6], the model has shape [7]"),
        (None, (7,), "a was saved with 6 elements, the model has shape [7]"),
    ],
)
def test_other_shapes(old: tuple[int, ...] | None, new: tuple[int, ...] | None, line: str) -> None:
    numel = 7 if new == (7,) else 6
    saved = [FlatGroup("g", (0,), (FlatParam("a", 6, 0, old),))]
    running = [FlatGroup("g", (0,), (FlatParam("a", numel, 0, new),))]
    found = compare_groups(saved, running)
    assert (found.verdict, found.lines) == ("model", (line,))


def test_unknown_shapes_are_not_compared() -> None:
    saved = [FlatGroup("g", (0,), (FlatParam("a", 6, 0),))]
    running = [FlatGroup("g", (0,), (FlatParam("a", 6, 0, (2, 3)),))]
    assert compare_groups(saved, running).verdict == "same"
