"""A load that is refused: what differs from the engine's groups, and what can be done."""

import shlex
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import distributed

from moe_groups._common.ranks import on_first_rank
from moe_groups._deepspeed.checkpoints import checkpoint_rank, weights_alone
from moe_groups._deepspeed.engines import Engine
from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.convert.target import fresh_problem
from moe_groups.checkpoints.files import find_checkpoint
from moe_groups.checkpoints.guard.engine_layout import describe_run, gather_layout
from moe_groups.checkpoints.layout import FlatGroup, Layout, Rank, of_any_expert
from moe_groups.checkpoints.layout_diff import (
    Verdict,
    compare_groups,
    keys_of_params,
    moved_parameters,
    other_expert_parallel_size,
    unnumbered_problem,
)
from moe_groups.checkpoints.manifest import FILE_NAME, Manifest, write_manifest
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.checkpoints.shard import WRAPPERS
from moe_groups.errors import CheckpointError, CheckpointMismatchError
from moe_groups.topology import ep_size_of

_SHOWN = 8

Kind = Literal["regrouped", "trained", "experts", "model"]
"""As a verdict; "experts" are those of another expert-parallel size."""
Known: TypeAlias = Mapping[int, Collection[str]]
"""Names of all parameters of each model-parallel rank's model, frozen ones too."""


def refuse(engine: Engine, load_dir: Path, tag: str, convert: bool) -> None:
    """Raise what differs, the same on all ranks; the first one reads all files for it.

    Args:
        convert: return where converting repairs it.

    Raises:
        CheckpointMismatchError: the checkpoint was saved with other groups, parameters or ranks.
        CheckpointError: what the groups were cannot be read.
    """
    layout = gather_layout(engine)
    rank = Rank(*checkpoint_rank(engine))
    names = set(engine.param_names.values()) if rank.data == 0 else None
    everyone: list[Any] | None = [None] * distributed.get_world_size()
    first = distributed.get_rank() == 0
    distributed.gather_object((rank.model, names), everyone if first else None)

    def find() -> CheckpointMismatchError | None:
        assert layout is not None  # on the first rank
        assert everyone is not None
        known = {model: names for model, names in everyone if names is not None}
        return _refusal(describe_run(engine, layout), known, load_dir, tag, convert)

    refusal = on_first_rank(find, "Nothing was loaded.")
    if refusal is not None:
        raise refusal


def _refusal(
    run: Manifest, known: Known, load_dir: Path, tag: str, convert: bool
) -> CheckpointMismatchError | None:
    files = find_checkpoint(load_dir, tag, trust=True)
    saved = read_layout(files)
    lines, kind = differences(saved, run.layout, known)
    convertible = kind != "model"
    convertible &= bool(files.shards) and run.wrapper in WRAPPERS
    why = "Converting does not help"
    if kind != "regrouped" and convertible:
        problem = unnumbered_problem(saved, run.layout) if kind == "experts" else None
        try:
            problem = problem or fresh_problem(RegroupSource(files, saved), run.layout)
        except CheckpointError as error:  # a weight is not there
            kind, problem = "model", str(error).rstrip(".")
        if problem:
            convertible, why = False, problem
    if convertible and convert:
        return None
    convertible &= not (saved.problem() or run.layout.problem())
    where = f"{load_dir} ({tag})"
    target = None
    if convertible:
        target = _write_target(run, load_dir)
        source, made = shlex.quote(str(load_dir)), shlex.quote(f"{load_dir}-regrouped")
        way_out = (
            "Nothing was loaded. Convert it, and load the result:\n"
            f"  moe-groups regroup-checkpoint {source} {made} --tag {shlex.quote(tag)} "
            f"--to {shlex.quote(target)}\n"
            'or convert while loading: moe_groups.protect_checkpoints(engine, regroup="auto").'
        )
    elif run.wrapper == "ZeRO-3" and kind != "model":
        way_out = (
            "Nothing was loaded. Checkpoints of ZeRO-3 cannot be converted: make the groups that "
            f"it was saved with ({FILE_NAME} has them). Without AutoEP "
            f"{weights_alone(run.wrapper)} loads the weights alone, into fresh optimizer state; "
            "with AutoEP gather_model gathers them in a run with those groups, for load_autoep."
        )
    elif kind == "model":
        way_out = f"Nothing was loaded. {why}: the model or its parallel sizes differ."
    else:
        way_out = (
            f"Nothing was loaded. {why}; load_module_only=True loads the weights alone, into fresh "
            "optimizer state."
        )
    shown = [*lines[: _SHOWN + 1]]
    if len(lines) > len(shown):
        shown.append(f"... and {len(lines) - len(shown)} more (see .lines)")
    message = f"{where} was saved with other groups.\n  " + "\n  ".join(shown) + f"\n{way_out}"
    return CheckpointMismatchError(message, lines, target)


def differences(saved: Layout, running: Layout, known: Known) -> tuple[list[str], Kind]:
    """What differs, a headline first, and of what kind it is."""
    if saved.model_ranks != running.model_ranks:
        return [
            f"it was saved by {len(saved.model_ranks)} model-parallel ranks, the run has "
            f"{len(running.model_ranks)}"
        ], "model"
    if line := other_expert_parallel_size(saved, running):
        lost = [*_not_in_the_model(saved, running, known)]
        return [line, *lost], "model" if lost else "experts"
    worlds = saved.data_parallel_size, running.data_parallel_size
    lines = []
    if worlds[0] != worlds[1]:
        lines.append(f"it was saved by {worlds[0]} data-parallel ranks, the run has {worlds[1]}")
    told: dict[str, None] = {}
    verdicts: set[Verdict] = set()
    most = 0, 0
    for old, new in _pairs(saved, running):
        difference = compare_groups(old, new)
        verdicts.add(difference.verdict)
        if difference.verdict not in ("same", "renamed"):
            told.update(dict.fromkeys(difference.lines))
        if difference.verdict == "regrouped":
            most = max(most, moved_parameters(old, new))
    trained = {(model, name) for model, *_, name in keys_of_params(saved)}
    if any(name not in known.get(model, ()) for model, name in trained):
        verdicts.add("model")
    if most[0] and not verdicts & {"model", "trained"}:
        lines.append(
            f"{most[0]} of {most[1]} parameters of a rank are in another place, and would get the "
            "state of other parameters"
        )
    lines += told or dict.fromkeys(_other_ranks(saved, running))
    if "model" in verdicts:
        return lines, "model"
    return lines, "trained" if "trained" in verdicts else "regrouped"


def _not_in_the_model(saved: Layout, running: Layout, known: Known) -> Iterator[str]:
    """What the checkpoint trained and the model has not, where its experts are on other ranks."""
    experts = {model: Counter(map(of_any_expert, names)) for model, names in known.items()}
    sizes = {
        (group.model_rank, of_any_expert(param.name)): ep_size_of(group.parallel_group)
        for group in running.groups
        for param in group.params
    }
    for group in saved.groups:
        for param in group.params:
            name = of_any_expert(param.name)
            local = experts.get(group.model_rank, Counter())[name]
            there = local * sizes.get((group.model_rank, name), ep_size_of(group.parallel_group))
            if not local or (param.global_name and (param.expert or 0) >= there):
                yield f"the model has no {param.global_name or param.name}, the checkpoint has"


def _other_ranks(saved: Layout, running: Layout) -> Iterator[str]:
    """Experts that other ranks share than before: ``use_data_before_expert_parallelism``."""
    before = {(g.model_rank, g.parallel_group, g.ep_rank): g.ranks for g in saved.groups}
    for group in running.groups:
        ranks = before.get((group.model_rank, group.parallel_group, group.ep_rank))
        if ranks != group.ranks and saved.data_parallel_size == running.data_parallel_size:
            yield (
                f"the experts of expert-parallel rank {group.ep_rank} of {group.parallel_group} "
                f"were on data-parallel ranks {_some(ranks)}, and are on {_some(group.ranks)}"
            )


def _some(ranks: tuple[int, ...] | None) -> str:
    shown = list(map(str, (ranks or ())[:_SHOWN]))
    return ", ".join(shown + ["..."] * (len(ranks or ()) > _SHOWN))


def _parallel_groups(layout: Layout) -> set[str]:
    return {group.parallel_group for group in layout.groups if group.parallel_group}


def _pairs(saved: Layout, running: Layout) -> Iterator[tuple[list[FlatGroup], list[FlatGroup]]]:
    """Each rank with a saved one of the same experts, if there is one; equal pairs once."""
    common = _parallel_groups(saved) & _parallel_groups(running)
    had: dict[tuple[int, frozenset[Any]], Rank] = {}
    for rank in sorted(saved.order):
        had.setdefault(_experts_of(saved, rank, common), rank)
    seen = set()
    for rank in sorted(running.order):
        old = had.get(_experts_of(running, rank, common))
        pair = old and saved.order[old], running.order[rank]
        if old is not None and pair not in seen:
            seen.add(pair)
            yield saved.of(old), running.of(rank)


def _experts_of(layout: Layout, rank: Rank, common: set[str]) -> tuple[int, frozenset[Any]]:
    groups = (group for group in layout.of(rank) if group.parallel_group in common)
    return rank.model, frozenset((group.parallel_group, group.ep_rank) for group in groups)


def _write_target(run: Manifest, load_dir: Path) -> str:
    """The run's groups in a file beside the checkpoint, or where that cannot be in a temporary one.

    Its name comes from the groups, so that the same refusal again makes no second file.
    """
    name = f"moe_groups_{run.layout.fingerprint()[:8]}.json"
    try:
        write_manifest(run, load_dir / name)
        return str(load_dir / name)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="moe-groups-")) / name
        write_manifest(run, path)
        return str(path)
