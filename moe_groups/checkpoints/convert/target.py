"""The groups that a checkpoint is converted to: those of a file, or by name."""

from pathlib import Path

from moe_groups.checkpoints.convert.named import TARGETS, named_target
from moe_groups.checkpoints.files import CheckpointFiles, find_checkpoint
from moe_groups.checkpoints.layout import Layout
from moe_groups.checkpoints.manifest import read_manifest
from moe_groups.errors import CheckpointError


def read_target(
    to: str | Path | Layout,
    files: CheckpointFiles,
    source: Layout,
    max_group_size: int | None = None,
) -> Layout:
    """The layout that ``to`` means for this checkpoint.

    Raises:
        CheckpointError: no such file or name, or it does not fit the checkpoint.
    """
    if isinstance(to, Layout):
        return to
    if isinstance(to, str) and to in TARGETS:  # a file of that name is ./expert
        return named_target(source, to, max_group_size)
    if max_group_size is not None:
        raise CheckpointError(
            f"max_group_size={max_group_size} goes with one of {', '.join(TARGETS)}; {to} says "
            "itself how large its groups are."
        )
    path = _file(Path(to))
    if not path.is_file():
        raise CheckpointError(
            f"{to} is none of {', '.join(TARGETS)}, and no file that says what groups are wanted "
            "(a refused load writes one; moe_groups.json in a checkpoint is one)."
        )
    return read_manifest(path).layout


def _file(path: Path) -> Path:
    try:
        return find_checkpoint(path).manifest if path.is_dir() else path
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def size_in_groups(files: CheckpointFiles, source: Layout, target: Layout) -> int:
    """Bytes of what is not only copied: optimizer states grow with gaps and padding."""
    saved, models = (
        sum(path.stat().st_size for path in paths.values())
        for paths in (files.shards, files.models)
    )
    return saved * target.elements // max(source.elements, 1) + models


def check_same_parameters(source: Layout, target: Layout) -> None:
    """Both must have the same parameters on the same model- and expert-parallel ranks.

    Raises:
        CheckpointError: names what is on one side only, or a group that cannot be converted.
    """
    if problem := source.problem() or target.problem():
        raise CheckpointError(problem)
    old, new = _parameters(source), _parameters(target)
    if old == new:
        return
    lines = [f"{name} is in the checkpoint alone" for *_, name in sorted(old - new, key=str)]
    lines += [f"{name} is in the new groups alone" for *_, name in sorted(new - old, key=str)]
    more = f"; and {len(lines) - 6} more" if len(lines) > 6 else ""
    raise CheckpointError(
        "the checkpoint and the new groups are not of one model on the same expert- and "
        f"model-parallel ranks: {'; '.join(lines[:6])}{more}."
    )


def _parameters(layout: Layout) -> set[tuple[int, str | None, int | None, str]]:
    return {
        (group.model_rank, group.parallel_group, group.ep_rank, param.name)
        for group in layout.groups
        for param in group.params
    }
