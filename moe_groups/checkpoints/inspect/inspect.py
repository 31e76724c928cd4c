"""What is in a checkpoint, and is it sound?"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

from moe_groups._common.arguments import FilePath, Positive, checked
from moe_groups._common.progress import Progress, ProgressSum, in_order
from moe_groups.checkpoints.files import STATES, CheckpointFiles, find_checkpoint
from moe_groups.checkpoints.inspect.agreement import RankAgreement, ShardFacts
from moe_groups.checkpoints.inspect.expected import Expected, expected_layout
from moe_groups.checkpoints.inspect.experts import ParamKey, Place, expert_rows, find_places
from moe_groups.checkpoints.inspect.files import (
    check_finished,
    check_latest,
    check_presence,
    check_steps,
)
from moe_groups.checkpoints.inspect.report import CheckpointReport, Problem, ProblemKind, SavedGroup
from moe_groups.checkpoints.inspect.shards import examine_shard
from moe_groups.checkpoints.inspect.weights import EngineState, examine_engines, examine_file
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
    progress: Progress | None = None,
) -> CheckpointReport:
    """Groups, norms per expert, counters and damage of a checkpoint.

    For checkpoints of ZeRO-1, ZeRO-2 and BF16_Optimizer, with a manifest of this library
    (``moe_groups.json``) or without. Tensors stay in the files and are read in small chunks; each
    worker has the list of tensors of one file in memory (and all shards', where there is no
    manifest, until the groups are known). Files are unpickled, as when DeepSpeed loads them: only
    for checkpoints that you trust.

    Args:
        directory: as for ``load_checkpoint``, or the folder of a tag.
        tag: None for what the file ``latest`` says.
        data: read the tensors too, for norms, NaN and bits that changed. Without, only what the
            files say of themselves is read: seconds, whatever their size.
        workers: threads that read; None for one for each processor, at most 8.
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
    files = find_checkpoint(directory, tag)
    engines, problems = examine_engines(files)
    expected = expected_layout(files, engines)
    problems += [
        *check_finished(files),
        *expected.problems,
        *check_presence(files, expected, engines),
        *check_steps(files, expected, engines),
    ]
    inspection = _Inspection(files, expected, data, progress)
    inspection.run(workers or min(_MOST_WORKERS, os.cpu_count() or 1))
    return inspection.report(engines, problems)


class _Inspection:
    """Examines the files one after the other and adds up what is in them."""

    def __init__(
        self, files: CheckpointFiles, expected: Expected, data: bool, progress: Progress | None
    ) -> None:
        self.files, self.expected, self.data = files, expected, data
        self.shards = {r: path for r, path in files.shards.items() if r in expected.ranks}
        weights = [*files.models.values(), *files.others()]
        self.weights = [path for path in weights if path.name.endswith(STATES)]
        self.places: dict[ParamKey, Place] = find_places(expected.layout)
        self.agreement = RankAgreement(expected.layout)
        self.squares: dict[ParamKey, dict[str, float]] = {}
        self.problems: list[Problem] = []
        self.wrappers: dict[str, None] = {}
        self.unstated = 0
        self.progress = ProgressSum(progress, [*self.shards.values(), *self.weights])

    def run(self, workers: int) -> None:
        """Examine all files."""
        with ThreadPoolExecutor(workers) as pool:
            for result in in_order(pool, self._calls(), 2 * workers):
                if isinstance(result, ShardFacts):
                    self._take(result)
                else:
                    self.problems += result[0]
                    self.unstated += result[1]
        self.progress.finish()

    def _calls(self) -> Iterator[tuple[Any, ...]]:
        for rank, path in self.shards.items():
            yield examine_shard, path, rank, self.expected, self.places, self.data, self.progress
        for path in self.weights:
            name = str(path.relative_to(self.files.folder))
            yield examine_file, path, name, self.data, self.progress

    def _take(self, facts: ShardFacts) -> None:
        self.agreement.take(facts)
        self.problems += facts.problems
        self.unstated += facts.unstated
        if facts.wrapper is not None:
            self.wrappers[facts.wrapper] = None
        for key, states in facts.squares.items():
            sums = self.squares.setdefault(key, {})
            for state, square in states.items():
                sums[state] = sums.get(state, 0.0) + square

    def report(self, engines: Mapping[int, EngineState], found: list[Problem]) -> CheckpointReport:
        """Put everything together."""
        layout, manifest = self.expected.layout, self.expected.manifest
        steps = _engine_steps(self.expected, engines)
        latest, notes = check_latest(self.files)
        notes += self._notes(engines, steps)
        problems = [*latest, *found, *self.problems, *self.agreement.problems(steps)]
        sizes = [path.stat().st_size for path in self.files.folder.rglob("*") if path.is_file()]
        return CheckpointReport(
            directory=str(self.files.directory),
            tag=self.files.tag,
            wrapper=manifest.wrapper if manifest else next(iter(self.wrappers), "unknown"),
            manifest=manifest is not None,
            data=self.data,
            data_parallel_size=self.expected.data_parallel_size,
            model_parallel_size=len({rank.model for rank in self.expected.ranks}),
            expert_parallel_sizes=tuple(
                sorted({ep_size_of(g.parallel_group) for g in layout.groups if g.parallel_group})
            ),
            optimizer_step=self.agreement.step(steps),
            global_steps=steps,
            versions=_versions(self.expected, engines),
            files=len(sizes),
            bytes=sum(sizes),
            groups=self._groups(),
            experts=expert_rows(layout, self.places, self.squares),
            notes=tuple(notes),
            problems=_tidy(problems),
        )

    def _groups(self) -> tuple[SavedGroup, ...]:
        steps = self.agreement.steps_of()
        found = []
        for index, group in enumerate(self.expected.layout.groups):
            places = [self.places[index, param.name] for param in group.params]
            layers = {place.layer for place in places}
            found.append(
                SavedGroup(
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
                    state_bytes=self.agreement.sizes[index],
                    step=steps.get(index),
                )
            )
        return tuple(found)

    def _notes(self, engines: Mapping[int, EngineState], steps: int | None) -> list[str]:
        notes = []
        if self.unstated:
            notes.append(
                f"{self.unstated:,} records state no CRC-32: whether they changed cannot be told"
            )
        lost = sorted(self.expected.ranks - self.agreement.files.keys())
        if lost:
            notes.append(
                f"figures are without the optimizer states of {len(lost)} of "
                f"{len(self.expected.ranks)} ranks, which are missing or damaged"
            )
        counted = self.agreement.step(steps)
        skipped = next((engine.skipped_steps or 0 for engine in engines.values()), 0)
        if steps is not None and counted is not None and counted + skipped != steps:
            notes.append(
                f"the optimizer counts {counted:g} steps, the engine {steps}"
                + (f", {skipped} of them skipped" if skipped else "")
            )
        return notes


def _engine_steps(expected: Expected, engines: Mapping[int, EngineState]) -> int | None:
    known = [expected.said("step", int), *(engine.global_steps for engine in engines.values())]
    return next((step for step in known if step is not None), None)


def _versions(expected: Expected, engines: Mapping[int, EngineState]) -> dict[str, str]:
    said = expected.said("versions", dict)
    if said is not None:
        return {str(name): str(version) for name, version in said.items()}
    version = next((engine.version for engine in engines.values() if engine.version), None)
    return {} if version is None else {"deepspeed": version}


def _tidy(problems: list[Problem]) -> tuple[Problem, ...]:
    """Each once, by kind and file; a file that cannot be read with its size in one sentence."""
    lost = {problem.file for problem in problems if problem.kind == "unreadable"}
    sizes = {p.file: p.text for p in problems if p.kind == "size" and p.file in lost}
    found: dict[tuple[str, str, str], Problem] = {}
    for problem in problems:
        text = problem.text
        if problem.kind == "size" and problem.file in lost:
            continue
        if problem.kind == "unreadable" and problem.file in sizes:
            text = f"{text} It {sizes[problem.file].removeprefix(problem.file).lstrip()}"
        once = "" if problem.kind == "unreadable" else text
        key = problem.kind, problem.file, once
        found.setdefault(key, Problem(problem.kind, problem.file, text))
    return tuple(sorted(found.values(), key=lambda p: _KINDS.index(p.kind)))
