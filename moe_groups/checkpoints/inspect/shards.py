"""Is one rank's optimizer state sound, and what is in it?"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_groups.checkpoints.inspect.expected import Expected
from moe_groups.checkpoints.inspect.experts import ParamKey, Place
from moe_groups.checkpoints.inspect.report import Problem, ProblemKind, unreadable
from moe_groups.checkpoints.inspect.scan import (
    PICKLE,
    Scan,
    Segment,
    changed_text,
    scan_file,
    sound_pickle,
)
from moe_groups.checkpoints.inspect.slim_shard import (
    extents,
    name_record,
    read_slim_shard,
    segments,
    state_bytes,
    step_of,
    wrapper_of,
)
from moe_groups.checkpoints.layout import FlatGroup, Layout, Rank, readable_options
from moe_groups.checkpoints.shard import Fragment, Shard, stated_fragments
from moe_groups.checkpoints.torch_file import Record, read_records


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What one rank's file says of a group.

    Attributes:
        index: of the group in the layout.
        options: hyperparameters.
        states: names of the optimizer state.
        step: see :func:`step_of`.
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


def examine_shard(
    path: Path,
    rank: Rank,
    expected: Expected,
    places: dict[ParamKey, Place],
    data: bool,
    progress: Callable[[int], None],
) -> ShardFacts:
    """Check one file; whatever is wrong with it becomes a problem.

    Args:
        path: the file.
        rank: whose it is.
        expected: what ought to be in it.
        places: of the parameters, to name experts.
        data: read the tensors too.
        progress: is told how many bytes were read.
    """
    facts = ShardFacts(rank, path.name)
    shard = expected.shards.get(rank)
    try:
        records = read_records(path)
        if sound_pickle(path, records):
            shard = shard or read_slim_shard(path)
            _examine_content(facts, shard, expected)
        else:
            pickle = next(record for record in records if record.name == PICKLE)
            facts.report("checksum", changed_text(path.name, pickle))
        if data:
            known = shard if facts.groups else None
            groups = expected.layout.of(rank) if facts.groups else []
            _examine_data(facts, path, records, known, groups, places, progress)
    except Exception as error:
        facts.problems.append(unreadable(path, path.name, error))
    return facts


def _examine_content(facts: ShardFacts, shard: Shard, expected: Expected) -> None:
    """Compare with the layout; take the groups' figures where that is possible."""
    facts.wrapper = wrapper_of(shard)
    size, rank = shard.data_parallel_size, facts.rank
    if size != expected.data_parallel_size:
        facts.report(
            "content",
            f"{facts.name} was saved by a run of {size} data-parallel ranks, the checkpoint by "
            f"{expected.data_parallel_size}: it is left over from another save.",
        )
        return
    if rank not in expected.layout.order:
        return
    groups = expected.layout.of(rank)
    if expected.manifest is not None and (text := _difference(shard, rank, groups)):
        facts.report("content", f"{facts.name} is not what the manifest says: {text}.")
        return
    for index, place in enumerate(expected.layout.order[rank]):
        facts.groups.append(
            GroupFacts(
                index=place,
                options=readable_options(shard.options[index]),
                states=tuple(sorted(shard.states(index))),
                step=step_of(shard, index),
                size=state_bytes(shard, index),
            )
        )
        for text in _too_short(shard, index):
            facts.report("content", f"{facts.name}: {text}.")


def _difference(shard: Shard, rank: Rank, groups: list[FlatGroup]) -> str | None:
    """Where a shard is not what the layout says."""
    if shard.holds(rank, groups):
        return None
    if len(shard.options) != len(groups):
        return f"it has {len(shard.options)} groups in place of {len(groups)}"
    for index, group in enumerate(groups):
        what = f"group {index} ({group.name!r})"
        if shard.partition(index) != group.partition:
            return (
                f"its partition of {what} has {shard.partition(index)} elements in place of "
                f"{group.partition}"
            )
        said = stated_fragments(group, rank.data, shard.reorders)
        for found, wanted in zip(shard.fragments(index), said, strict=False):
            if found != wanted:
                return f"{what} holds {_named(found)} in place of {_named(wanted)}"
        if len(shard.fragments(index)) != len(said):
            return f"{what} holds {len(shard.fragments(index))} parameters in place of {len(said)}"
    return "it disagrees with it"


def _named(fragment: Fragment) -> str:
    return f"{fragment.numel} elements of {fragment.name} from element {fragment.start} on"


def _too_short(shard: Shard, index: int) -> Iterator[str]:
    end = max((start + numel for _, start, numel in shard.fragments(index)), default=0)
    for state, extent in extents(shard, index).items():
        if extent.size < end:
            name = str(shard.options[index].get("name", ""))
            yield (
                f"{state} of group {index} ({name!r}) has {extent.size} elements, its parameters "
                f"need {end}"
            )


def _examine_data(
    facts: ShardFacts,
    path: Path,
    records: list[Record],
    shard: Shard | None,
    groups: list[FlatGroup],
    places: dict[ParamKey, Place],
    progress: Callable[[int], None],
) -> None:
    wanted: list[Segment] = []
    if shard is not None:
        for index, group in enumerate(groups):
            wanted.extend(segments(shard, index, group, facts.rank.data))
    scan = scan_file(path, records, wanted, progress)
    facts.unstated = scan.unstated
    for record in scan.changed:
        if record.name != PICKLE:
            what = None
            if shard is not None:
                what = name_record(path, record.start, record.start + record.size)
            facts.report("checksum", changed_text(path.name, record, what))
    if shard is not None:
        _take_figures(facts, scan)
        _report_broken(facts, scan, {s.key: s.numel for s in wanted}, places)


def _take_figures(facts: ShardFacts, scan: Scan) -> None:
    for (index, name, state), square in scan.squares.items():
        key = facts.groups[index].index, name
        facts.squares.setdefault(key, {})[state] = square


def _report_broken(
    facts: ShardFacts,
    scan: Scan,
    sizes: dict[tuple[int, str, str], int],
    places: dict[ParamKey, Place],
) -> None:
    for (index, name, state), count in sorted(scan.broken.items()):
        place = places[facts.groups[index].index, name]
        expert = "" if place.expert is None else f" (expert {place.expert})"
        facts.report(
            "not finite",
            f"{facts.name}: {state} of {name}{expert}: {count:,} of "
            f"{sizes[index, name, state]:,} values are NaN or infinite.",
        )


_SHOWN = 3
_STATES = "the optimizer state"


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
