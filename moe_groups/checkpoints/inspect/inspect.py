"""What is in a checkpoint, and is it sound?"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, get_args

from moe_groups._common.arguments import FilePath, Positive, checked
from moe_groups._common.progress import Progress, ProgressSum, in_order
from moe_groups.checkpoints.expert_names import ExpertPlaces
from moe_groups.checkpoints.files import STATES, find_checkpoint
from moe_groups.checkpoints.inspect.agreement import RankAgreement
from moe_groups.checkpoints.inspect.examine import FileFacts, ParamKey, examine_file
from moe_groups.checkpoints.inspect.expected import Expected, check_latest, expect
from moe_groups.checkpoints.inspect.report import (
    MASTER_NAME,
    CheckpointReport,
    Problem,
    ProblemKind,
    SavedExpert,
    SavedGroup,
)
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout
from moe_groups.topology import ep_size_of

_KINDS: tuple[ProblemKind, ...] = get_args(ProblemKind)
_MOST_WORKERS = 8


@checked
def inspect_checkpoint(
    directory: FilePath,
    tag: str | None = None,
    *,
    data: bool = True,
    workers: Positive | None = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> CheckpointReport:
    """Groups, norms per expert, counters and damage of a checkpoint.

    For checkpoints of ZeRO-1, ZeRO-2 and BF16_Optimizer, with a manifest of this library
    (``moe_groups.json``) or without. Tensors stay in the files and are read in small chunks; each
    worker has the list of tensors of one file in memory (and all shards', where there is no
    manifest). No code of the checkpoint is run, and a file whose size is not that of the manifest
    is not read.

    Args:
        directory: as for ``load_checkpoint``, or the folder of a tag.
        tag: None for what the file ``latest`` says.
        data: read the tensors too, for norms, NaN and bits that changed. Without, only what the
            files say of themselves is read: seconds, for any size.
        workers: threads that read; None for one for each processor, at most 8.
        trust: read objects of any class, as DeepSpeed does when it loads, which can run any code of
            the checkpoint's author. Without, a file with such objects is "unreadable".
        progress: called with the bytes that were read and their total, from these threads.

    Raises:
        CheckpointError: there is no checkpoint, or it is of another wrapper. Damage is no
            error: it is in ``.problems`` of the report.
        InvalidArgumentError: ``workers`` is below 1.

    Example:
        >>> report = inspect_checkpoint("checkpoints")                    # doctest: +SKIP
        >>> [problem.text for problem in report.problems]                 # doctest: +SKIP
        []
    """
    expected = expect(find_checkpoint(directory, tag, trust))
    places = find_places(expected.layout)
    shards = {path: rank for rank, path in expected.files.shards.items()}
    weights = [*expected.files.models.values(), *expected.files.others()]
    paths = [path for path in [*shards, *weights] if path.name.endswith(STATES)]
    paths = [path for path in paths if path not in expected.unread]
    total = ProgressSum(progress, paths)
    experts = {k: f" (expert {p.expert})" for k, p in places.items() if p.expert is not None}
    agreement = RankAgreement(expected)
    squares: dict[Place, Counter[str]] = {place: Counter() for place in places.values()}
    found: list[FileFacts] = []
    workers = workers or min(_MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        calls = ((examine_file, p, shards.get(p), expected, experts, data, total) for p in paths)
        for facts in in_order(pool, calls, 2 * workers):
            if facts.rank is not None:
                agreement.take(facts.rank, facts)
            for key, sums in facts.squares.items() if facts.groups else ():
                squares[places[key]].update(sums)
            found.append(facts)
            facts.groups, facts.squares = [], {}
    total.finish()
    return _report(expected, data, found, agreement, places, squares)


def _report(
    expected: Expected,
    data: bool,
    found: list[FileFacts],
    agreement: RankAgreement,
    places: Mapping[ParamKey, "Place"],
    squares: Mapping["Place", Counter[str]],
) -> CheckpointReport:
    files, layout = expected.files, expected.layout
    latest = list(check_latest(files))
    problems = [problem for problem in latest if isinstance(problem, Problem)]
    problems += [*expected.problems, *(p for facts in found for p in facts.problems)]
    problems += agreement.problems()
    wrappers = [facts.wrapper for facts in found if facts.wrapper]
    if expected.manifest is not None:
        wrappers.insert(0, expected.manifest.wrapper)
    version = next((content.get("ds_version") for content in expected.engines.values()), None)
    versions = expected.said("versions", dict) or ({"deepspeed": version} if version else {})
    sizes = [path.stat().st_size for path in files.folder.rglob("*") if path.is_file()]
    steps = agreement.steps_of()
    return CheckpointReport(
        directory=str(files.directory),
        tag=files.tag,
        wrapper=next(iter(wrappers), "unknown"),
        manifest=expected.manifest is not None,
        data=data,
        data_parallel_size=expected.data_parallel_size,
        model_parallel_size=len({rank.model for rank in expected.ranks}),
        expert_parallel_sizes=tuple(
            sorted({ep_size_of(g.parallel_group) for g in layout.groups if g.parallel_group})
        ),
        optimizer_step=agreement.step,
        global_steps=expected.steps,
        versions={str(name): str(value) for name, value in versions.items()},
        files=len(sizes),
        bytes=sum(sizes),
        groups=tuple(
            _saved_group(
                group,
                [places[index, param.name] for param in group.params],
                agreement.sizes[index],
                steps.get(index),
            )
            for index, group in enumerate(layout.groups)
        ),
        experts=_expert_rows(layout, places, squares),
        notes=(
            *(note for note in latest if isinstance(note, str)),
            *_notes(expected, agreement, sum(facts.unstated for facts in found)),
        ),
        problems=tuple(sorted(dict.fromkeys(problems), key=lambda p: _KINDS.index(p.kind))),
    )


def _notes(expected: Expected, agreement: RankAgreement, unstated: int) -> Iterator[str]:
    if unstated:
        yield f"{unstated:,} records state no CRC-32, so nothing shows whether they changed"
    lost = expected.ranks - agreement.files.keys()
    if lost and expected.layout.groups:
        yield (
            f"figures are without the optimizer states of {len(lost)} of {len(expected.ranks)} "
            "ranks, which are missing or damaged"
        )
    elif lost:
        yield "no groups are shown: without a manifest, they are read from the files of all ranks"
    steps, counted = expected.steps, agreement.step
    skipped = expected.counted("skipped_steps") or 0
    if steps is not None and counted is not None and counted + skipped != steps:
        more = f", {skipped} of them skipped" if skipped else ""
        yield f"the optimizer counts {counted:g} steps, the engine {steps}{more}"


# ---- layers and experts ---------------------------------------------------------------


class Place(NamedTuple):
    """Where parameters belong that are reported in one line; see :class:`SavedExpert`."""

    model_rank: int
    layer: str | None = None
    expert: int | None = None
    ep_rank: int | None = None


def find_places(layout: Layout) -> dict[ParamKey, Place]:
    """The place of each parameter, by group and name.

    Where the layout has no number of an expert, as without a manifest, it follows from the
    number on the rank: all ranks hold equally many experts of a layer.
    """
    found: dict[ParamKey, Place] = {}
    for model in layout.model_ranks:
        own = [(i, group) for i, group in enumerate(layout.groups) if group.model_rank == model]
        dense = [param for _, group in own if not group.parallel_group for param in group.params]
        moe = [(i, g, param) for i, g in own if g.parallel_group for param in g.params]
        found |= {(i, param.name): Place(model) for i, group in own for param in group.params}
        names = ExpertPlaces(dense, [param for _, _, param in moe])
        local = [_on_the_rank(names, group, param) for _, group, param in moe]
        most: Counter[tuple[str | None, str]] = Counter()
        for (layer, number), (_, group, _) in zip(local, moe, strict=True):
            key = group.parallel_group, layer
            most[key] = max(most[key], 0 if number is None else number + 1)
        for (layer, number), (index, group, param) in zip(local, moe, strict=True):
            ep_rank = 0 if ep_size_of(group.parallel_group) == 1 else group.ep_rank
            expert = param.expert
            if expert is None and number is not None and ep_rank is not None:
                expert = ep_rank * most[group.parallel_group, layer] + number
            found[index, param.name] = Place(model, layer, expert, ep_rank)
    return found


def _on_the_rank(names: ExpertPlaces, group: FlatGroup, param: FlatParam) -> tuple[str, int | None]:
    """Layer of an expert parameter, and number among the rank's experts of the layer."""
    named = names.of(param.name)
    layer = group.labels.get("expert_group_name") or (named and named.layer)
    number = group.labels.get("expert_number")
    number = named.number if number is None and named else number
    return str(layer or group.parallel_group), number


def _saved_group(
    group: FlatGroup, places: list[Place], numbytes: int, step: float | None
) -> SavedGroup:
    layers = {place.layer for place in places}
    return SavedGroup(
        name=group.name,
        key=group.parallel_group,
        layer=layers.pop() if len(layers) == 1 else None,
        experts=tuple(sorted({p.expert for p in places if p.expert is not None})),
        ep_rank=group.ep_rank,
        model_rank=group.model_rank,
        ranks=group.ranks,
        parameters=len(group.params),
        elements=sum(param.numel for param in group.params),
        options=group.options,
        state_bytes=numbytes,
        step=step,
    )


def _expert_rows(
    layout: Layout, places: Mapping[ParamKey, Place], squares: Mapping[Place, Counter[str]]
) -> tuple[SavedExpert, ...]:
    """A row for each place: dense parameters first, then layer by layer."""
    sizes: dict[Place, list[int]] = {}
    for index, group in enumerate(layout.groups):
        for param in group.params:
            sizes.setdefault(places[index, param.name], []).append(param.numel)
    layers = {layer: order for order, layer in enumerate({place.layer: 0 for place in sizes})}

    def order(place: Place) -> tuple[Any, ...]:
        numbers = (-1 if number is None else number for number in (place.expert, place.ep_rank))
        return place.layer is not None, place.model_rank, layers[place.layer], *numbers

    return tuple(
        SavedExpert(
            layer=place.layer,
            expert=place.expert,
            ep_rank=place.ep_rank,
            model_rank=place.model_rank,
            parameters=len(sizes[place]),
            elements=sum(sizes[place]),
            norms={
                state: squares[place][state] ** 0.5
                for state in sorted(squares[place], key=lambda s: (s != MASTER_NAME, s))
            },
        )
        for place in sorted(sizes, key=order)
    )
