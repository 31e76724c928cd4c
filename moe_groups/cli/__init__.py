"""The command line ``moe-groups``, and its command ``plan``, which predicts a step's memory."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from moe_groups._common.arguments import LEVELS, TILE, OptimizerKind
from moe_groups._version import __version__
from moe_groups.cli.checkpoints import add_commands
from moe_groups.cli.progress import quiet
from moe_groups.cli.topology import add_sizes, add_topology
from moe_groups.errors import InvalidArgumentError, MoEGroupsError

if TYPE_CHECKING:
    from moe_groups.cli.plan import PlanRequest

_DESCRIPTION = """\
Predict the memory of the optimizer step and plan the param groups, with no GPU, no process
group and no weights. SOURCE is a Hugging Face config.json or a directory with one, a model
type of the installed transformers (mixtral, qwen3_moe, deepseek_v3, olmoe, gpt_oss, ...), or
module:function, called to build one rank's model on the meta device."""


class _Parser(argparse.ArgumentParser):
    """Prints one line for bad input; only ``--help`` prints the usage."""

    def __init__(self, **options: Any) -> None:
        """Descriptions are shown as they are written, also those of the commands."""
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``moe-groups`` with these arguments, or those of the process.

    Returns:
        The exit status: 0; 1 if ``inspect-checkpoint`` found damage; 2 for input that cannot be
        used, with one line on stderr.
        Options that cannot be parsed raise ``SystemExit(2)``, as argparse does.
    """
    parser, commands = _parsers()
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        sys.stderr.close()
        return 0
    except MoEGroupsError as error:
        message = _in_options(str(error), commands[args.command])
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "numpy"):
            raise
        message = f"{error.name} is not installed: pip install {error.name}."
    except OSError as error:
        message = f"{error.filename or 'input or output'}: {error.strerror or error}."
    print(f"moe-groups {args.command}: error: {message}", file=sys.stderr)
    return 2


def _in_options(message: str, command: argparse.ArgumentParser) -> str:
    """The message in one line, with options in place of the library's arguments.

    Where an option is not called as the argument is, its ``dest`` is.
    """
    known = {action.dest: action.option_strings for action in command._actions}
    options = {name: strings[0] for name, strings in known.items() if strings}
    names = "|".join(options)
    message = re.sub(rf"\b({names})=True\b", lambda found: options[found[1]], message)
    message = re.sub(rf"\b({names})=", lambda found: f"{options[found[1]]} ", message)
    return " ".join(message.split())


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """That of ``moe-groups``, and those of its commands by their names."""
    parser = _Parser(prog="moe-groups", description="Param groups for MoE models on DeepSpeed.")
    parser.add_argument("--version", action="version", version=f"moe-groups {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = commands.add_parser(
        "plan",
        help="memory of the optimizer step and the groups that lower it",
        description=_DESCRIPTION,
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("source", metavar="SOURCE", help="config.json, model type, module:function")
    _add_topology(plan)
    _add_step(plan)
    _add_groups(plan)
    output = plan.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON in place of tables")
    output.add_argument("--plot", metavar="FILE", help="draw the curve: .png or .html")
    add_topology(commands, _count)
    add_commands(commands, _count)
    return parser, commands.choices


def _add_topology(plan: argparse.ArgumentParser) -> None:
    group = plan.add_argument_group("topology", "data-parallel size = world size / (tp * pp)")
    add_sizes(group, _count)
    plan.set_defaults(ep_size=None)  # 1, where the source does not say it
    group.add_argument(
        "--pp-rank", type=int, metavar="N", help="stage to plan (the one with most parameters)"
    )
    group.add_argument(
        "--experts", choices=("list", "fused"), help="a module per expert, or one tensor (list)"
    )


def _add_step(plan: argparse.ArgumentParser) -> None:
    group = plan.add_argument_group("step")
    group.add_argument("--zero-stage", type=int, default=2, metavar="N", help="1 or 2 (2)")
    group.add_argument("--bf16-optimizer", action="store_true", help="BF16_Optimizer, not ZeRO")
    group.add_argument(
        "--optimizer",
        choices=get_args(OptimizerKind),
        default="foreach",
        help="AdamW's kind (foreach)",
    )
    group.add_argument("--grad-accum-dtype", choices=("bf16", "fp32"), default="bf16")
    group.add_argument(
        "--compact-gradients", action="store_true", help="compact_gradients(engine) is called"
    )
    group.add_argument(
        "--lean-step", dest="lean", action="store_true", help="lean_step(engine, tile) is called"
    )
    group.add_argument("--tile", dest="lean_step", metavar="SIZE", help=f"of lean_step ({TILE})")


def _add_groups(plan: argparse.ArgumentParser) -> None:
    group = plan.add_argument_group("groups")
    group.add_argument(
        "--split-by", choices=LEVELS, default="parallel_group", help="(parallel_group)"
    )
    limit = group.add_mutually_exclusive_group()
    limit.add_argument(
        "--budget",
        dest="step_memory_budget",
        default="auto",
        metavar="SIZE",
        help="most that the step may need, as 2GiB: the fewest groups that fit (auto: the "
        "lowest peak that is worth its groups)",
    )
    limit.add_argument("--max-groups", type=_count, metavar="N", help="the lowest peak with those")
    limit.add_argument(
        "--cap",
        dest="max_group_size",
        type=_count,
        metavar="N",
        help="elements of a group; no planning",
    )


def _count(text: str) -> int:
    value = int(text.replace("_", ""))
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


_count.__name__ = "number"  # argparse prints it if int() fails


def _plan(args: argparse.Namespace) -> None:
    from moe_groups.cli.plan import make_report
    from moe_groups.cli.plan_plot import check_plot, write_plot
    from moe_groups.cli.plan_report import as_json, print_tables
    from moe_groups.cli.render import check_tables

    if not args.json:
        check_tables()
    if args.plot is not None:
        check_plot(args.plot, ".png", ".html")
    with quiet():
        report = make_report(_request(args))
    if args.plot is not None:
        write_plot(report, args.plot)
    if args.json:
        print(as_json(report))
    else:
        print_tables(report)


def _request(args: argparse.Namespace) -> "PlanRequest":
    from moe_groups.cli.plan import PlanRequest
    from moe_groups.memory.step_config import StepConfig

    step = StepConfig(
        zero_stage=args.zero_stage,
        bf16_optimizer=args.bf16_optimizer,
        optimizer=args.optimizer,
        grad_accum_dtype=args.grad_accum_dtype,
        compact_gradients=args.compact_gradients,
        lean_step=(args.lean_step or TILE) if args.lean else None,
        tp_size=args.tp_size,
    )
    if args.lean_step is not None and not args.lean:
        raise InvalidArgumentError("--tile is of lean_step: give --lean-step too, or neither.")
    if args.world_size % (args.tp_size * args.pp_size):
        raise InvalidArgumentError(
            f"--world-size {args.world_size} is no multiple of --tp {args.tp_size} times --pp "
            f"{args.pp_size}."
        )
    names = (field.name for field in fields(PlanRequest) if field.name != "step")
    return PlanRequest(step=step, **{name: getattr(args, name) for name in names})
