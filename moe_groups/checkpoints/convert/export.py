"""A checkpoint as a Hugging Face checkpoint, offline: its weights, or the master weights."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from moe_groups._common.arguments import Bytes, FilePath, checked, need
from moe_groups._common.text import parse_bytes
from moe_groups.checkpoints.convert.source import RegroupSource
from moe_groups.checkpoints.files import CheckpointFiles, check_whole, find_checkpoint
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, pieces
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.checkpoints.torch_file import check_crcs, read_torch_file, reading
from moe_groups.errors import CheckpointError
from moe_groups.topology import ep_size_of
from moe_groups.weights.names import ROUTER, FamilyNames, layer_prefixes, names_of
from moe_groups.weights.write import Job, Later, Named, cut, write

_EXPERT = re.compile(r"(.+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
_ROUTER = re.compile(r"(.+)\.deepspeed_moe\.gate\.wg\.(.+)")


@checked
def export_checkpoint(
    directory: FilePath,
    destination: FilePath,
    *,
    family: FilePath,
    dtype: Literal["fp32"] | None = None,
    tag: str | None = None,
    trust: bool = False,
    layers: Mapping[str, str] | None = None,
    matrices: Mapping[str, str] | None = None,
    router: str = ROUTER,
    max_shard_size: Bytes = "5GB",
) -> list[Path]:
    """Write the weights in a checkpoint as safetensors with the names of a Hugging Face family.

    Like :func:`save_experts`, without an engine, a GPU or a process group. All files are compared
    with their CRC-32 first; one file of the result is in memory at a time. No code of the
    checkpoint is run.

    Args:
        directory: what ``load_checkpoint`` is given.
        destination: a new directory, or one without safetensors files.
        family: as in :func:`save_experts`.
        dtype: "fp32" for the master weights in the optimizer states of ZeRO-1, ZeRO-2 or
            BF16_Optimizer; None for the model's weights as they are.
        tag: of the checkpoint; None for the one in the file ``latest``.
        trust: read objects of any class, as DeepSpeed does when it loads, which can run any code of
            the checkpoint's author. Without, a file with such objects is refused.
        layers: as in :func:`save_experts`.
        matrices: as in :func:`save_experts`.
        router: as in :func:`save_experts`.
        max_shard_size: as in :func:`save_experts`.

    Returns:
        The files that were written.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged, or of tensor- or pipeline-parallel
            ranks; or the destination holds a checkpoint or cannot be written.
        InvalidArgumentError: an argument is out of range, or ``safetensors`` is missing.
    """
    need("safetensors", "safetensors", "safetensors checkpoints")
    names, size = names_of(family), parse_bytes(max_shard_size, "max_shard_size")
    files = find_checkpoint(directory, tag, trust)
    check_whole(files)
    if len(files.models) != 1:
        raise CheckpointError(
            f"{files.folder} was saved by {len(files.models)} model-parallel ranks, of which each "
            "has a part of the dense weights: it cannot be exported."
        )
    for path in files.states(optimizer=dtype is not None):
        check_crcs(path)
    weights: Named = dict(_weights(files))
    paths = sorted({match[1] for match in map(_EXPERT.fullmatch, weights) if match})
    found: dict[str, torch.Tensor | Later] = {**weights}
    if dtype is not None:
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                found[name] = Later(4 * tensor.numel(), tensor.float)
        found |= dict(_masters(files, weights))
    prefixes = layer_prefixes(paths, names, layers)
    renamed = {
        _renamed(name, prefixes, names, matrices or {}, router): t for name, t in found.items()
    }
    job = Job(Path(destination), 0, alone=True)
    job.together(job.check_directory)
    return write(job, list(cut(renamed, size)))


def _weights(files: CheckpointFiles) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's tensors by name, tied ones once; experts by their number over all ranks."""
    (model,) = files.models.values()
    seen = set()
    experts = [path for path in files.states(optimizer=False) if path != model]
    for path in (model, *experts):
        content = read_torch_file(path, files.trust)
        with reading(path):
            tensors: dict[str, Any] = content["module"] if path == model else content
            for name, tensor in tensors.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                if path != model and not _EXPERT.fullmatch(name):
                    raise CheckpointError(
                        f"{path} holds {name}, which is no expert of DeepSpeed's MoE."
                    )
                place = tensor.data_ptr(), tensor.shape, tensor.stride()
                if place not in seen or not tensor.numel():
                    yield name, tensor
                seen.add(place)


def _masters(files: CheckpointFiles, weights: Named) -> Iterator[tuple[str, Later]]:
    """What the optimizer states have of these tensors; read when a file is written."""
    layout = read_layout(files)
    if problem := layout.problem():
        raise CheckpointError(problem)
    source = RegroupSource(files, layout)
    totals: dict[str, set[str]] = {}
    for name in weights:
        if match := _EXPERT.fullmatch(name):
            totals.setdefault(match[1], set()).add(match[2])
    for group in layout.groups:
        for param in group.params:
            name = param.name
            if match := _EXPERT.fullmatch(name):
                each = len(totals.get(match[1], ())) // ep_size_of(group.parallel_group)
                number = int(match[2]) + (group.ep_rank or 0) * each
                name = name[: match.start(2)] + str(number) + name[match.end(2) :]
            if name not in weights or weights[name].numel() != param.numel:
                raise CheckpointError(
                    f"{files.folder}: {name} has master weights, but no weights of their size."
                )
            make = partial(_master, source, group, param, weights[name].shape)
            yield name, Later(4 * param.numel, make)


def _master(
    source: RegroupSource, group: FlatGroup, param: FlatParam, shape: torch.Size
) -> torch.Tensor:
    parts = []
    for piece in pieces(group, param):
        saved = source.tensor(*source.place(group, piece.rank), None).detach().flatten()
        parts.append(saved[piece.start : piece.start + piece.numel])
    return torch.cat(parts).float().view(shape)


def _renamed(
    name: str,
    prefixes: Mapping[str, str],
    names: FamilyNames,
    matrices: Mapping[str, str],
    router: str,
) -> str:
    if match := _EXPERT.fullmatch(name):
        matrix = names.matrix(matrices.get(match[3], match[3]))
        return f"{prefixes[match[1]]}.experts.{match[2]}.{matrix}"
    if (match := _ROUTER.fullmatch(name)) and match[1] in prefixes:
        return f"{prefixes[match[1]]}.{router}.{match[2]}"
    return name
