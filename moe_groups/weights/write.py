"""Safetensors files and their index, written by all ranks or by one process."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed

from moe_groups._common.own_folder import finished_file
from moe_groups._common.ranks import on_all_ranks
from moe_groups.errors import CheckpointError
from moe_groups.weights.safetensors_files import INDEX, stated_crcs


class Later(NamedTuple):
    """A tensor that is made when its file is written.

    Attributes:
        nbytes: its size.
        make: makes it, together with the other ranks if it is given to all of them.
        writes: it is written here; else it is made for the other ranks alone.
    """

    nbytes: int
    make: Callable[[], torch.Tensor]
    writes: bool = True


Named = dict[str, torch.Tensor]
Planned = Mapping[str, torch.Tensor | Later]


def cut(tensors: Planned, size: int) -> Iterator[Planned]:
    """Files of at most ``size`` bytes, in the order of the tensors."""
    shard: dict[str, torch.Tensor | Later] = {}
    held = 0
    for name, tensor in tensors.items():
        if shard and held + tensor.nbytes > size:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    if shard:
        yield shard


class Job:
    """A save of all ranks into one directory; of one process alone where there are others."""

    def __init__(self, directory: Path, rank: int, alone: bool = False) -> None:
        self.directory, self.rank = directory, rank
        self.alone = alone or not distributed.is_initialized()

    def together(self, work: Callable[[], None]) -> None:
        """Call it on all ranks; if it fails on one, all raise its error."""

        def checked() -> None:
            try:
                work()
            except OSError as error:
                raise CheckpointError(
                    f"{error.filename or self.directory} cannot be written: {error.strerror}."
                ) from error

        checked() if self.alone else on_all_ranks(checked)

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


def write(job: Job, shards: list[Planned]) -> list[Path]:
    """Write this rank's files, and on the first rank the index of all.

    All ranks write a file before any writes its next one.

    Raises:
        CheckpointError: on all ranks, if a file cannot be written on one.
    """
    own = [_written(shard) for shard in shards]
    everyone = [own]
    if not job.alone:
        everyone = [own] * distributed.get_world_size()
        distributed.all_gather_object(everyone, own)
    files = [sizes for rank in everyone for sizes in rank if sizes]
    names = [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, 1 + len(files))
    ]
    first = sum(bool(sizes) for rank in everyone[: job.rank] for sizes in rank)
    paths = [job.directory / name for name in names[first : first + sum(map(bool, own))]]
    left = iter(paths)

    def write_next(shard: Planned) -> None:
        tensors = _made(shard)
        if tensors:
            _write_shard(next(left), tensors)

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
        for number in range(max(map(len, everyone))):
            shard = shards[number] if number < len(shards) else {}
            job.together(partial(write_next, shard))
        job.together(write_index)
    except CheckpointError:
        job.remove(paths)
        raise
    return paths


def _written(shard: Planned) -> dict[str, int]:
    """Sizes of what this rank writes of a shard."""
    return {
        name: tensor.nbytes for name, tensor in shard.items() if getattr(tensor, "writes", True)
    }


@torch.no_grad()
def _made(shard: Planned) -> Named:
    tensors = {}
    for name, tensor in shard.items():
        made = tensor.make() if isinstance(tensor, Later) else tensor
        if getattr(tensor, "writes", True):
            tensors[name] = made.detach().cpu().contiguous()
    return tensors


def _write_shard(path: Path, tensors: Named) -> None:
    from safetensors.torch import save_file

    with finished_file(path, path.parent) as part:
        save_file(tensors, part, metadata={"format": "pt", **stated_crcs(tensors)})
