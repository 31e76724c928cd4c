"""``save_experts``: the model as a Hugging Face checkpoint, written by all ranks."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import distributed, nn

from moe_groups._common.arguments import Bytes, FilePath, checked, need
from moe_groups._common.own_folder import finished_file
from moe_groups._common.ranks import on_all_ranks
from moe_groups._common.text import parse_bytes
from moe_groups._deepspeed.engines import InitializedEngine, is_pipeline
from moe_groups._deepspeed.process_groups import tensor_parallel_size
from moe_groups.errors import CheckpointError, InvalidArgumentError
from moe_groups.topology import Topology
from moe_groups.weights.local_experts import (
    LocalExperts,
    dense_tensors,
    find_local_experts,
    module_of,
)
from moe_groups.weights.names import (
    ROUTER,
    Family,
    expand,
    layer_number,
    saved_matrix,
    saved_prefix,
)
from moe_groups.weights.safetensors_files import INDEX

Named = dict[str, torch.Tensor]


@checked
def save_experts(
    model: nn.Module | InitializedEngine,
    directory: FilePath,
    *,
    family: Family,
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
    in CPU memory are written directly, those on a GPU a file at a time. The dtype is the
    model's. Tensors outside of MoE layers keep their names. Copy ``config.json`` and the
    tokenizer yourself.

    Args:
        model: the module, or a DeepSpeed engine without ZeRO-3.
        directory: a new one, or one without safetensors files.
        family: family whose names the experts get: "mixtral", "qwen3_moe" or "deepseek_v3".
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
    need("safetensors", "hf", "safetensors checkpoints")
    size = parse_bytes(max_shard_size, "max_shard_size")
    module = module_of(model, "save_experts")
    _check_whole(module)
    local = find_local_experts(module, topology)
    prefixes = _prefixes([layer.path for layer in local], family, layers)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    mine: Named = {}
    for layer in local:
        mine |= _experts(layer, prefixes[layer.path], family, matrices or {})
    if rank == 0:
        mine |= _dense(module, local, prefixes, router)
    return _write(_Job(Path(directory), rank), list(_cut(mine, size)))


def _check_whole(module: nn.Module) -> None:
    if is_pipeline(module) or tensor_parallel_size() > 1:
        raise InvalidArgumentError(
            "save_experts writes what is dense from rank 0, which under tensor or pipeline "
            "parallelism has a part of it."
        )


def _prefixes(paths: list[str], family: Family, layers: Mapping[str, str] | None) -> dict[str, str]:
    found = {}
    for path in paths:
        number = layer_number(path)
        if number is not None:
            found[path] = saved_prefix(family, number)
    found |= expand(paths, layers or {})
    if without := [path for path in paths if path not in found]:
        raise InvalidArgumentError(
            f"the path of the MoE layer {without[0]!r} does not tell its number: say with "
            "layers={...} what it is called in the checkpoint."
        )
    if len(set(found.values())) < len(found):
        raise InvalidArgumentError(
            f"two MoE layers would have the same name: {found}. Say with layers={{...}} what each "
            "is called in the checkpoint."
        )
    return found


def _experts(
    layer: LocalExperts, prefix: str, family: Family, matrices: Mapping[str, str]
) -> Named:
    return {
        f"{prefix}.experts.{number}.{saved_matrix(family, matrices.get(name, name))}": tensor
        for number, expert in zip(layer.numbers, layer.experts, strict=True)
        for name, tensor in expert.items()
        if layer.writes
    }


def _dense(
    module: nn.Module, local: list[LocalExperts], prefixes: Mapping[str, str], router: str
) -> Named:
    found = {names[0]: tensor for names, tensor in dense_tensors(module, local)}
    for layer in local:
        for name, tensor in layer.router.items():
            found[f"{prefixes[layer.path]}.{router}.{name}"] = tensor
    return found


def _cut(tensors: Named, size: int) -> Iterator[Named]:
    """Files of at most ``size`` bytes, in the order of the tensors."""
    shard: Named = {}
    held = 0
    for name, tensor in tensors.items():
        if shard and held + tensor.nbytes > size:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    if shard:
        yield shard


class _Job:
    """A save of all ranks into one directory."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory, self.rank = directory, rank

    def together(self, work: Callable[[], None]) -> None:
        """Call it on all ranks; if it fails on one, all raise its error."""

        def checked() -> None:
            try:
                work()
            except OSError as error:
                raise CheckpointError(
                    f"{error.filename or self.directory} cannot be written: {error.strerror}."
                ) from error

        on_all_ranks(checked) if distributed.is_initialized() else checked()

    def check_directory(self) -> None:
        if self.rank:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if found := sorted(self.directory.glob("*.safetensors*")):
            raise CheckpointError(
                f"{self.directory} already holds {found[0].name}: choose another directory, or "
                "remove the files of the other checkpoint."
            )

    def remove(self, paths: list[Path]) -> None:
        """Remove the files of a save that failed."""
        for path in paths:
            with contextlib.suppress(OSError):  # the disk may have failed
                path.unlink(missing_ok=True)


def _write(job: _Job, shards: list[Named]) -> list[Path]:
    job.together(job.check_directory)
    own = [{name: tensor.nbytes for name, tensor in shard.items()} for shard in shards]
    everyone = [own]
    if distributed.is_initialized():
        everyone = [own] * distributed.get_world_size()
        distributed.all_gather_object(everyone, own)
    files = [sizes for rank in everyone for sizes in rank]
    names = [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, 1 + len(files))
    ]
    first = sum(map(len, everyone[: job.rank]))
    paths = [job.directory / name for name in names[first : first + len(shards)]]

    def write_shards() -> None:
        for path, shard in zip(paths, shards, strict=True):
            _write_shard(path, shard)

    def write_index() -> None:
        if job.rank == 0:
            index = {
                "metadata": {"total_size": sum(sum(sizes.values()) for sizes in files)},
                "weight_map": {
                    name: file for file, sizes in zip(names, files, strict=True) for name in sizes
                },
            }
            with finished_file(job.directory / INDEX, job.directory) as part:
                part.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    try:
        job.together(write_shards)
        job.together(write_index)
    except CheckpointError:
        job.remove(paths)
        raise
    return paths


@torch.no_grad()
def _write_shard(path: Path, shard: Named) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
    with finished_file(path, path.parent) as part:
        save_file(tensors, part, metadata={"format": "pt"})
