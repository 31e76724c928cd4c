"""The command ``moe-groups topology``: its options, tables and JSON."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

from moe_groups.cli.render import MOST_ROWS, new_table, print_with, say_hidden
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
    """The sizes, and the options of the experts."""
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
    """A short form of ranks: ``0-7`` for neighbours, ``0,4,8,..,60`` for many at one distance.

    It has no blanks, so that no line break falls inside.
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
    """Print both tables; ``everything``: print a row for each rank, even if there are many."""

    def draw(console: "Console") -> None:
        console.print(headline(topology), markup=False, highlight=False, soft_wrap=True)
        for table in (_kinds(topology), _ranks(topology, everything)):
            console.print()
            console.print(table, highlight=False)

    print_with(draw)


def _kinds(topology: Topology) -> "Table":
    """The number of groups of each kind, and their ranks."""
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
    """For each rank, the ranks that share its parameters, tokens and experts."""
    columns = (">rank", ">stage", ">data", ">tensor", "dense parameters with", "tokens with")
    table = new_table("Ranks", (*columns, ">experts", "experts with"))
    shown = topology.world_size if everything else min(topology.world_size, MOST_ROWS)
    of = {
        kind: {rank: ranks for ranks in topology.groups(kind) for rank in ranks}
        for kind in get_args(GroupKind)
    }
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


_DESCRIPTION = """\
Show which ranks share dense parameters, which share experts and which exchange tokens: the
process groups that DeepSpeed will make for its MoE layers, with no GPU and no process group."""


def add_topology(commands: Any, count: Callable[[str], int]) -> None:
    """Add the command to the parser of ``moe-groups``.

    Args:
        commands: what ``add_subparsers`` returned.
        count: reads a number of at least 1.
    """
    parser = commands.add_parser(
        "topology",
        help="which ranks share parameters and exchange tokens",
        description=_DESCRIPTION,
    )
    parser.set_defaults(run=_topology)
    add_sizes(parser, count)
    parser.add_argument(
        "--expert-tp",
        dest="expert_tensor_parallelism",
        action="store_true",
        help="layers with enable_expert_tensor_parallelism: experts are cut over --tp too",
    )
    parser.add_argument(
        "--data-before-expert",
        dest="use_data_before_expert_parallel",
        action="store_true",
        help="DeepSpeed's config has use_data_before_expert_parallelism",
    )
    parser.add_argument("--all", action="store_true", help="a row for every rank")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--plot", metavar="FILE", help="draw the groups: .png")


def add_sizes(parser: Any, count: Callable[[str], int]) -> None:
    """Add the sizes of the world to a parser, or to a group of its options."""
    parser.add_argument("--world-size", type=count, required=True, metavar="N", help="all ranks")
    for option, name, what in (
        ("--tp", "tp_size", "tensor-parallel size (1)"),
        ("--pp", "pp_size", "pipeline stages (1)"),
        ("--ep", "ep_size", "expert-parallel size (1)"),
    ):
        parser.add_argument(option, dest=name, type=count, default=1, metavar="N", help=what)


def _topology(args: argparse.Namespace) -> None:
    from moe_groups.cli.render import check_tables
    from moe_groups.cli.topology_plot import check_picture, write_picture

    if not args.json:
        check_tables()
    topology = Topology(**{field.name: getattr(args, field.name) for field in fields(Topology)})
    if args.plot is not None:
        check_picture(args.plot, topology)
        write_picture(topology, args.plot)
    if args.json:
        print(as_json(topology))
    else:
        print_topology(topology, args.all)
