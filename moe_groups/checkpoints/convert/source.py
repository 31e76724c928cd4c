"""Where in a checkpoint the state of each parameter is."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_groups.checkpoints.files import STATES, CheckpointFiles
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Piece, Rank, pieces
from moe_groups.checkpoints.layout_diff import key_of
from moe_groups.checkpoints.read_layout import check_states
from moe_groups.checkpoints.shard import MASTER, SameStep, Shard, read_shard
from moe_groups.checkpoints.torch_file import read_torch_file, reading
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
            key_of(group, param, by_expert): Home(group, param)
            for by_expert in (True, False)
            for group in layout.groups
            for param in group.params
        }
        self._shards: OrderedDict[Rank, tuple[Shard, dict[int, int]]] = OrderedDict()
        self._old_groups: dict[int, list[FlatGroup]] = {}
        self._layers: dict[tuple[int, str], str] = {}
        self._last: tuple[Path, dict[str, Any]] | None = None
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

    def home(self, target: FlatGroup, param: FlatParam) -> Home | None:
        """Where a parameter of a new group was; None for one that was not trained.

        Raises:
            CheckpointError: it has another size in the checkpoint.
        """
        home = self._homes.get(key_of(target, param)) or self._homes.get(
            key_of(target, param, by_expert=True)
        )
        if home is not None and home.param.numel != param.numel:
            raise CheckpointError(
                f"{param.name} (group {target.name!r} of the new groups) has {param.numel} "
                f"elements, in the checkpoint it has {home.param.numel}."
            )
        return home

    def fresh(self, target: FlatGroup) -> list[FlatParam]:
        """The parameters of a new group that were not trained."""
        return [param for param in target.params if self.home(target, param) is None]

    def homes(self, target: FlatGroup) -> list[FlatGroup]:
        """The old groups of a new group's parameters, each once."""
        found = self._old_groups.get(id(target))
        if found is None:
            homes = (self.home(target, param) for param in target.params)
            found = list({id(home.group): home.group for home in homes if home}.values())
            self._old_groups[id(target)] = found
        return found

    def models_for(self, target: FlatGroup, layout: Layout) -> list[FlatGroup]:
        """The old groups that give a new group its hyperparameters and its schedule.

        Those of its parameters; for a group whose parameters were not trained those of the new
        groups that have the same hyperparameters, if there are any.
        """
        if homes := self.homes(target):
            return homes
        alike = layout.of(Rank(target.model_rank, min(target.ranks)))
        found = (self.homes(group) for group in alike if group.options == target.options)
        return list({id(group): group for groups in found for group in groups}.values())

    def weight(self, target: FlatGroup, param: FlatParam) -> torch.Tensor:
        """The saved weight of a parameter that was not trained.

        Raises:
            CheckpointError: it is not in the files, or has another size there.
        """
        model, name = target.model_rank, param.name
        if target.parallel_group is None:
            path = self.files.models.get(model)
            found = self._weights(path).get("module", {}).get(name) if path else None
        else:  # the file of all ranks has one rank's experts
            found = self._expert(model, name, param.global_name or name, param.expert)
        if isinstance(found, torch.Tensor) and found.numel() == param.numel:
            return found.detach()
        raise CheckpointError(
            f"{param.name} (group {target.name!r} of the new groups) was not trained by the run "
            f"that saved {self.files.folder}, which has no weight of {param.numel} elements for it "
            "(exclude_frozen_parameters leaves frozen ones out)."
        )

    def _expert(self, model: int, name: str, own: str, number: int | None) -> Any:
        """The tensor called ``own`` in the files of an expert; all of a layer have one number."""
        layer = self._layers.get((model, name), "*")
        file = f"layer_{layer}_expert_{number}_mp_rank_{model:02d}_model{STATES}"
        folder = self.files.folder
        for path in sorted(folder.glob(file)) if layer == "*" else [folder / file]:
            found = self._weights(path).get(own) if path.is_file() else None
            if found is not None:
                self._layers[model, name] = path.name.split("_")[1]
                return found
        return None

    def _weights(self, path: Path) -> dict[str, Any]:
        """A file of weights; the last one is kept, as parameters of an expert come together."""
        with self._lock:
            if self._last is None or self._last[0] != path:
                content = read_torch_file(path, self.files.trust)
                with reading(path):
                    if not isinstance(content.get("module", {}), dict):
                        raise TypeError("its module is no dict")
                self._last = path, content
            return self._last[1]

    def place(self, group: FlatGroup, data_rank: int) -> tuple[Shard, int]:
        """A rank's file, and the number that the group has in it."""
        shard, places = self._opened(Rank(group.model_rank, data_rank))
        return shard, places[self._index[id(group)]]

    def saved(self, target: FlatGroup) -> list[tuple[Shard, int]]:
        """For each old group of a new one a file that has it, and its number in that."""
        return [self.place(group, group.ranks[0]) for group in self.homes(target)]

    def runs(
        self, target: FlatGroup, piece: Piece, key: str | None, dtype: torch.dtype
    ) -> Iterator[Run]:
        """Where the numbers of a piece of a new partition are.

        A parameter that was not trained has its saved weight as master weight, and zeros.

        Args:
            target: the new group.
            piece: what of it.
            key: of the optimizer state; None for the master weights.
            dtype: of what was not trained.

        Raises:
            CheckpointError: a file does not hold as many as its groups need.
        """
        home = self.home(target, piece.param)
        if home is None:
            if key is None:
                weight = self.weight(target, piece.param).flatten()
                values = weight[piece.skip : piece.skip + piece.numel].to(dtype)
            else:
                values = torch.zeros(piece.numel, dtype=dtype)
            yield Run(values, 0, piece.numel)
            return
        group, param = home
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
