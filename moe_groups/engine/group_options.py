"""Give layers and experts other options, or freeze them, in the middle of a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import distributed

from moe_groups._common.arguments import NotNegative, check, checked
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups._deepspeed.engines import Engine, SteppingEngine, stepped_groups
from moe_groups._deepspeed.process_groups import expert_parallel_rank
from moe_groups._deepspeed.step.around_step import check_steps_partitions
from moe_groups.engine.step_options import Options, write_options
from moe_groups.errors import InvalidArgumentError, OverrideError
from moe_groups.experts.find import FoundExpert, TaggedModel, find_experts
from moe_groups.groups.rules import compile_pattern


def select_groups(engine: Engine, patterns: Sequence[str]) -> list[list[int]]:
    """For each pattern the positions of this rank's groups; all ranks call it together.

    A pattern is compared with the same addresses as ``overrides``, but with global numbers of
    experts.

    Raises:
        OverrideError: on all ranks, if a pattern selects nothing on any rank, or a part of a
            group on some rank.
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
    engine: Engine, patterns: Sequence[str], found: TaggedModel
) -> tuple[list[list[int]], str | None]:
    """Positions of the selected groups, and the problem of the first that is selected in part."""
    names = {
        id(param): (found.names[row], _addresses(found, row), found.experts[row])
        for row, param in enumerate(found.params)
    }
    selected: list[list[int]] = []
    for pattern in patterns:
        matcher = compile_pattern(pattern)
        places: list[int] = []
        for place, (group, params) in enumerate(stepped_groups(engine)):
            sides: dict[bool, tuple[str, FoundExpert | None]] = {}
            for param in params:
                name, known, expert = names.get(id(param), ("a parameter of no module", [], None))
                sides.setdefault(any(map(matcher.fullmatch, known)), (name, expert))
            if len(sides) > 1:
                (one, expert), (rest, other) = sides[True], sides[False]
                return [], (
                    f"pattern {pattern!r} selects a part of group {str(group.get('name', ''))!r}: "
                    f"{one}, but not {rest}. Options hold for whole groups: make the groups with "
                    f"{_separates(expert, other)}, or widen the pattern."
                )
            if True in sides:
                places.append(place)
        selected.append(places)
    return selected, None


def _separates(one: FoundExpert | None, other: FoundExpert | None) -> str:
    """With what two parameters of a group come into different ones."""
    if one and other and one.tag.layer != other.tag.layer:
        return "split_by='module'"
    if one and other and one.tag.expert_number != other.tag.expert_number:
        return "split_by='expert'"
    return "an override of that pattern"


def _addresses(found: TaggedModel, row: int) -> list[str]:
    """What patterns are compared with, with the expert's global number."""
    if (expert := found.experts[row]) is None:
        return found.addresses(row, None)
    rank = expert_parallel_rank(expert.tag.parallel_group) or 0
    number = expert.tag.global_number(rank)
    return found.addresses(row, expert.tag._replace(expert_number=number))


def _examples(found: TaggedModel) -> list[str]:
    """The first dense parameter's address and the first expert's."""
    shown: dict[bool, str] = {}
    for row, expert in enumerate(found.experts):
        shown.setdefault(expert is not None, _addresses(found, row)[-1])
    return list(shown.values())


_KINDS: dict[str, Any] = {
    "lr": NotNegative,
    "lr_multiplier": NotNegative,
    "weight_decay": NotNegative,
    "frozen": bool,
}

Schedule: TypeAlias = Callable[[int], Options]
"""Number of optimizer steps done so far to the options of the next one."""


@checked
def set_group_options(engine: SteppingEngine, pattern: str, **options: float | bool | None) -> None:
    """Set options of the groups that a pattern selects, from the next step on.

    All ranks call it together, between ``engine.step()`` and the next forward pass. Options
    stay until they are set again; options that are not given do not change, and None restores
    a group's own value. DeepSpeed's checkpoints save and load them. They apply inside of the
    optimizer's step only: a learning-rate scheduler does not see them, and continues as
    without them.

    Args:
        engine: from ``deepspeed.initialize``.
        pattern: a glob pattern as in ``overrides`` of :func:`create_moe_param_groups`, with one
            difference: the number in ``<layer>.expert.<number>`` is the *global* number of the
            expert. Ranks that hold other experts do not change their groups.
        **options: ``lr`` replaces the group's (and the scheduler's); ``lr_multiplier`` is a
            factor of it; ``weight_decay``; ``frozen``: True keeps weights and optimizer state
            unchanged, bit for bit, and takes the group out of the gradient norm.

    Raises:
        InvalidArgumentError: an unknown option or a value out of range, or an engine that
            does not step with ZeRO-1 to ZeRO-3, BF16_Optimizer or without a wrapper.
        OverrideError: on all ranks, if the pattern selects nothing on any rank, or a part of
            a group on some rank. Nothing has been changed then.

    Example:
        >>> set_group_options(engine, "blocks.1.moe.expert.5", frozen=True)    # doctest: +SKIP
        >>> set_group_options(engine, "*.expert.*", lr_multiplier=0.1)         # doctest: +SKIP
    """
    _check_engine(engine, "set_group_options")
    _check_options(repr(pattern), options)
    selected = select_groups(engine, [pattern])[0]
    write_options(engine, dict.fromkeys(selected, options))


@checked
class GroupSchedule:
    """Options that depend on the step; call :meth:`apply` before each forward pass.

    All ranks make one. It computes the options again before each step, so a resumed run has the
    options of its step.

    Args:
        engine: from ``deepspeed.initialize``.
        schedules: pairs of a pattern, as in :func:`set_group_options`, and a function from the
            number of optimizer steps done so far to options. It is the same on all ranks, and
            returns the same options at every step. If two select the same group, the later one
            wins.

    Raises:
        InvalidArgumentError: as :func:`set_group_options`; :meth:`apply` too.
        OverrideError: as :func:`set_group_options`.

    Example:
        >>> schedule = GroupSchedule(engine, [                                 # doctest: +SKIP
        ...     ("*.expert.*", lambda step: {"frozen": step >= 1000}),
        ...     ("*.gate.*", lambda step: {"lr_multiplier": min(1.0, step / 100)}),
        ... ])
        >>> schedule.apply()  # in the training loop, first of all             # doctest: +SKIP
    """

    def __init__(self, engine: SteppingEngine, schedules: Sequence[tuple[str, Schedule]]) -> None:
        _check_engine(engine, "GroupSchedule")
        self.engine, self.schedules = engine, list(schedules)
        self._selected = select_groups(engine, [pattern for pattern, _ in self.schedules])

    def apply(self) -> None:
        """Set the options of the next step; no communication."""
        wanted: dict[int, dict[str, float | bool | None]] = {}
        for (pattern, schedule), selected in zip(self.schedules, self._selected, strict=True):
            options = schedule(self.engine.global_steps)
            _check_options(f"schedule of {pattern!r}", options)
            for index in selected:
                wanted.setdefault(index, {}).update(options)
        write_options(self.engine, wanted)


def _check_engine(engine: Engine, what: str) -> None:
    check_steps_partitions(engine, what)
    support_our_groups(moe=True)  # so that load_checkpoint applies the options


def _check_options(where: str, options: Any) -> None:
    check(where, options, Mapping[str, Any])
    for key, value in options.items():
        if key not in _KINDS:
            raise InvalidArgumentError(
                f"{where}: there is no option {key!r}; use {', '.join(_KINDS)}."
            )
        check(f"{where}: {key}", value, _KINDS[key] | None)
