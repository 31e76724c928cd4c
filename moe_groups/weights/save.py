"""``save_experts``: the model as a Hugging Face checkpoint, written by all ranks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed, nn

from moe_groups._common.arguments import Bytes, FilePath, checked, need
from moe_groups._common.text import parse_bytes
from moe_groups._deepspeed.engines import (
    InitializedEngine,
    has_engine,
    master_weights,
)
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
from moe_groups.weights.write import Job, Named, cut, write


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
    one does); rank 0 writes the dense tensors, and the index last. Nothing is gathered: tensors
    in CPU memory are written directly, those on a GPU a file at a time. Tensors
    outside of MoE layers keep their names. Copy ``config.json`` and the
    tokenizer yourself.

    Args:
        model: the module, or a DeepSpeed engine without ZeRO-3.
        directory: a new one, or one without safetensors files.
        family: whose names the experts get: a model type of transformers with names like those of
            "mixtral" or "qwen3_moe" ("qwen2_moe", "deepseek_v3", "olmoe", ...), or the directory of
            a safetensors checkpoint that has the names.
        dtype: "fp32" for the engine's fp32 master weights, which each rank collects in CPU memory
            for the tensors that it writes; None for the model's weights as they are.
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
    module = module_of(
        model, "save_experts", "gather_model(engine) gathers the whole model for save_pretrained"
    )
    refuse_parts(module, "save_experts")
    local = find_local_experts(module, topology)
    full = None if dtype is None else _full_precision(model, module)
    prefixes = layer_prefixes([layer.path for layer in local], names, layers)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    job = Job(Path(directory), rank)
    job.together(job.check_directory)
    mine: Named = {}
    for layer in local:
        found = _experts(layer, prefixes[layer.path], names, matrices or {})
        mine |= _taken(found, layer.writes, full)
    mine |= _taken(_dense(module, local, prefixes, router), rank == 0, full)
    return write(job, list(cut(mine, size)))


def _full_precision(model: Any, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    if model is module and has_engine(module):
        raise InvalidArgumentError(
            "this model belongs to a DeepSpeed engine, which has the master weights: give "
            "save_experts the engine."
        )
    return torch.Tensor.float if model is module else master_weights(model)


def _taken(
    tensors: Named, writes: bool, full: Callable[[torch.Tensor], torch.Tensor] | None
) -> Named:
    """What this rank writes; all ranks that share a tensor put its master weights together."""
    if full is not None:
        tensors = {name: full(tensor).cpu() for name, tensor in tensors.items()}
    return tensors if writes else {}


def _experts(
    layer: LocalExperts, prefix: str, names: FamilyNames, matrices: Mapping[str, str]
) -> Named:
    return {
        f"{prefix}.experts.{number}.{names.matrix(matrices.get(name, name))}": tensor
        for number, expert in zip(layer.numbers, layer.experts, strict=True)
        for name, tensor in expert.items()
    }


def _dense(
    module: nn.Module, local: list[LocalExperts], prefixes: Mapping[str, str], router: str
) -> Named:
    found = {names[0]: tensor for names, tensor in dense_tensors(module, local)}
    for layer in local:
        for name, tensor in layer.router.items():
            found[f"{prefixes[layer.path]}.{router}.{name}"] = tensor
    return found
