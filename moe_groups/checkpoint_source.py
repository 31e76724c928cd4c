"""The layout of a checkpoint, from its manifest or from DeepSpeed's own files."""

from collections.abc import Mapping
from typing import Any

from moe_groups.checkpoint_files import CheckpointFiles
from moe_groups.errors import CheckpointError
from moe_groups.flat_layout import Layout
from moe_groups.manifest import read_manifest
from moe_groups.shard import read_shard
from moe_groups.shard_layout import layout_of_shards
from moe_groups.shard_step import SameStep
from moe_groups.torch_file import read_mapped

_SWAPPED = "offloaded_tensors"


def read_layout(files: CheckpointFiles) -> Layout:
    """The groups of all ranks.

    Raises:
        CheckpointError: the manifest is damaged, or there is none and DeepSpeed's files are
            incomplete, damaged, of two saves, or of a wrapper that does not say what lies where.
    """
    if files.manifest.is_file():
        return read_manifest(files.manifest).layout
    check_states(files)
    shards = {rank: read_shard(path) for rank, path in files.shards.items()}
    steps = SameStep()
    for shard in shards.values():
        steps.check(shard)
    shapes = {model: _shapes(read_mapped(path)) for model, path in files.models.items()}
    return layout_of_shards(shards, shapes)


def check_states(files: CheckpointFiles) -> None:
    """Refuse a checkpoint whose optimizer states are not in files of ZeRO-1, ZeRO-2 or BF16.

    Raises:
        CheckpointError: says what they are in.
    """
    if (files.folder / _SWAPPED).is_dir():
        raise CheckpointError(
            f"{files.folder} holds optimizer states that were offloaded to NVMe ({_SWAPPED}): "
            "files of DeepSpeed's swapper, in which no groups can be told apart."
        )
    if not files.shards:
        raise CheckpointError(
            f"{files.folder} has no optimizer states of ZeRO-1, ZeRO-2 or BF16_Optimizer "
            "(zero_pp_rank_*_optim_states.pt)."
        )


def _shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes that DeepSpeed saved beside the dense weights, of its first rank's parameters."""
    return {
        name: tuple(shape)
        for group in model.get("param_shapes") or []
        for name, shape in group.items()
    }
