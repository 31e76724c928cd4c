"""Where in a checkpoint the state of each parameter is."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch

from moe_groups.checkpoints.files import CheckpointFiles
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Piece, Rank, pieces
from moe_groups.checkpoints.read_layout import check_states
from moe_groups.checkpoints.shard import MASTER, SameStep, Shard, read_shard
from moe_groups.checkpoints.torch_file import reading
from moe_groups.errors import CheckpointError

_OPEN_SHARDS = 32


class Home(NamedTuple):
    """Where a parameter is: its group, and its place in that."""

    group: FlatGroup
    param: FlatParam


class Run(NamedTuple):
    """Elements of a saved tensor that lie behind each other."""

    tensor: torch.Tensor
    start: int
    stop: int


class RegroupSource:
    """A checkpoint that is converted, read piece by piece; threads may share it.

    Args:
        files: the checkpoint.
        layout: of its groups.

    Raises:
        CheckpointError: its optimizer states are not in files of ZeRO-1, ZeRO-2 or BF16_Optimizer.
    """

    def __init__(self, files: CheckpointFiles, layout: Layout) -> None:
        check_states(files)
        self.files = files
        self.layout = layout
        self._index = {id(group): index for index, group in enumerate(layout.groups)}
        self._homes = {
            (group.model_rank, group.parallel_group, group.ep_rank, param.name): Home(group, param)
            for group in layout.groups
            for param in group.params
        }
        self._shards: OrderedDict[Rank, tuple[Shard, dict[int, int]]] = OrderedDict()
        self._old_groups: dict[int, list[FlatGroup]] = {}
        self._steps = SameStep()
        self._lock = threading.RLock()

    def shard(self, rank: Rank) -> Shard:
        """A rank's file.

        Raises:
            CheckpointError: missing, damaged, or not what the layout says.
        """
        return self._opened(rank)[0]

    def _opened(self, rank: Rank) -> tuple[Shard, dict[int, int]]:
        """The file, and the place of each group in it."""
        with self._lock:
            if rank not in self._shards:
                places = {index: place for place, index in enumerate(self.layout.order[rank])}
                self._shards[rank] = self._read(rank), places
                if len(self._shards) > _OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(rank)
            return self._shards[rank]

    def _read(self, rank: Rank) -> Shard:
        if rank not in self.files.shards:
            raise CheckpointError(
                f"{self.files.folder}: the optimizer state of data-parallel rank {rank.data} "
                f"(model-parallel rank {rank.model}) is missing."
            )
        shard = read_shard(self.files.shards[rank], self.files.trust)
        with reading(shard.path):
            if not shard.holds(rank, self.layout.of(rank)):
                raise CheckpointError(
                    f"{shard.path} does not hold the groups that {self.files.manifest.name} says: "
                    "the files are not of one checkpoint."
                )
            self._steps.check(shard)
        return shard

    def home(self, target: FlatGroup, param: FlatParam) -> Home:
        """Where a parameter of a new group was.

        Raises:
            CheckpointError: it is not in the checkpoint, or has another size there.
        """
        key = target.model_rank, target.parallel_group, target.ep_rank, param.name
        home = self._homes.get(key)
        where = f"{param.name} (group {target.name!r} of the new groups)"
        if home is None:
            raise CheckpointError(
                f"{where} is not in the checkpoint: it was not trained, or belonged to other "
                "process groups."
            )
        if home.param.numel != param.numel:
            raise CheckpointError(
                f"{where} has {param.numel} elements, in the checkpoint it has {home.param.numel}."
            )
        return home

    def homes(self, target: FlatGroup) -> list[FlatGroup]:
        """The old groups of a new group's parameters, each once."""
        found = self._old_groups.get(id(target))
        if found is None:
            groups = (self.home(target, param).group for param in target.params)
            found = list({id(group): group for group in groups}.values())
            self._old_groups[id(target)] = found
        return found

    def place(self, group: FlatGroup, data_rank: int) -> tuple[Shard, int]:
        """A rank's file, and the number that the group has in it."""
        shard, places = self._opened(Rank(group.model_rank, data_rank))
        return shard, places[self._index[id(group)]]

    def saved(self, target: FlatGroup) -> list[tuple[Shard, int]]:
        """For each old group of a new one a file that has it, and its number in that."""
        return [self.place(group, group.ranks[0]) for group in self.homes(target)]

    def runs(self, target: FlatGroup, piece: Piece, key: str | None) -> Iterator[Run]:
        """Where the numbers of a piece of a new partition are.

        Args:
            target: the new group.
            piece: what of it.
            key: of the optimizer state; None for the master weights.

        Raises:
            CheckpointError: a file does not hold as many as its groups need.
        """
        group, param = self.home(target, piece.param)
        for part in pieces(group, param, piece.skip, piece.skip + piece.numel):
            shard, index = self.place(group, part.rank)
            run = Run(self.tensor(shard, index, key), part.start, part.start + part.numel)
            if run.stop > run.tensor.numel():
                raise CheckpointError(
                    f"{shard.path}: {key or MASTER} of group {index} has {run.tensor.numel()} "
                    f"elements, its parameters need {run.stop}."
                )
            yield run

    def tensor(self, shard: Shard, index: int, key: str | None) -> torch.Tensor:
        """The master weights of a group in a file, or one of its optimizer states.

        Raises:
            CheckpointError: it is not there.
        """
        with reading(shard.path):
            found = shard.optimizer[MASTER][index] if key is None else shard.states(index)[key]
            if not isinstance(found, torch.Tensor):
                raise TypeError(f"{key or MASTER} of group {index} is no tensor")
        return found
