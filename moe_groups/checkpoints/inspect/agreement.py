"""What the file of each rank says of its groups, and do the ranks agree?"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from moe_groups.checkpoints.inspect.experts import ParamKey
from moe_groups.checkpoints.inspect.report import Problem, ProblemKind
from moe_groups.checkpoints.layout import Layout, Rank

_SHOWN = 3
_STATES = "the optimizer state"


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What one rank's file says of a group.

    Attributes:
        index: of the group in the layout.
        options: hyperparameters.
        states: names of the optimizer state.
        step: see :func:`moe_groups.checkpoints.shard.step_of_group`; 0 before the first step.
        size: bytes of state, master weights too.
    """

    index: int
    options: dict[str, Any]
    states: tuple[str, ...]
    step: float | None
    size: int


@dataclass(slots=True)
class ShardFacts:
    """What was found in one rank's file.

    Attributes:
        rank: whose it is.
        name: of the file.
        wrapper: who saved it; None where it could not be read.
        groups: in its order; empty where they are not those of the layout.
        squares: sums of squares by group, parameter and state.
        problems: what is wrong.
        unstated: records without a CRC.
    """

    rank: Rank
    name: str
    wrapper: str | None = None
    groups: list[GroupFacts] = field(default_factory=list)
    squares: dict[ParamKey, dict[str, float]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unstated: int = 0

    def report(self, kind: ProblemKind, text: str) -> None:
        """Add a problem of this file."""
        self.problems.append(Problem(kind, self.name, text))


class RankAgreement:
    """Takes the facts of one rank after the other and keeps little of them.

    Args:
        layout: the groups.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.several_models = len(layout.model_ranks) > 1
        self.sizes: Counter[int] = Counter()
        self.files: dict[Rank, str] = {}
        self.ranks: dict[int, list[Rank]] = defaultdict(list)
        self.first: dict[int, GroupFacts] = {}
        self.steps: dict[float, dict[Rank, list[int]]] = {}
        self.other: dict[tuple[int, str], dict[str, list[Rank]]] = {}

    def take(self, facts: ShardFacts) -> None:
        """Add the groups of a rank."""
        if facts.groups:
            self.files[facts.rank] = facts.name
        for group in facts.groups:
            self.sizes[group.index] += group.size
            self.ranks[group.index].append(facts.rank)
            first = self.first.setdefault(group.index, group)
            self._compare(first, group, facts.rank)
            if group.step is not None and group.states == first.states:
                ranks = self.steps.setdefault(group.step, defaultdict(list))
                ranks[facts.rank].append(group.index)

    def _compare(self, first: GroupFacts, group: GroupFacts, rank: Rank) -> None:
        """Note what differs from the first rank that has the group."""
        for key in (first.options.keys() | group.options.keys()) - {"step"}:
            if first.options.get(key) != group.options.get(key):
                self._note(group.index, key, repr(group.options.get(key)), rank)
        if first.states != group.states:
            self._note(group.index, _STATES, _listed(group.states), rank)

    def _note(self, index: int, key: str, value: str, rank: Rank) -> None:
        self.other.setdefault((index, key), {}).setdefault(value, []).append(rank)

    def step(self, engine_steps: int | None) -> float | None:
        """What most counters say; where two values tie, the engine's, or the larger."""
        counts = {step: sum(map(len, ranks.values())) for step, ranks in self.steps.items()}
        return max(counts, key=lambda s: (counts[s], s == engine_steps, s), default=None)

    def steps_of(self) -> dict[int, float | None]:
        """The counter of each group; None where its ranks differ."""
        found: dict[int, float | None] = {}
        for step, ranks in self.steps.items():
            for index in {index for own in ranks.values() for index in own}:
                found[index] = None if index in found else step
        return found

    def problems(self, engine_steps: int | None) -> Iterator[Problem]:
        """What differs between ranks or groups."""
        usual = self.step(engine_steps)
        for step, ranks in sorted(self.steps.items()):
            for rank, indices in ranks.items() if step != usual else ():
                text = (
                    f"{self._named(rank)}: the step counter of {self._groups(indices)} is "
                    f"{step:g}, elsewhere it is {usual:g}."
                )
                yield Problem("step", self.files[rank], text)
        for (rank, key, value, usually, where), indices in self._odd_ones().items():
            text = (
                f"{self._named(rank)}: {key} of {self._groups(indices)} is {value}, {where} it is "
                f"{usually}."
            )
            yield Problem("content", self.files[rank], text)

    def _odd_ones(self) -> dict[tuple[Rank, str, str, str, str], list[int]]:
        """Groups by rank, key, its value there, the value elsewhere, and where that is."""
        odd: dict[tuple[Rank, str, str, str, str], list[int]] = {}
        for (index, key), values in sorted(self.other.items()):
            differing = {rank for ranks in values.values() for rank in ranks}
            same = [rank for rank in self.ranks[index] if rank not in differing]
            first = self.first[index]
            own = _listed(first.states) if key == _STATES else repr(first.options.get(key))
            sides = {own: same, **values}
            usual = max(sides, key=lambda value: len(sides[value]))
            one = len(sides[usual]) == 1
            where = f"for {self._named(sides[usual][0])}" if one else "for most ranks"
            for value, ranks in sides.items():
                for rank in ranks if value != usual else ():
                    odd.setdefault((rank, key, value, usual, where), []).append(index)
        return odd

    def _groups(self, indices: list[int]) -> str:
        names = list(dict.fromkeys(repr(self.layout.groups[index].name) for index in indices))
        shown = ", ".join(names[:_SHOWN])
        rest = len(indices) - min(len(names), _SHOWN)
        more = f" and {rest:,} more" if rest else ""
        return f"group{'s' * (len(indices) > 1)} {shown}{more}"

    def _named(self, rank: Rank) -> str:
        model = f" of model-parallel rank {rank.model}" if self.several_models else ""
        return f"rank {rank.data}{model}"


def _listed(states: tuple[str, ...]) -> str:
    return ", ".join(states) or "nothing"
