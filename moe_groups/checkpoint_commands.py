"""The commands for checkpoints: their options, and what they print."""

import argparse
from collections.abc import Callable
from typing import Any

from moe_groups.checkpoint_progress import show_progress, show_seconds
from moe_groups.quiet import quiet
from moe_groups.units import show_bytes

INSPECT_OPTIONS = {"tag": "--tag", "data": "--quick", "workers": "--workers"}
REGROUP_OPTIONS = {
    "to": "--to",
    "max_group_size": "--max-group-size",
    "tag": "--tag",
    "workers": "--workers",
}
"""Arguments of the library that messages name, and what they are called here."""

_INSPECT = """\
Show what is in a DeepSpeed checkpoint (ZeRO-1, ZeRO-2, BF16_Optimizer): its groups, the norms
of each expert's weights and optimizer state, its counters; and check that it is sound: files
that are missing, cut off or of another save, bits that changed, NaN. DIR is the directory that
load_checkpoint is given, or the folder of a tag. Files are unpickled, as when DeepSpeed loads
them: only for checkpoints that you trust. Exit status: 0 sound, 1 damaged, 2 no checkpoint."""

_REGROUP = """\
Write checkpoint SRC to DST with other groups, so that a run that groups its parameters
otherwise can go on from it. No model and no process group is needed, and SRC is not changed.
Files are unpickled, as when DeepSpeed loads them: only for checkpoints that you trust."""

_PLAN = """\
stock (DeepSpeed's own split), parallel_group, module or expert; or the groups of a run: a
moe_groups*.json, or a checkpoint that has one"""


def add_commands(commands: Any, count: Callable[[str], int]) -> None:
    """Add both commands to the parser of ``moe-groups``.

    Args:
        commands: what ``add_subparsers`` returned.
        count: reads a number of at least 1.
    """
    _add_inspect(commands)
    _add_regroup(commands, count)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect-checkpoint",
        help="groups, norms per expert and damage of a checkpoint",
        description=_INSPECT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_inspect, names=INSPECT_OPTIONS)
    parser.add_argument("directory", metavar="DIR", help="the checkpoint")
    parser.add_argument("--tag", help="of the checkpoint (what the file latest says)")
    parser.add_argument("--quick", action="store_true", help="do not read the tensors")
    parser.add_argument("--all", action="store_true", help="a row for every group and expert")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def _add_regroup(commands: Any, count: Callable[[str], int]) -> None:
    parser = commands.add_parser(
        "regroup-checkpoint",
        help="convert a checkpoint to other groups",
        description=_REGROUP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_regroup, names=REGROUP_OPTIONS)
    parser.add_argument("source", metavar="SRC", help="the checkpoint")
    parser.add_argument("destination", metavar="DST", help="a directory for the converted one")
    parser.add_argument("--to", required=True, metavar="PLAN", help=_PLAN)
    parser.add_argument(
        "--max-group-size", type=count, metavar="N", help="most elements of a group (no limit)"
    )
    parser.add_argument("--tag", help="of the checkpoint (what the file latest says)")
    parser.add_argument("--workers", type=count, metavar="N", help="threads that read and write")


def _inspect(args: argparse.Namespace) -> int:
    from moe_groups.checkpoint_tables import print_report
    from moe_groups.inspect_checkpoint import inspect_checkpoint

    if not args.json:
        from moe_groups.rich_tables import check_tables

        check_tables()
    with quiet(), show_progress("reading") as progress:
        report = inspect_checkpoint(
            args.directory, args.tag, data=not args.quick, progress=progress
        )
    if args.json:
        print(report.as_json())
    else:
        print_report(report, args.all)
    return 1 if report.problems else 0


def _regroup(args: argparse.Namespace) -> int:
    from moe_groups.regroup import regroup_checkpoint

    with quiet(), show_progress("writing") as progress:
        done = regroup_checkpoint(
            args.source,
            args.destination,
            to=args.to,
            max_group_size=args.max_group_size,
            tag=args.tag,
            workers=args.workers,
            progress=progress,
        )
    print(
        f"wrote {done.destination}: {done.files:,} files, {show_bytes(done.bytes)} in "
        f"{show_seconds(done.seconds)}"
    )
    return 0
