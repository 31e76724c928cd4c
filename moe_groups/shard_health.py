"""Is one rank's optimizer state sound, and what is in it?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_groups.checkpoint_report import Problem, ProblemKind, unreadable
from moe_groups.checkpoint_scan import PICKLE, Scan, Segment, changed_text, scan_file, sound_pickle
from moe_groups.expected_layout import Expected
from moe_groups.flat_layout import FlatGroup, Rank, readable_options
from moe_groups.saved_experts import ParamKey, Place
from moe_groups.shard import Fragment, Shard, stated_fragments
from moe_groups.slim_shard import (
    extents,
    name_record,
    read_slim_shard,
    segments,
    state_bytes,
    step_of,
    wrapper_of,
)
from moe_groups.torch_file import Record, read_records


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
