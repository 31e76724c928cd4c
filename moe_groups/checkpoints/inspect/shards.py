"""Is one rank's optimizer state sound, and what is in it?"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from moe_groups.checkpoints.inspect.agreement import GroupFacts, ShardFacts
from moe_groups.checkpoints.inspect.expected import Expected
from moe_groups.checkpoints.inspect.experts import ParamKey, Place
from moe_groups.checkpoints.inspect.figures import (
    FLOATS,
    changed_tensors,
    changed_text,
    examine_values,
)
from moe_groups.checkpoints.inspect.report import MASTER_NAME, unreadable
from moe_groups.checkpoints.layout import FlatGroup, Rank, fragments, readable_options
from moe_groups.checkpoints.shard import (
    MASTER,
    Fragment,
    Shard,
    read_shard,
    stated_fragments,
    step_of_group,
)
from moe_groups.checkpoints.torch_file import DAMAGE, PICKLE, compare_crcs
from moe_groups.errors import CheckpointError


def examine_shard(
    path: Path,
    rank: Rank,
    expected: Expected,
    places: dict[ParamKey, Place],
    data: bool,
    progress: Callable[[int], None],
) -> ShardFacts:
    """Check one file; whatever is wrong with it becomes a problem.

    Args:
        path: the file.
        rank: whose it is.
        expected: what ought to be in it.
        places: of the parameters, to name experts.
        data: read the tensors too.
        progress: is told how many bytes were read.
    """
    facts = ShardFacts(rank, path.name)
    try:
        shard = None
        if compare_crcs(path, names=[PICKLE]).changed:
            facts.report("checksum", changed_text(path.name, PICKLE))
        else:
            shard = read_shard(path)
            _examine_content(facts, shard, expected)
        if data:
            _compare_data(facts, path, shard, progress)
        if data and shard is not None and facts.groups:
            _examine_data(facts, shard, expected.layout.of(rank), places)
    except (CheckpointError, *DAMAGE) as error:
        facts.problems.append(unreadable(path, path.name, error))
    return facts


def _examine_content(facts: ShardFacts, shard: Shard, expected: Expected) -> None:
    """Compare with the layout; take the groups' figures where that is possible."""
    facts.wrapper = shard.wrapper
    size, rank = shard.data_parallel_size, facts.rank
    if size != expected.data_parallel_size:
        facts.report(
            "content",
            f"{facts.name} was saved by a run of {size} data-parallel ranks, the checkpoint by "
            f"{expected.data_parallel_size}: it is left over from another save.",
        )
        return
    if rank not in expected.layout.order:
        return
    groups = expected.layout.of(rank)
    if expected.manifest is not None and (text := _difference(shard, rank, groups)):
        facts.report("content", f"{facts.name} is not what the manifest says: {text}.")
        return
    for index, place in enumerate(expected.layout.order[rank]):
        facts.groups.append(
            GroupFacts(
                index=place,
                options=readable_options(shard.options[index]),
                states=tuple(sorted(shard.states(index))),
                step=_step(shard, index),
                size=_state_bytes(shard, index),
            )
        )
        for text in _too_short(shard, index):
            facts.report("content", f"{facts.name}: {text}.")


def _difference(shard: Shard, rank: Rank, groups: list[FlatGroup]) -> str | None:
    """Where a shard is not what the layout says."""
    if shard.holds(rank, groups):
        return None
    if len(shard.options) != len(groups):
        return f"it has {len(shard.options)} groups in place of {len(groups)}"
    for index, group in enumerate(groups):
        what = f"group {index} ({group.name!r})"
        if shard.partition(index) != group.partition:
            return (
                f"its partition of {what} has {shard.partition(index)} elements in place of "
                f"{group.partition}"
            )
        said = stated_fragments(group, rank.data, shard.reorders)
        for found, wanted in zip(shard.fragments(index), said, strict=False):
            if found != wanted:
                return f"{what} holds {_named(found)} in place of {_named(wanted)}"
        if len(shard.fragments(index)) != len(said):
            return f"{what} holds {len(shard.fragments(index))} parameters in place of {len(said)}"
    return "it disagrees with it"


def _named(fragment: Fragment) -> str:
    return f"{fragment.numel} elements of {fragment.name} from element {fragment.start} on"


def _step(shard: Shard, index: int) -> float | None:
    step = step_of_group(shard, index)
    return 0.0 if step is None and not shard.states(index) else step


def _tensors(shard: Shard, index: int) -> dict[str, torch.Tensor]:
    """Master weights and optimizer state of a group, without counters."""
    found = {MASTER_NAME: shard.optimizer[MASTER][index], **shard.states(index)}
    return {n: t for n, t in found.items() if isinstance(t, torch.Tensor) and t.dim()}


def _state_bytes(shard: Shard, index: int) -> int:
    return sum(tensor.nbytes for tensor in _tensors(shard, index).values())


def _partitions(shard: Shard, index: int) -> dict[str, torch.Tensor]:
    """Those that are as long as the group's partition."""
    found = _tensors(shard, index)
    lengths = (shard.partition(index), found[MASTER_NAME].numel())
    return {name: tensor for name, tensor in found.items() if tensor.numel() in lengths}


def _too_short(shard: Shard, index: int) -> Iterator[str]:
    end = max((start + numel for _, start, numel in shard.fragments(index)), default=0)
    for state, tensor in _partitions(shard, index).items():
        if tensor.numel() < end:
            name = str(shard.options[index].get("name", ""))
            yield (
                f"{state} of group {index} ({name!r}) has {tensor.numel()} elements, its "
                f"parameters need {end}"
            )


def _compare_data(
    facts: ShardFacts, path: Path, shard: Shard | None, progress: Callable[[int], None]
) -> None:
    """Compare all records with their CRC-32; name the tensors that have changed."""
    changed, facts.unstated = compare_crcs(path, progress)
    changed = [record for record in changed if record != PICKLE]
    named: list[str | None] = []
    if changed and shard is not None:
        tensors = {
            f"{state} of group {index} ({str(options.get('name', ''))!r})": value
            for index, options in enumerate(shard.options)
            for state, value in (
                (MASTER_NAME, shard.optimizer[MASTER][index]),
                *shard.states(index).items(),
            )
            if isinstance(value, torch.Tensor)
        }
        named = [*changed_tensors(path, tensors)]
    named += [None] * (len(changed) - len(named))
    for record, what in zip(changed, named, strict=False):
        facts.report("checksum", changed_text(path.name, record, what))


def _examine_data(
    facts: ShardFacts, shard: Shard, groups: list[FlatGroup], places: dict[ParamKey, Place]
) -> None:
    """Norms of each parameter in the rank's partitions, and what of it is not finite."""
    for index, group in enumerate(groups):
        for state, tensor in _partitions(shard, index).items():
            if tensor.dtype not in FLOATS:
                continue
            flat = tensor.detach().flatten()
            # with round_robin_gradients the file states the wrong places
            for piece in fragments(group, facts.rank.data):
                values = flat[piece.start :][: piece.numel]  # less where files contradict
                if not values.numel():
                    continue
                square, broken = examine_values(values)
                key = facts.groups[index].index, piece.param.name
                facts.squares.setdefault(key, {})[state] = square
                if broken:
                    expert = places[key].expert
                    which = "" if expert is None else f" (expert {expert})"
                    facts.report(
                        "not finite",
                        f"{facts.name}: {state} of {piece.param.name}{which}: {broken:,} of "
                        f"{values.numel():,} values are NaN or infinite.",
                    )
