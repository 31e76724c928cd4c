"""The commands for checkpoints and their options."""

import argparse
from collections.abc import Callable
from typing import Any

from moe_groups._common.text import show_bytes
from moe_groups.cli.checkpoint_report import print_report
from moe_groups.cli.progress import quiet, show_progress

_INSPECT = """\
Show what is in a DeepSpeed checkpoint (ZeRO-1, ZeRO-2, BF16_Optimizer): its groups, the norms
of each expert's weights and optimizer state, its counters; and check that it is sound: files
that are missing, cut off or of another save, bits that changed, NaN. DIR is the directory that
load_checkpoint is given, or the folder of a tag. Exit status: 0 sound, 1 damaged, 2 no
checkpoint."""

_REGROUP = """\
Write checkpoint SRC to DST with other groups, so that a run that groups its parameters
otherwise can go on from it. No model and no process group is needed, and SRC is not changed."""

_EXPORT = """\
Write the weights in a checkpoint as safetensors that transformers loads, with no model; or
(--dtype fp32) the master weights of ZeRO-1, ZeRO-2 or BF16_Optimizer."""

_TRUST = "read objects of any class, as DeepSpeed does: can run any code of their author"
_PLAN = """\
stock (DeepSpeed's own split), parallel_group, module or expert; or the groups of a run: a
moe_groups*.json, or a checkpoint that has one"""


def add_commands(commands: Any, count: Callable[[str], int]) -> None:
    """Add these commands to the parser of ``moe-groups``.

    Args:
        commands: what ``add_subparsers`` returned.
        count: reads a number of at least 1.
    """
    _add_inspect(commands)
    _add_regroup(commands, count)
    _add_export(commands)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect-checkpoint",
        help="groups, norms per expert and damage of a checkpoint",
        description=_INSPECT,
    )
    parser.set_defaults(run=_inspect)
    parser.add_argument("directory", metavar="DIR", help="the checkpoint")
    parser.add_argument("--tag", help="of the checkpoint (what the file latest says)")
    parser.add_argument("--trust", action="store_true", help=_TRUST)
    parser.add_argument(
        "--quick", dest="data", action="store_false", help="do not read the tensors"
    )
    parser.add_argument("--all", action="store_true", help="a row for every group and expert")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")


def _add_regroup(commands: Any, count: Callable[[str], int]) -> None:
    parser = commands.add_parser(
        "regroup-checkpoint",
        help="convert a checkpoint to other groups",
        description=_REGROUP,
    )
    parser.set_defaults(run=_regroup)
    parser.add_argument("source", metavar="SRC", help="the checkpoint")
    parser.add_argument("destination", metavar="DST", help="a directory for the converted one")
    parser.add_argument("--to", metavar="PLAN", help=_PLAN)
    parser.add_argument(
        "--max-group-size", type=count, metavar="N", help="most elements of a group (no limit)"
    )
    parser.add_argument(
        "--ep-size",
        type=count,
        metavar="N",
        help="ep_size of the MoE layers (the checkpoint's); without --to the groups stay",
    )
    parser.add_argument("--tag", help="of the checkpoint (what the file latest says)")
    parser.add_argument("--trust", action="store_true", help=_TRUST)
    parser.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="threads that read and write (4); each makes one file of optimizer states in memory",
    )


def _add_export(commands: Any) -> None:
    about = "the weights of a checkpoint as Hugging Face safetensors"
    parser = commands.add_parser("export-checkpoint", help=about, description=_EXPORT)
    parser.set_defaults(run=_export)
    parser.add_argument("directory", metavar="DIR", help="the checkpoint")
    parser.add_argument("destination", metavar="OUT", help="a directory for the safetensors")
    parser.add_argument("--family", required=True, help="mixtral, qwen3_moe, ..., or a checkpoint")
    parser.add_argument("--dtype", choices=("fp32",), help="the master weights (the model's)")
    parser.add_argument("--tag", help="of the checkpoint (what the file latest says)")
    parser.add_argument("--trust", action="store_true", help=_TRUST)


def _inspect(args: argparse.Namespace) -> int:
    from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint

    if not args.json:
        from moe_groups.cli.render import check_tables

        check_tables()
    with quiet(), show_progress("reading") as progress:
        report = inspect_checkpoint(
            args.directory, args.tag, data=args.data, trust=args.trust, progress=progress
        )
    if args.json:
        print(report.as_json())
    else:
        print_report(report, args.all)
    return 1 if report.problems else 0


def _export(args: argparse.Namespace) -> None:
    from moe_groups.checkpoints.convert.export import export_checkpoint

    with quiet():
        files = export_checkpoint(
            args.directory,
            args.destination,
            family=args.family,
            dtype=args.dtype,
            tag=args.tag,
            trust=args.trust,
        )
    print(f"wrote {args.destination}: {len(files):,} files and their index")


def _regroup(args: argparse.Namespace) -> int:
    from moe_groups.checkpoints.convert.convert import regroup_checkpoint

    with quiet(), show_progress("writing") as progress:
        done = regroup_checkpoint(
            args.source,
            args.destination,
            to=args.to,
            max_group_size=args.max_group_size,
            ep_size=args.ep_size,
            tag=args.tag,
            workers=args.workers,
            trust=args.trust,
            progress=progress,
        )
    print(
        f"wrote {done.destination}: {done.files:,} files, {show_bytes(done.bytes)} in "
        f"{done.seconds:,.1f} s"
    )
    if since := str(done.since):
        print(since)
    return 0
