"""What lies where in the flat buffers of an optimizer: pure data and arithmetic.

ZeRO-1, ZeRO-2 and BF16_Optimizer lay the parameters of a group behind each other in one
buffer and give each rank that shares the group an equal partition of it. A checkpoint
holds the partitions and finds parameters in them by position alone, so this layout is what
must be the same where it is loaded.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from moe_groups.groups.grouping import fingerprint, padded_partition
from moe_groups.groups.origin import Origin
from moe_groups.tags import LABELS, STEP_OPTIONS


class Rank(NamedTuple):
    """Coordinates by which DeepSpeed names the files of a rank.

    Attributes:
        model: model-parallel rank (``mp_rank`` in file names; pipeline and tensor parallel).
        data: data-parallel rank (``zero_pp_rank``).
    """

    model: int
    data: int


_EXPERT = re.compile(r"(.*deepspeed_moe\.experts\.deepspeed_experts\.)\d+(\..+)")
"""A parameter of an expert of DeepSpeed's layer, which numbers the experts of a rank."""


def of_any_expert(name: str) -> str:
    """The name without the number of the expert."""
    return _EXPERT.sub(r"\1*\2", name)


class FlatParam(NamedTuple):
    """One parameter in the flat buffer of its group.

    Attributes:
        name: qualified name on the ranks that hold it (experts are numbered per rank).
        numel: elements.
        offset: first element in the group's buffer.
        shape: None where a checkpoint does not say it.
        dtype: of the model's parameter, such as "bfloat16"; None where not known.
        expert: number of the expert over all ranks; None for what is not one expert's.
    """

    name: str
    numel: int
    offset: int
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    expert: int | None = None

    @property
    def end(self) -> int:
        """Index behind the last element in the group's buffer."""
        return self.offset + self.numel

    @property
    def global_name(self) -> str | None:
        """The name with the expert's number over all ranks, as in DeepSpeed's files of experts.

        None for what is not one expert's of DeepSpeed's layer, or has no known number.
        """
        match = None if self.expert is None else _EXPERT.fullmatch(self.name)
        return match and f"{match[1]}{self.expert}{match[2]}"


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """One optimizer group as the ranks that share it have it.

    Attributes:
        name: of the group.
        ranks: data-parallel ranks in the order of their partitions. Larger numbers than there
            are stand for ranks of another model-parallel rank.
        params: in the order of their offsets.
        model_rank: the model-parallel rank of all of them.
        parallel_group: ``ep_size_<N>`` for experts, None for dense groups.
        ep_rank: place of these ranks in the expert-parallel group; None for dense groups.
        labels: our keys of the group: ``expert_group_name`` and ``expert_number``.
        options: hyperparameters, for the reader.
    """

    name: str
    ranks: tuple[int, ...]
    params: tuple[FlatParam, ...]
    model_rank: int = 0
    parallel_group: str | None = None
    ep_rank: int | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements up to the end of the last parameter, gaps for alignment included."""
        return self.params[-1].end if self.params else 0

    @property
    def partition(self) -> int:
        """Elements of one rank's partition, with padding."""
        return padded_partition(self.numel, len(self.ranks))

    def filled(self, rank: int) -> int:
        """Elements of a data-parallel rank's partition without the padding at the group's end."""
        start = self.ranks.index(rank) * self.partition
        return min(max(self.numel - start, 0), self.partition)

    def place(self) -> tuple[Any, ...]:
        """All that decides where an element is; names of groups do not."""
        rows = tuple((param.name, param.numel, param.offset) for param in self.params)
        return self.model_rank, self.ranks, rows


@dataclass(frozen=True, slots=True)
class Layout:
    """The groups of all ranks of a run.

    Attributes:
        groups: each once, however many ranks share it.
        order: indices into ``groups`` for each rank, in the order of its optimizer.
        origins: what the groups of each rank were made from, for the ranks where it is known.
    """

    groups: tuple[FlatGroup, ...]
    order: Mapping[Rank, tuple[int, ...]]
    origins: Mapping[Rank, Origin] = field(default_factory=dict)

    def of(self, rank: Rank) -> list[FlatGroup]:
        """This rank's groups in the order of its optimizer."""
        return [self.groups[index] for index in self.order[rank]]

    @property
    def elements(self) -> int:
        """Of all partitions on all ranks, with gaps and padding."""
        return sum(group.partition for rank in self.order for group in self.of(rank))

    @property
    def data_parallel_size(self) -> int:
        """Data-parallel ranks."""
        return 1 + max((rank.data for rank in self.order), default=-1)

    @property
    def model_ranks(self) -> list[int]:
        """Model-parallel ranks, ascending."""
        return sorted({rank.model for rank in self.order})

    def problem(self) -> str | None:
        """Why nobody can convert or inspect a checkpoint of these groups; None if somebody can.

        Files of one model-parallel rank have to hold its groups (DeepSpeed lets tensor-parallel
        ranks share experts that are not tensor-parallel), and ranks and elements have to add up,
        which a file that somebody made can say otherwise.
        """
        return self._spanning_problem() or self._rank_problem() or self._place_problem()

    def _rank_problem(self) -> str | None:
        have: dict[int, set[Rank]] = {}
        for rank, own in self.order.items():
            for index in own:
                have.setdefault(index, set()).add(rank)
        for index, group in enumerate(self.groups):
            shared = {Rank(group.model_rank, data) for data in group.ranks}
            if len(shared) < max(len(group.ranks), 1) or shared != have.get(index):
                return (
                    f"the ranks that share group {group.name!r} are not those that have it: no run "
                    "has such groups."
                )
        return None

    def _place_problem(self) -> str | None:
        for group in self.groups:
            end = 0
            for param in group.params:
                if param.numel < 0 or param.offset < end:
                    return (
                        f"{param.name} of group {group.name!r} has {param.numel} elements from "
                        f"{param.offset} on, and what is before it ends at {end}: no run has such "
                        "groups."
                    )
                end = param.end
        return None

    def _spanning_problem(self) -> str | None:
        size = self.data_parallel_size
        for group in self.groups:
            if max(group.ranks, default=0) >= size:
                return (
                    f"{group.name} is shared by tensor-parallel ranks "
                    "(enable_expert_tensor_parallelism is off). Such a checkpoint can be saved and "
                    "loaded with the same groups, and cannot be converted or inspected."
                )
        return None

    def fingerprint(self) -> str:
        """Equal for two runs in which every element is at the same place; hexadecimal."""
        places = [fingerprint([group.place()]) for group in self.groups]
        return fingerprint(
            (rank, [places[index] for index in self.order[rank]]) for rank in sorted(self.order)
        ).hex()


def params_by_name(groups: Iterable[FlatGroup]) -> dict[str, tuple[FlatGroup, FlatParam]]:
    """Each parameter of a rank's groups, with its group."""
    return {param.name: (group, param) for group in groups for param in group.params}


Columns: TypeAlias = Sequence[tuple[Rank, Sequence[FlatGroup]]]
"""Each rank with its groups."""


def merge_ranks(columns: Columns, origins: Mapping[Rank, Origin] | None = None) -> Layout:
    """The layout of ranks that were described one by one."""
    index_of: dict[Any, int] = {}
    groups: list[FlatGroup] = []
    order: dict[Rank, tuple[int, ...]] = {}
    for rank, own in columns:
        places = []
        for group in own:
            key = group.name, group.place()
            if key not in index_of:
                index_of[key] = len(groups)
                groups.append(group)
            places.append(index_of[key])
        order[rank] = tuple(places)
    return Layout(tuple(groups), order, origins or {})


def lay_out(params: Sequence[FlatParam], alignment: int = 1) -> tuple[FlatParam, ...]:
    """The parameters behind each other, each but the first at a multiple of ``alignment``."""
    placed: list[FlatParam] = []
    offset = 0
    for param in params:
        offset = math.ceil(offset / alignment) * alignment
        placed.append(param._replace(offset=offset))
        offset += param.numel
    return tuple(placed)


T = TypeVar("T")


def round_robin(params: Sequence[T], ranks: int) -> list[T]:
    """The order into which ZeRO's ``round_robin_gradients`` brings a group for so many ranks."""
    return [param for first in range(ranks) for param in params[first::ranks]]


class Piece(NamedTuple):
    """A run of elements of one parameter in one rank's partition.

    Attributes:
        param: the parameter.
        rank: data-parallel rank whose partition holds it.
        start: first element in that partition.
        skip: elements of the parameter that come before.
        numel: elements.
    """

    param: FlatParam
    rank: int
    start: int
    skip: int
    numel: int


def pieces(
    group: FlatGroup, param: FlatParam, start: int = 0, stop: int | None = None
) -> Iterator[Piece]:
    """Where the elements ``start`` to ``stop`` of a parameter are, in order."""
    size = group.partition
    at = param.offset + start
    end = param.offset + (param.numel if stop is None else stop)
    while at < end:
        index = at // size
        count = min(end, (index + 1) * size) - at
        yield Piece(param, group.ranks[index], at - index * size, at - param.offset, count)
        at += count


def fragments(group: FlatGroup, rank: int) -> Iterator[Piece]:
    """What of each parameter is in this rank's partition; nothing of those that are elsewhere."""
    first = group.ranks.index(rank) * group.partition
    end = first + group.partition
    for param in group.params:
        start, stop = max(first, param.offset), min(end, param.end)
        if start < stop:
            yield Piece(param, rank, start - first, start - param.offset, stop - start)


_NOT_OPTIONS = ("params", "name", "moe", "param_names", STEP_OPTIONS, *LABELS)


def readable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters of a group as JSON holds them; what JSON cannot hold, in words."""
    return {key: _readable(value) for key, value in options.items() if key not in _NOT_OPTIONS}


def _readable(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_readable(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
