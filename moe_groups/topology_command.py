"""The command ``moe-groups topology``: its options, and what it runs."""

import argparse
from collections.abc import Callable
from typing import Any

OPTIONS = {
    "world_size": "--world",
    "tp_size": "--tp",
    "pp_size": "--pp",
    "ep_size": "--ep",
}
"""Arguments of the library that messages name, and what they are called here."""

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
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_topology, names=OPTIONS)
    parser.add_argument("--world", type=count, required=True, metavar="N", help="all ranks")
    parser.add_argument("--tp", type=count, default=1, metavar="N", help="tensor-parallel size (1)")
    parser.add_argument("--pp", type=count, default=1, metavar="N", help="pipeline stages (1)")
    parser.add_argument("--ep", type=count, default=1, metavar="N", help="ep_size of layers (1)")
    parser.add_argument(
        "--expert-tp",
        action="store_true",
        help="layers with enable_expert_tensor_parallelism: experts are cut over --tp too",
    )
    parser.add_argument(
        "--data-before-expert",
        action="store_true",
        help="DeepSpeed's config has use_data_before_expert_parallelism",
    )
    parser.add_argument("--all", action="store_true", help="a row for every rank")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--plot", metavar="FILE", help="draw the groups: .png")


def _topology(args: argparse.Namespace) -> None:
    from moe_groups.rich_tables import check_tables
    from moe_groups.topology import Topology
    from moe_groups.topology_plot import check_picture, write_picture
    from moe_groups.topology_text import as_json, print_topology

    if not args.json:
        check_tables()
    topology = Topology(
        world_size=args.world,
        tp_size=args.tp,
        pp_size=args.pp,
        ep_size=args.ep,
        expert_tensor_parallelism=args.expert_tp,
        use_data_before_expert_parallel=args.data_before_expert,
    )
    if args.plot is not None:
        check_picture(args.plot, topology)
        write_picture(topology, args.plot)
    if args.json:
        print(as_json(topology))
    else:
        print_topology(topology, args.all)
