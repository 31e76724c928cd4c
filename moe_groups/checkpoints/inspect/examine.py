"""What is in each file, and is it sound? Tensors stay in the file and are read in chunks."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from moe_groups.checkpoints.inspect.expected import Expected
from moe_groups.checkpoints.inspect.report import MASTER_NAME, Problem, ProblemKind
from moe_groups.checkpoints.layout import FlatGroup, Rank, fragments, readable_options
from moe_groups.checkpoints.shard import (
    MASTER,
    Fragment,
    Shard,
    read_shard,
    stated_fragments,
    step_of_group,
)
from moe_groups.checkpoints.torch_file import (
    PICKLE,
    compare_crcs,
    read_torch_file,
    reading,
    stated_crcs,
)
from moe_groups.errors import CheckpointError

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_CHUNK = 1 << 17

ParamKey: TypeAlias = tuple[int, str]
"""Index of a group in the layout, and name of a parameter."""


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What one rank's file says of a group.

    Attributes:
        index: of the group in the layout.
        said: its hyperparameters and the names of its optimizer state, as text.
        step: what its counter says; 0 before the first step, None where it has none.
        size: bytes of master weights and optimizer state.
    """

    index: int
    said: dict[str, str]
    step: float | None
    size: int


@dataclass(slots=True)
class FileFacts:
    """What was found in one file.

    Attributes:
        path: the file.
        name: relative to the folder of the tag.
        rank: whose optimizer state it is; None for weights.
        wrapper: who saved the optimizer state.
        groups: in the rank's order; empty where they are not those of the layout.
        squares: sums of squares by parameter and state.
        problems: what is wrong.
        unstated: records without a CRC-32.
    """

    path: Path
    name: str
    rank: Rank | None
    wrapper: str | None = None
    groups: list[GroupFacts] = field(default_factory=list)
    squares: dict[ParamKey, Counter[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unstated: int = 0

    def report(self, kind: ProblemKind, text: str) -> None:
        """Add a problem of this file."""
        self.problems.append(Problem(kind, self.name, text))


def examine_file(
    path: Path,
    rank: Rank | None,
    expected: Expected,
    experts: Mapping[ParamKey, str],
    data: bool,
    progress: Callable[[int], None],
) -> FileFacts:
    """Check one file; whatever is wrong with it becomes a problem.

    Args:
        path: the file.
        rank: whose optimizer state it is; None for weights.
        expected: what ought to be in it.
        experts: the expert of each parameter, in words.
        data: read the tensors too.
        progress: called with the number of bytes that were read since the last call.
    """
    facts = FileFacts(path, str(path.relative_to(expected.files.folder)), rank)
    try:
        with reading(path):
            _examine(facts, expected, experts, data, progress)
    except CheckpointError as error:
        facts.report("unreadable", str(error).replace(str(path), facts.name))
    return facts


def _examine(
    facts: FileFacts,
    expected: Expected,
    experts: Mapping[ParamKey, str],
    data: bool,
    progress: Callable[[int], None],
) -> None:
    changed, facts.unstated = compare_crcs(facts.path, progress, None if data else [PICKLE])
    shard, trust = None, expected.files.trust
    if PICKLE not in changed and facts.rank is not None:
        shard = expected.shards.get(facts.rank) or read_shard(facts.path, trust)
    _report_changed(facts, changed, shard)
    if shard is not None and facts.rank is not None:
        _compare(facts, shard, facts.rank, expected)
        for text in _sum_up(facts, shard, facts.rank, expected, experts) if data else ():
            facts.report("not finite", f"{facts.name}: {text} are NaN or infinite.")
    elif PICKLE not in changed and (data or facts.path in expected.files.models.values()):
        content = read_torch_file(facts.path, trust)
        for name, tensor in _weights(content) if data else ():
            if tensor.dtype in _FLOATS and (count := examine_values(tensor)[1]):
                text = f"{facts.name}: {count:,} values of {name} are NaN or infinite."
                facts.report("not finite", text)


def _report_changed(facts: FileFacts, changed: list[str], shard: Shard | None) -> None:
    """Records that have another CRC-32 than the file states, by what they hold."""
    known: list[str] = []
    if changed and shard is not None:
        stated = stated_crcs(facts.path)
        for index in range(len(shard.options)):
            for state, tensor in _tensors(shard, index).items():
                bits = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                if bits.numel() and zlib.crc32(bits.numpy().data) not in stated:
                    known.append(f"{state} of {_group(shard, index)}")
    for number, record in enumerate(changed):
        plain = "its list of tensors" if record == PICKLE else "a part of it"
        what = known[number] if number < len(known) else f"{plain} ({record})"
        text = (
            f"{facts.name}: {what} has changed since it was saved (its bytes do not have the "
            "CRC-32 that the file states)."
        )
        facts.report("checksum", text)


def _compare(facts: FileFacts, shard: Shard, rank: Rank, expected: Expected) -> None:
    """Compare with the layout; take the groups' figures where that is possible."""
    facts.wrapper = shard.wrapper
    size = shard.data_parallel_size
    if size != expected.data_parallel_size:
        text = (
            f"{facts.name} was saved by a run of {size} data-parallel ranks, the checkpoint by "
            f"{expected.data_parallel_size}: it is left over from another save."
        )
        facts.report("content", text)
        return
    if rank not in expected.layout.order:
        return
    groups = expected.layout.of(rank)
    if expected.manifest is not None and not shard.holds(rank, groups):
        text = _difference(shard, rank, groups)
        facts.report("content", f"{facts.name} is not what the manifest says: {text}.")
        return
    for index, place in enumerate(expected.layout.order[rank]):
        states, step = shard.states(index), step_of_group(shard, index)
        options = readable_options(shard.options[index])
        said = {key: repr(value) for key, value in options.items() if key != "step"}
        said["the optimizer state"] = ", ".join(sorted(states)) or "nothing"
        step = 0.0 if step is None and not states else step
        tensors = _tensors(shard, index)
        numbytes = sum(tensor.nbytes for tensor in tensors.values())
        facts.groups.append(GroupFacts(place, said, step, numbytes))
        end = max((start + numel for _, start, numel in shard.fragments(index)), default=0)
        for state in (state for state in _partitions(shard, index) if tensors[state].numel() < end):
            text = (
                f"{facts.name}: {state} of {_group(shard, index)} has {tensors[state].numel()} "
                f"elements, its parameters need {end}."
            )
            facts.report("content", text)


def _difference(shard: Shard, rank: Rank, groups: list[FlatGroup]) -> str:
    """Where a shard is not what the layout says."""
    if len(shard.options) != len(groups):
        return f"it has {len(shard.options)} groups in place of {len(groups)}"
    for index, group in enumerate(groups):
        what = f"group {index} ({group.name!r})"
        size, found = shard.partition(index), shard.fragments(index)
        if size != group.partition:
            return f"its partition of {what} has {size} elements in place of {group.partition}"
        wanted = stated_fragments(group, rank.data, shard.reorders)
        for one, other in zip(found, wanted, strict=False):
            if one != other:
                return f"{what} holds {_words(one)} in place of {_words(other)}"
        if len(found) != len(wanted):
            return f"{what} holds {len(found)} parameters in place of {len(wanted)}"
    return "it disagrees with it"


def _words(fragment: Fragment) -> str:
    return f"{fragment.numel} elements of {fragment.name} from element {fragment.start} on"


def _group(shard: Shard, index: int) -> str:
    return f"group {index} ({str(shard.options[index].get('name', ''))!r})"


def _tensors(shard: Shard, index: int) -> dict[str, torch.Tensor]:
    """Master weights and optimizer state of a group, without counters."""
    found = {MASTER_NAME: shard.optimizer[MASTER][index], **shard.states(index)}
    return {n: t for n, t in found.items() if isinstance(t, torch.Tensor) and t.dim()}


def _partitions(shard: Shard, index: int) -> dict[str, torch.Tensor]:
    """Those that are as long as the group's partition."""
    found = _tensors(shard, index)
    lengths = (shard.partition(index), found[MASTER_NAME].numel())
    return {name: tensor for name, tensor in found.items() if tensor.numel() in lengths}


def _sum_up(
    facts: FileFacts,
    shard: Shard,
    rank: Rank,
    expected: Expected,
    experts: Mapping[ParamKey, str],
) -> Iterator[str]:
    """Take the norm of each parameter in the rank's partitions; yield what is not finite."""
    order = [group.index for group in facts.groups]
    for index in range(len(shard.options)):
        if order:  # with round_robin_gradients the file states the wrong places
            group = expected.layout.groups[order[index]]
            parts = [(p.param.name, p.start, p.numel) for p in fragments(group, rank.data)]
        else:
            parts = [(p.name, p.start, p.numel) for p in shard.fragments(index)]
        for state, tensor in _partitions(shard, index).items():
            flat = tensor.detach().flatten() if tensor.dtype in _FLOATS else tensor[:0]
            for name, start, numel in parts:
                values = flat[start:][:numel]  # less where files contradict
                if not values.numel():
                    continue
                square, broken = examine_values(values)
                key = order[index] if order else -1, name
                facts.squares.setdefault(key, Counter())[state] = square  # type: ignore[assignment]
                if broken:
                    which = f"{state} of {name}{experts.get(key, '')}"
                    yield f"{which}: {broken:,} of {values.numel():,} values"


def examine_values(values: torch.Tensor) -> tuple[float, int]:
    """The sum of the squares of a tensor, and the number of its NaN and infinite values.

    Goes through chunks of 1 MiB as float64.
    """
    square, broken = 0.0, 0
    for chunk in values.detach().flatten().split(_CHUNK):
        part = float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2
        if not part < float("inf"):
            broken += int((~chunk.isfinite()).sum())
        square += part
    return square, broken


def _weights(content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a file of weights by name, without buffers: a mask may be infinite."""
    module = content.get("module", content) if isinstance(content, Mapping) else None
    buffers = set(content.get("buffer_names") or ()) if isinstance(module, Mapping) else set()
    for name, tensor in module.items() if isinstance(module, Mapping) else ():
        if isinstance(tensor, torch.Tensor) and name not in buffers:
            yield str(name), tensor
