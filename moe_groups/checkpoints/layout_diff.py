"""What differs between the groups of a checkpoint and those of a run, in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, of_any_expert

Verdict = Literal["same", "renamed", "regrouped", "trained", "model"]


@dataclass(frozen=True, slots=True)
class Difference:
    """The result of :func:`compare_groups`.

    Attributes:
        verdict: "same"; "renamed" (every element is in its place, groups have other names);
            "regrouped" (the same parameters in other places, which converting can repair);
            "trained" (some are in the groups of one side alone, as where they were frozen since);
            "model" (parameters of other sizes).
        lines: one for each thing that differs; empty for "same".
    """

    verdict: Verdict
    lines: tuple[str, ...] = ()


def compare_groups(saved: Sequence[FlatGroup], running: Sequence[FlatGroup]) -> Difference:
    """Compare one rank's groups, both in the order of its optimizer."""
    if other := list(_other_parameters(saved, running)):
        sizes = any(resized for _, resized in other)
        return Difference("model" if sizes else "trained", tuple(line for line, _ in other))
    if [_rows(group) for group in saved] != [_rows(group) for group in running]:
        return Difference("regrouped", tuple(_moves(saved, running)))
    renamed = [
        f"group {index} was {old.name!r}, is {new.name!r}"
        for index, (old, new) in enumerate(zip(saved, running, strict=True))
        if old.name != new.name
    ]
    return Difference("renamed" if renamed else "same", tuple(renamed))


def _rows(group: FlatGroup) -> tuple[tuple[str, int, int], ...]:
    return group.place()[-1]  # type: ignore[no-any-return]


def _other_parameters(
    saved: Sequence[FlatGroup], running: Sequence[FlatGroup]
) -> Iterator[tuple[str, bool]]:
    """Lines, and whether each is of a parameter with another size."""
    old = {param.name: param for group in saved for param in group.params}
    new = {param.name: param for group in running for param in group.params}
    for name in old:
        if name not in new:
            yield f"{name} is in the checkpoint, but no group of the engine steps it", False
    for name, other in new.items():
        one = old.get(name)
        if one is None:
            yield f"{name} is stepped by the engine, but is not in the checkpoint", False
            continue
        shapes = one.shape is not None and other.shape is not None and one.shape != other.shape
        if shapes or one.numel != other.numel:
            yield f"{name} was saved with {_size(one)}, the model has {_size(other)}", True


def _size(param: FlatParam) -> str:
    return f"{param.numel} elements" if param.shape is None else f"shape {list(param.shape)}"


def _moves(saved: Sequence[FlatGroup], running: Sequence[FlatGroup]) -> Iterator[str]:
    """Whole groups that stand elsewhere in one line each, then single parameters."""
    was = {_rows(group): index for index, group in enumerate(saved)}
    homes = {
        param.name: (index, param.offset)
        for index, group in enumerate(saved)
        for param in group.params
    }
    for index, group in enumerate(running):
        before = was.get(_rows(group))
        if before == index:
            continue
        if before is not None:
            yield (
                f"group {_named(index, group)} was saved as group {_named(before, saved[before])}"
            )
            continue
        for param in group.params:
            home, offset = homes[param.name]
            if home != index or offset != param.offset:
                yield (
                    f"{_param(param)}: saved in group {_named(home, saved[home])} from element "
                    f"{offset}, now in group {_named(index, group)} from element {param.offset}"
                )


def _named(index: int, group: FlatGroup) -> str:
    return f"{index} ({group.name!r})"


def _param(param: FlatParam) -> str:
    return param.name if param.expert is None else f"{param.name} (expert {param.expert})"


def moved_parameters(saved: Sequence[FlatGroup], running: Sequence[FlatGroup]) -> tuple[int, int]:
    """How many parameters would get the state of another place, and how many there are."""
    places = [
        {
            param.name: (index, param.offset)
            for index, group in enumerate(groups)
            for param in group.params
        }
        for groups in (saved, running)
    ]
    moved = sum(places[0].get(name) != place for name, place in places[1].items())
    return moved, len(places[1])


Key: TypeAlias = tuple[int, str | None, int | None, str]
"""Which parameter it is: model-parallel rank, parallel group, EP rank, name."""


def key_of(group: FlatGroup, param: FlatParam, by_expert: bool = False) -> Key:
    """The key of a parameter.

    Args:
        by_expert: the same for each ``ep_size``, where the number of the expert over all ranks is
            known: the name has that number then.
    """
    name = param.global_name if by_expert and group.parallel_group else None
    if name is not None:
        return group.model_rank, "", None, name
    return group.model_rank, group.parallel_group, group.ep_rank, param.name


def keys_of_params(layout: Layout, by_expert: bool = False) -> set[Key]:
    """Of all trained parameters."""
    return {key_of(group, param, by_expert) for group in layout.groups for param in group.params}


def other_expert_parallel_size(saved: Layout, running: Layout) -> str | None:
    """What says that experts are on other ranks than before; None where they are not.

    Experts that are trained on one side alone do not count: they have no state to convert.
    """
    was, now = (
        {(model, of_any_expert(name)): key for model, key, _, name in keys_of_params(layout)}
        for layout in (saved, running)
    )
    if all(was[place] == now[place] for place in was.keys() & now.keys()):
        return None
    before, after = (
        ", ".join(sorted({key for key in of.values() if key})) or "no parallel group"
        for of in (was, now)
    )
    return f"it was saved with experts of {before}, the run has experts of {after}"


def unnumbered_problem(*layouts: Layout) -> str | None:
    """Which expert parameter cannot go to other ranks, and why; None if all can."""
    for layout in layouts:
        for group in layout.groups:
            for param in group.params if group.parallel_group else ():
                if param.global_name is None:
                    return (
                        f"nothing says which expert of all ranks {param.name} is part of. That is "
                        "known for DeepSpeed's MoE layers, in a checkpoint with moe_groups.json. "
                        "For AutoEP use DeepSpeed's universal checkpoints"
                    )
    return None
