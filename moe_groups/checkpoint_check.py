"""Before a checkpoint is loaded: were its groups those that the engine has?"""

import contextlib
import shlex
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import distributed

from moe_groups import _deepspeed
from moe_groups.checkpoint_files import CheckpointFiles, find_checkpoint
from moe_groups.checkpoint_source import read_layout
from moe_groups.engine_layout import describe_run, gather_layout, own_groups
from moe_groups.errors import CheckpointError, CheckpointMismatchError, CheckpointWarning
from moe_groups.flat_layout import FlatGroup, Layout, Rank
from moe_groups.layout_diff import compare_groups, moved_parameters
from moe_groups.manifest import FILE_NAME, Manifest, read_manifest, write_manifest
from moe_groups.shard import COUNTS, MASTER, Shard, read_shard, stated_fragments

if TYPE_CHECKING:
    from moe_groups.checkpoint_guard import Guard

_WRAPPERS = ("ZeRO-1", "ZeRO-2", "BF16_Optimizer")
_SHOWN = 8

Kind = Literal["same", "absent", "unknown", "other", "world", "unreadable"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rank sees.

    Attributes:
        kind: "same" (names may differ); "absent" (there is no such checkpoint, as DeepSpeed will
            say); "unknown" (nothing says what the groups were); "other" groups; another "world";
            "unreadable".
        text: what is wrong.
    """

    kind: Kind
    text: str = ""


@contextlib.contextmanager
def checked(engine: Any, guard: "Guard", load_dir: Path, tag: str) -> Iterator[Path]:
    """The directory to load from; all ranks enter together, and all raise if one has to.

    Raises:
        CheckpointMismatchError: the checkpoint was saved with other groups, parameters or ranks.
        CheckpointError: it is damaged.
    """
    rank, running = own_groups(engine)
    wrapper = _deepspeed.wrapper_name(engine)
    mine = _examine(load_dir, tag, rank, running, wrapper)
    findings: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(findings, mine)
    kinds = {finding.kind for finding in findings}
    if "unreadable" in kinds:
        first = next(finding for finding in findings if finding.kind == "unreadable")
        raise CheckpointError(f"{first.text} Nothing was loaded.")
    if kinds & {"other", "world"}:
        if guard.regroup == "auto":
            from moe_groups.regroup_engine import regrouped

            with regrouped(engine, load_dir, tag, guard.scratch_dir) as directory:
                yield directory
            return
        _refuse(engine, load_dir, tag, running)
    if "unknown" in kinds:
        warnings.warn(
            f"{load_dir / tag} has no {FILE_NAME}, and {wrapper} does not write which parameters "
            "its groups hold: it is loaded by position, right only if the groups are the same.",
            CheckpointWarning,
            stacklevel=4,
        )
    yield load_dir


def _examine(
    load_dir: Path, tag: str, rank: Rank, running: list[FlatGroup], wrapper: str
) -> Finding:
    """This rank's view; never raises, as the others wait for it."""
    if not (load_dir / tag).is_dir():
        return Finding("absent")
    try:
        files = find_checkpoint(load_dir, tag)
        if files.manifest.is_file():
            found = _by_manifest(read_manifest(files.manifest), rank, running)
            if found.kind != "same":
                return found
        elif wrapper not in _WRAPPERS:
            return Finding("unknown")
        return _by_shard(files, rank, running) if wrapper in _WRAPPERS else Finding("same")
    except CheckpointError as error:
        return Finding("unreadable", str(error))
    except Exception as error:
        return Finding("unreadable", f"{load_dir / tag}: {type(error).__name__}: {error}.")


def _by_manifest(manifest: Manifest, rank: Rank, running: list[FlatGroup]) -> Finding:
    if rank not in manifest.layout.order:
        return Finding("world")
    saved = manifest.layout.of(rank)
    if compare_groups(saved, running).verdict not in ("same", "renamed"):
        return Finding("other")
    shared = all(a.ranks == b.ranks for a, b in zip(saved, running, strict=True))
    return Finding("same" if shared else "world")


def _by_shard(files: CheckpointFiles, rank: Rank, running: list[FlatGroup]) -> Finding:
    """Compare with what DeepSpeed's own file of this rank holds."""
    if rank not in files.shards:
        if not files.shards or files.manifest.is_file():
            return Finding(
                "unreadable",
                f"{files.folder} has no optimizer state of data-parallel rank {rank.data} "
                f"(model-parallel rank {rank.model}).",
            )
        return Finding("world")
    shard = read_shard(files.shards[rank], elastic=True)
    if holds(shard, rank, running):
        return Finding("same")
    if files.manifest.is_file():
        return Finding(
            "unreadable",
            f"{files.manifest} says that the groups are those of this run, but {shard.path.name} "
            "holds others: the files are not of one checkpoint.",
        )
    return Finding("other")


def holds(shard: Shard, rank: Rank, groups: list[FlatGroup]) -> bool:
    """Is in the shard what these groups put into the rank's partitions?"""
    if len(shard.optimizer[MASTER]) != len(groups):
        return False
    return all(
        shard.partition(index) == group.partition
        and int(shard.optimizer[COUNTS][index]) == len(group.ranks)
        and shard.fragments(index) == stated_fragments(group, rank.data, shard.reorders)
        for index, group in enumerate(groups)
    )


def _refuse(engine: Any, load_dir: Path, tag: str, running: list[FlatGroup]) -> None:
    """Say what differs, the same on all ranks; the first one reads all files for it."""
    layout = gather_layout(engine)
    box: list[Any] = [None]
    if layout is not None:
        try:
            box = [_refusal(describe_run(engine, layout), load_dir, tag)]
        except CheckpointError as error:
            box = [error]
        except Exception as error:
            box = [CheckpointError(f"{load_dir / tag}: {type(error).__name__}: {error}.")]
    distributed.broadcast_object_list(box)
    raise box[0]


def _refusal(run: Manifest, load_dir: Path, tag: str) -> CheckpointMismatchError:
    files = find_checkpoint(load_dir, tag)
    lines, convertible = _differences(read_layout(files), run.layout)
    where = f"{load_dir} ({tag})"
    target = None
    if convertible and files.shards:
        target = _write_target(run, load_dir)
        source, made = shlex.quote(str(load_dir)), shlex.quote(f"{load_dir}-regrouped")
        way_out = (
            "Nothing was loaded. Convert it, and load the result:\n"
            f"  moe-groups regroup-checkpoint {source} {made} --tag {shlex.quote(tag)} "
            f"--to {shlex.quote(target)}\n"
            'or convert while loading: moe_groups.protect_checkpoints(engine, regroup="auto").'
        )
    else:
        way_out = (
            "Nothing was loaded. Converting does not help; load_module_only=True loads the weights "
            "alone."
        )
    shown = [*lines[: _SHOWN + 1]]
    if len(lines) > len(shown):
        shown.append(f"... and {len(lines) - len(shown)} more (see .lines)")
    message = f"{where} was saved with other groups.\n  " + "\n  ".join(shown) + f"\n{way_out}"
    return CheckpointMismatchError(message, lines, target)


def _differences(saved: Layout, running: Layout) -> tuple[list[str], bool]:
    """What differs, a headline first, and whether converting can repair it."""
    if saved.model_ranks != running.model_ranks:
        return [
            f"it was saved by {len(saved.model_ranks)} model-parallel ranks, the run has "
            f"{len(running.model_ranks)}"
        ], False
    if sizes := _expert_parallel_sizes(saved) ^ _expert_parallel_sizes(running):
        return [
            f"one of them has experts with {', '.join(sorted(sizes))}, the other has not"
        ], False
    worlds = saved.data_parallel_size, running.data_parallel_size
    lines = []
    if worlds[0] != worlds[1]:
        lines.append(f"it was saved by {worlds[0]} data-parallel ranks, the run has {worlds[1]}")
    told: dict[str, None] = {}
    model = False
    most = 0, 0
    for rank in sorted(running.order):
        old = _counterpart(saved, running, rank)
        new = running.of(rank)
        difference = compare_groups(old, new)
        model |= difference.verdict == "model"
        if difference.verdict in ("model", "regrouped"):
            told.update(dict.fromkeys(difference.lines))
        if difference.verdict == "regrouped":
            most = max(most, moved_parameters(old, new))
    if most[0] and not model:
        lines.append(
            f"{most[0]} of {most[1]} parameters of a rank are in another place, and would get the "
            "state of what was there"
        )
    return lines + list(told), not model


def _expert_parallel_sizes(layout: Layout) -> set[str]:
    return {group.parallel_group for group in layout.groups if group.parallel_group}


def _counterpart(saved: Layout, running: Layout, rank: Rank) -> list[FlatGroup]:
    """A saved rank with the experts of this one."""
    wanted = _experts_of(running, rank)
    same = (other for other in sorted(saved.order) if other.model == rank.model)
    return saved.of(next(o for o in same if _experts_of(saved, o) == wanted))


def _experts_of(layout: Layout, rank: Rank) -> set[tuple[str | None, int | None]]:
    return {(g.parallel_group, g.ep_rank) for g in layout.of(rank) if g.parallel_group}


def _write_target(run: Manifest, load_dir: Path) -> str:
    """The run's groups, in a file beside the checkpoint or, where that cannot be, a temporary one."""
    name = f"moe_groups_{run.layout.fingerprint()[:8]}.json"
    try:
        write_manifest(run, load_dir / name)
        return str(load_dir / name)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="moe-groups-")) / name
        write_manifest(run, path)
        return str(path)
