"""Do the files of all ranks say the same of the groups that they share?"""

from collections import Counter, defaultdict
from collections.abc import Iterator

from moe_groups.checkpoints.inspect.examine import FileFacts
from moe_groups.checkpoints.inspect.expected import Expected
from moe_groups.checkpoints.inspect.report import Problem, ProblemKind
from moe_groups.checkpoints.layout import Rank

_SHOWN = 3


class RankAgreement:
    """Takes the facts of one rank after the other, and keeps what differs from the first.

    Args:
        expected: the groups.
    """

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self.files: dict[Rank, str] = {}
        self.sizes: Counter[int] = Counter()
        self.steps: dict[float, dict[Rank, list[int]]] = {}
        self._ranks: dict[int, list[Rank]] = defaultdict(list)
        self._first: dict[int, dict[str, str]] = {}
        self._other: dict[tuple[int, str], dict[str, list[Rank]]] = {}

    def take(self, rank: Rank, facts: FileFacts) -> None:
        """Add the groups of a rank."""
        if facts.groups:
            self.files[rank] = facts.name
        for group in facts.groups:
            index, said = group.index, group.said
            self.sizes[index] += group.size
            self._ranks[index].append(rank)
            first = self._first.setdefault(index, said)
            for key in sorted(key for key in {*first, *said} if first.get(key) != said.get(key)):
                values = self._other.setdefault((index, key), {})
                values.setdefault(said.get(key, "missing"), []).append(rank)
            if group.step is not None and (index, "the optimizer state") not in self._other:
                self.steps.setdefault(group.step, defaultdict(list))[rank].append(index)

    @property
    def step(self) -> float | None:
        """The most that all ranks count for a group; else what most counters say.

        Where two values tie, the engine's, or the larger.
        """
        if agreed := self._agreed():
            return max(agreed.values())
        counts = {step: sum(map(len, ranks.values())) for step, ranks in self.steps.items()}
        usual = self.expected.steps
        return max(counts, key=lambda s: (counts[s], s == usual, s), default=None)

    def steps_of(self) -> dict[int, float | None]:
        """The counter of each group; None where its ranks differ."""
        found: dict[int, float | None] = {}
        for step, ranks in self.steps.items():
            for index in {index for own in ranks.values() for index in own}:
                found[index] = None if index in found else step
        return found

    def problems(self) -> Iterator[Problem]:
        """What differs between ranks or groups: a sentence for each rank and value."""
        usual, agreed = self.step, self._agreed()
        for step, ranks in sorted(self.steps.items()):
            for rank, own in ranks.items() if step != usual else ():
                if indices := [index for index in own if self._name(index) not in agreed]:
                    what = f"the step counter of {self._groups(indices)} is {step:g}"
                    yield self._problem("step", rank, f"{what}, elsewhere it is {usual:g}.")
        odd: dict[tuple[Rank, str, str], list[int]] = {}
        for (index, key), values in sorted(self._other.items()):
            differing = {rank for having in values.values() for rank in having}
            same = [rank for rank in self._ranks[index] if rank not in differing]
            sides = {self._first[index].get(key, "missing"): same, **values}
            most = max(sides, key=lambda value: len(sides[value]))
            one = len(sides[most]) == 1
            where = f"for {self.expected.named(sides[most][0])}" if one else "for most ranks"
            for value, having in sides.items():
                for rank in having if value != most else ():
                    rest = f"is {value}, {where} it is {most}."
                    odd.setdefault((rank, key, rest), []).append(index)
        for (rank, key, rest), indices in odd.items():
            yield self._problem("content", rank, f"{key} of {self._groups(indices)} {rest}")

    def _agreed(self) -> dict[str, float]:
        """Counters of groups of which all ranks say the same: those thawed in a run began later."""
        counted: dict[str, set[float]] = defaultdict(set)
        ranks_of: dict[str, set[Rank]] = defaultdict(set)
        for step, ranks in self.steps.items():
            for rank, indices in ranks.items():
                for name in map(self._name, indices):
                    counted[name].add(step)
                    ranks_of[name].add(rank)
        everywhere = {name for name, ranks in ranks_of.items() if ranks == {*self.files}}
        return {name: max(counted[name]) for name in everywhere if len(counted[name]) == 1}

    def _name(self, index: int) -> str:
        return self.expected.layout.groups[index].name

    def _problem(self, kind: ProblemKind, rank: Rank, text: str) -> Problem:
        return Problem(kind, self.files[rank], f"{self.expected.named(rank)}: {text}")

    def _groups(self, indices: list[int]) -> str:
        groups = self.expected.layout.groups
        names = list(dict.fromkeys(repr(groups[index].name) for index in indices))[:_SHOWN]
        rest = len(indices) - len(names)
        more = f" and {rest:,} more" if rest else ""
        return f"group{'s' * (len(indices) > 1)} {', '.join(names)}{more}"
