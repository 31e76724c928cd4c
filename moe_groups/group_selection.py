"""Which groups of an engine a pattern selects."""

from collections.abc import Sequence
from typing import Any

from torch import distributed

from moe_groups._deepspeed.engines import stepped_groups
from moe_groups._deepspeed.process_groups import expert_parallel_rank
from moe_groups.errors import OverrideError
from moe_groups.expert_layers import TaggedModel, find_experts
from moe_groups.rules import compile_pattern
from moe_groups.tags import ExpertTag


def select_groups(engine: Any, patterns: Sequence[str]) -> list[list[int]]:
    """For each pattern the places of this rank's groups, all ranks together.

    A pattern is compared with what ``overrides`` are compared with, but experts have their
    numbers over all ranks.

    Raises:
        OverrideError: on all ranks, where a pattern selects nothing on any of them, or a part of
            a group on one of them.
    """
    found = find_experts(engine.module)
    selected, problem = _select(engine, patterns, found)
    everywhere: list[Any] = [None] * distributed.get_world_size()
    own = ([len(groups) for groups in selected], problem, _examples(found))
    distributed.all_gather_object(everywhere, own)
    for rank, (_, problem, _) in enumerate(everywhere):
        if problem is not None:
            raise OverrideError(f"rank {rank}: {problem}")
    for index, pattern in enumerate(patterns):
        if not any(counts[index] for counts, _, _ in everywhere):
            examples = dict.fromkeys(one for _, _, some in everywhere for one in some)
            raise OverrideError(
                f"pattern {pattern!r} selects no parameter of any group. It is compared with the "
                "qualified name and the modules above, and for experts with '<layer>.expert."
                f"<number over all ranks>'; here these are for example: {', '.join(examples)}."
            )
    return selected


def _select(
    engine: Any, patterns: Sequence[str], found: TaggedModel
) -> tuple[list[list[int]], str | None]:
    """Places of the selected groups, and what is wrong with the first that is cut in two."""
    names = {
        id(param): (found.names[row], _addresses(found, row))
        for row, param in enumerate(found.params)
    }
    selected: list[list[int]] = []
    for pattern in patterns:
        matcher = compile_pattern(pattern)
        places: list[int] = []
        for place, (group, params) in enumerate(stepped_groups(engine)):
            sides: dict[bool, list[str]] = {True: [], False: []}
            for param in params:
                name, known = names.get(id(param), ("a parameter of no module", []))
                sides[any(map(matcher.fullmatch, known))].append(name)
            if sides[True] and sides[False]:
                return [], (
                    f"pattern {pattern!r} selects a part of group {str(group.get('name', ''))!r}: "
                    f"{sides[True][0]}, but not {sides[False][0]}. Options hold for whole groups: "
                    "make the groups with split_by='expert' (and an override for what is to be a "
                    "group of its own), or widen the pattern."
                )
            if sides[True]:
                places.append(place)
        selected.append(places)
    return selected, None


def _addresses(found: TaggedModel, row: int) -> list[str]:
    expert = found.experts[row]
    return found.addresses(row, _with_global_number(expert.tag) if expert else None)


def _with_global_number(tag: ExpertTag) -> ExpertTag:
    rank = expert_parallel_rank(tag.parallel_group) or 0
    return tag._replace(expert_number=tag.global_number(rank))


def _examples(found: TaggedModel) -> list[str]:
    """The first dense parameter's address and the first expert's."""
    shown: dict[bool, str] = {}
    for row, expert in enumerate(found.experts):
        shown.setdefault(expert is not None, _addresses(found, row)[-1])
    return list(shown.values())
