"""What ``moe-groups topology`` prints: tables for people, or JSON."""

import json
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, get_args

from moe_groups.rich_tables import MOST_ROWS, new_table, print_with, say_hidden
from moe_groups.topology import GroupKind, Topology

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MEANING: dict[GroupKind, str] = {
    "data": "share dense parameters",
    "tensor": "hold slices of one layer",
    "pipeline": "hold the stages of one pipeline",
    "expert": "exchange tokens",
    "expert_data": "share experts",
}
_MOST_NAMED = 8


def headline(topology: Topology) -> str:
    """The sizes, and what is said about experts."""
    return (
        f"{topology.world_size} ranks: DP {topology.data_parallel_size}, EP {topology.ep_size}, "
        f"TP {topology.tp_size}, PP {topology.pp_size}{_notes(topology)}"
    )


def _notes(topology: Topology) -> str:
    notes = ""
    if topology.tp_size > 1:
        how = "cut over" if topology.expert_tensor_parallelism else "not cut over"
        notes += f"; experts {how} tensor-parallel ranks"
    if topology.use_data_before_expert_parallel:
        notes += "; data before expert"
    return notes


def show_ranks(ranks: list[int]) -> str:
    """Ranks in a few words: ``0-7`` for neighbours, ``0,4,8,..,60`` for many at one distance.

    There are no blanks, so that a line is not broken inside.
    """
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    steps = {after - before for before, after in pairwise(ranks)}
    if len(ranks) > _MOST_NAMED and len(steps) == 1:
        return f"{','.join(map(str, ranks[:3]))},..,{ranks[-1]}"
    return ",".join(map(str, ranks))


def as_json(topology: Topology) -> str:
    """One JSON object: the sizes, and the groups of each kind as lists of ranks."""
    groups = {kind: topology.groups(kind) for kind in get_args(GroupKind)}
    return json.dumps(asdict(topology) | {"groups": groups})


def print_topology(topology: Topology, everything: bool = False) -> None:
    """Print both tables; ``everything``: a row for each rank, however many there are."""

    def draw(console: "Console") -> None:
        console.print(headline(topology), markup=False, highlight=False, soft_wrap=True)
        for table in (_kinds(topology), _ranks(topology, everything)):
            console.print()
            console.print(table, highlight=False)

    print_with(draw)


def _kinds(topology: Topology) -> "Table":
    """How many groups of each kind there are, and which."""
    table = new_table("Groups", ("kind", "its ranks", ">groups", ">of ranks", "which"))
    for kind in get_args(GroupKind):
        groups = topology.groups(kind)
        which = " | ".join(show_ranks(ranks) for ranks in groups[:_MOST_NAMED])
        if len(groups) > _MOST_NAMED:
            which += " | ..."
        if len(groups[0]) == 1:
            which = "each rank alone"
        table.add_row(
            kind.replace("_", "-"), MEANING[kind], str(len(groups)), str(len(groups[0])), which
        )
    return table


def _ranks(topology: Topology, everything: bool) -> "Table":
    """What each rank shares with which others."""
    columns = (">rank", ">stage", ">data", ">tensor", "dense parameters with", "tokens with")
    table = new_table("Ranks", (*columns, ">experts", "experts with"))
    shown = topology.world_size if everything else min(topology.world_size, MOST_ROWS)
    of = {kind: _by_rank(topology, kind) for kind in get_args(GroupKind)}
    for rank in range(shown):
        experts = of["expert"][rank]
        places = (rank, topology.stage(rank), topology.data_rank(rank), topology.tensor_rank(rank))
        table.add_row(
            *map(str, places),
            show_ranks(of["data"][rank]),
            show_ranks(experts),
            f"{experts.index(rank) + 1} of {topology.ep_size}",
            show_ranks(of["expert_data"][rank]),
        )
    say_hidden(table, topology.world_size - shown)
    return table


def _by_rank(topology: Topology, kind: GroupKind) -> dict[int, list[int]]:
    return {rank: ranks for ranks in topology.groups(kind) for rank in ranks}
