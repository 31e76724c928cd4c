"""``save_experts``: the model as a Hugging Face checkpoint, written by all ranks."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import distributed, nn

from moe_groups._common.arguments import Bytes, FilePath, checked, need
from moe_groups._common.text import parse_bytes
from moe_groups._deepspeed.engines import InitializedEngine, has_engine, in_fp32, master_weights
from moe_groups._deepspeed.parts import Part, is_partitioned, ready_to_gather, whole_values
from moe_groups.errors import InvalidArgumentError
from moe_groups.topology import Topology
from moe_groups.weights.local_experts import (
    LocalExperts,
    dense_tensors,
    find_local_experts,
    module_of,
    refuse_parts,
)
from moe_groups.weights.names import (
    ROUTER,
    FamilyNames,
    layer_prefixes,
    names_of,
)
from moe_groups.weights.write import Job, Later, cut, write


@checked
def save_experts(
    model: nn.Module | InitializedEngine,
    directory: FilePath,
    *,
    family: FilePath,
    dtype: Literal["fp32"] | None = None,
    layers: Mapping[str, str] | None = None,
    matrices: Mapping[str, str] | None = None,
    router: str = ROUTER,
    max_shard_size: Bytes = "5GB",
    topology: Topology | None = None,
) -> list[Path]:
    """Write the model's weights as safetensors with the names of a Hugging Face family.

    The inverse of :func:`load_experts`. Call it on all ranks, which need the same directory.
    Each rank writes its experts into its own files (of ranks with the same experts the first
    one does); rank 0 writes the dense tensors, and the index last. Tensors in CPU memory are
    written directly, those on a GPU a file at a time. What ranks have parts of (under ZeRO-3, and
    master weights) is gathered a tensor at a time: who writes it needs CPU memory for one
    file. Tensors outside of MoE layers keep their names. Copy ``config.json`` and the tokenizer
    yourself.

    Args:
        model: the module, or a DeepSpeed engine.
        directory: a new one, or one without safetensors files.
        family: whose names the experts get: a model type of transformers with names like those of
            "mixtral" or "qwen3_moe" ("qwen2_moe", "deepseek_v3", "olmoe", ...), or the directory of
            a safetensors checkpoint that has the names.
        dtype: "fp32" for the engine's fp32 master weights; None for the model's weights as they
            are.
        layers: as in :func:`load_experts`. None: ``model.layers.<n>.mlp`` (Mixtral's:
            ``block_sparse_moe``) with the number in the layer's path.
        matrices: as in :func:`load_experts`.
        router: name of the router in the checkpoint, below the layer's.
        max_shard_size: of a file, in bytes or as "2GiB"; a larger tensor has its own file.
        topology: as in :func:`load_experts`.

    Returns:
        The files that this rank wrote.

    Raises:
        CheckpointError: the directory holds a checkpoint, or cannot be written.
        InvalidArgumentError: an argument does not fit the model, or the package
            ``safetensors`` is missing.
    """
    need("safetensors", "safetensors", "safetensors checkpoints")
    names = names_of(family)
    size = parse_bytes(max_shard_size, "max_shard_size")
    module = module_of(model)
    refuse_parts(module, "save_experts")
    local = find_local_experts(module, topology)
    whole = _whole_tensors(model, module, dtype)
    prefixes = layer_prefixes([layer.path for layer in local], names, layers)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    job = Job(Path(directory), rank)
    job.together(job.check_directory)
    mine: dict[str, torch.Tensor | Later] = {}
    for layer in local:
        found = _experts(layer, prefixes[layer.path], names, matrices or {})
        mine |= _planned(found, layer.writes, whole, dtype)
    mine |= _planned(_dense(module, local, prefixes, router), rank == 0, whole, dtype)
    with nullcontext() if model is module else ready_to_gather(model):
        return write(job, list(cut(mine, size)))


Whole: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Gives all values of a tensor of the model; ranks that have a part of it call it together."""


def _whole_tensors(model: Any, module: nn.Module, dtype: str | None) -> Whole | None:
    """None if each tensor is written as the model has it."""
    if dtype is None:
        return _last_kept(whole_values) if is_partitioned(module) else None
    if model is module and has_engine(module):
        raise InvalidArgumentError(
            "this model belongs to a DeepSpeed engine, which has the master weights: give "
            "save_experts the engine."
        )
    if model is not module and hasattr(model.optimizer, "param_groups"):  # it trains
        return _last_kept(master_weights(model))
    return _last_kept(lambda tensor: in_fp32(whole_values(tensor)))


def _last_kept(whole: Whole) -> Whole:
    """Of all experts in one tensor this is called for each expert, and gathers once."""
    last: tuple[torch.Tensor, torch.Tensor] | None = None

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal last
        if last is None or last[0] is not tensor:
            last = None  # before the next one needs memory
            last = tensor, whole(tensor).cpu()
        return last[1]

    return kept


def _planned(
    parts: Mapping[str, Part], writes: bool, whole: Whole | None, dtype: str | None
) -> dict[str, torch.Tensor | Later]:
    """What this rank writes; and what it takes part in gathering, in the order of all ranks."""
    if whole is None:
        return {name: part.of(part.tensor) for name, part in parts.items() if writes}

    def later(part: Part) -> Later:
        cast = dtype and part.tensor.is_floating_point()
        size = 4 * part.numel if cast else part.nbytes
        return Later(size, lambda: part.of(whole(part.tensor)), writes)

    return {name: later(part) for name, part in parts.items()}


def _experts(
    layer: LocalExperts, prefix: str, names: FamilyNames, matrices: Mapping[str, str]
) -> dict[str, Part]:
    """Matrix by matrix, so that all of one tensor come one after another."""
    return {
        f"{prefix}.experts.{number}.{names.matrix(matrices.get(name, name))}": expert[name]
        for name in layer.experts[0]
        for number, expert in zip(layer.numbers, layer.experts, strict=True)
    }


def _dense(
    module: nn.Module, local: list[LocalExperts], prefixes: Mapping[str, str], router: str
) -> dict[str, Part]:
    found = {names[0]: Part.whole(tensor) for names, tensor in dense_tensors(module, local)}
    for layer in local:
        for name, part in layer.router.items():
            found[f"{prefixes[layer.path]}.{router}.{name}"] = part
    return found
