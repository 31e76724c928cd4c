"""What :func:`moe_groups.inspect_checkpoint` returns."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from moe_groups._common.arguments import checked
from moe_groups._common.text import show_bytes

ProblemKind: TypeAlias = Literal[
    "unfinished",
    "latest",
    "manifest",
    "missing",
    "extra",
    "size",
    "unreadable",
    "checksum",
    "content",
    "step",
    "not finite",
]
"""What can be wrong, in the order in which a report lists it."""

MASTER_NAME = "fp32"
"""What norms of the master weights are called, beside the optimizer's own names."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint.

    Attributes:
        kind: "unfinished" (the save was stopped), "latest" (names no checkpoint), "manifest"
            (damaged), "missing" and "extra" files, "size" (not that at the save: the file was not
            read), "unreadable" (cut off, damaged, or with objects of unknown classes), "checksum"
            (bytes changed since the save), "content" (files contradict each other), "step"
            (counters do), "not finite" (NaN or infinite values).
        file: the file, relative to the folder of the tag.
        text: a sentence that names file, rank, group and parameter.
    """

    kind: ProblemKind
    file: str
    text: str


@dataclass(frozen=True, slots=True)
class SavedGroup:
    """One optimizer group of a checkpoint.

    Attributes:
        name: of the group; ranks with other experts have a group of the same name.
        key: ``ep_size_<N>`` for experts, None for dense parameters.
        layer: the MoE layer, None where the group is not one layer's.
        experts: numbers of its experts over all ranks, as far as known.
        ep_rank: place in the expert-parallel group; None for dense groups and where not known.
        model_rank: model-parallel rank.
        ranks: data-parallel ranks that share it.
        parameters: their number.
        elements: their number, without padding.
        options: learning rate, weight decay and so on.
        state_bytes: master weights and optimizer state in the files of all ranks, with padding.
        step: what its counter says; None where it has none, or where ranks differ.
    """

    name: str
    key: str | None
    layer: str | None
    experts: tuple[int, ...]
    ep_rank: int | None
    model_rank: int
    ranks: tuple[int, ...]
    parameters: int
    elements: int
    options: Mapping[str, Any]
    state_bytes: int
    step: float | None


@dataclass(frozen=True, slots=True)
class SavedExpert:
    """What is saved of one expert, or of all dense parameters together.

    Attributes:
        layer: the MoE layer; None for dense parameters.
        expert: its number over all ranks; None for dense parameters, for experts that are one
            tensor, and where the files do not say it.
        ep_rank: place of the ranks that have it in the expert-parallel group.
        model_rank: model-parallel rank.
        parameters: their number.
        elements: their number.
        norms: L2 norm of the master weights (``"fp32"``) and of each optimizer state of their
            size, such as ``exp_avg``; NaN where a value is. Empty where tensors were not read.
    """

    layer: str | None
    expert: int | None
    ep_rank: int | None
    model_rank: int
    parameters: int
    elements: int
    norms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint as :func:`moe_groups.inspect_checkpoint` found it.

    Attributes:
        directory: where the tag's folder is.
        tag: name of that folder.
        wrapper: "ZeRO-1", "ZeRO-2" or "BF16_Optimizer"; "unknown" where nothing could be read.
        manifest: is there a usable ``moe_groups.json``?
        data: were the tensors' bytes read?
        data_parallel_size: ranks of the run.
        model_parallel_size: likewise.
        expert_parallel_sizes: of its experts, ascending; empty without experts.
        optimizer_step: what most groups count; None without counters.
        global_steps: what the engine counted; None where no file says.
        versions: of the libraries that saved it, as far as known.
        files: how many there are.
        bytes: of all of them.
        groups: in the order of the optimizer, rank by rank, each once.
        experts: dense parameters first, then by layer and number.
        notes: what is worth knowing and not wrong.
        problems: what is wrong; empty for a sound checkpoint.

    Example:
        >>> report = inspect_checkpoint("checkpoints")                    # doctest: +SKIP
        >>> print(report)                                                 # doctest: +SKIP
        checkpoints (global_step2): ZeRO-2, step 2, DP 4, EP 2, 9 groups, 13 files of 164 KiB
        no problems
    """

    directory: str
    tag: str
    wrapper: str
    manifest: bool
    data: bool
    data_parallel_size: int
    model_parallel_size: int
    expert_parallel_sizes: tuple[int, ...]
    optimizer_step: float | None
    global_steps: int | None
    versions: Mapping[str, str]
    files: int
    bytes: int
    groups: tuple[SavedGroup, ...]
    experts: tuple[SavedExpert, ...]
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = field(default=())

    def __str__(self) -> str:
        return "\n".join([self.headline(), self.verdict(), *self.lines()])

    def headline(self) -> str:
        """Wrapper, step, world and size in a line."""
        step = self.optimizer_step if self.global_steps is None else self.global_steps
        parts = [self.wrapper] + ([] if step is None else [f"step {step:g}"])
        parts.append(f"DP {self.data_parallel_size}")
        if self.expert_parallel_sizes:
            parts.append("EP " + " and ".join(map(str, self.expert_parallel_sizes)))
        if self.model_parallel_size > 1:
            parts.append(f"{self.model_parallel_size} model-parallel ranks")
        parts.append(f"{len(self.groups):,} groups")
        parts.append(f"{self.files:,} files of {show_bytes(self.bytes)}")
        return f"{self.directory} ({self.tag}): " + ", ".join(parts)

    def verdict(self) -> str:
        """How many problems there are."""
        if self.problems:
            return f"{len(self.problems):,} problem{'s' * (len(self.problems) > 1)}:"
        return "no problems" + ("" if self.data else " (tensors were not read)")

    @checked
    def lines(self, most: int | None = 20) -> list[str]:
        """The problems' sentences, not more than ``most``."""
        shown = [f"  {problem.text}" for problem in self.problems[:most]]
        rest = len(self.problems) - len(shown)
        return shown + ([f"  ... and {rest:,} more"] if rest else [])

    def as_json(self) -> str:
        """All of it as one JSON object; norms that are NaN or infinite are null."""
        return json.dumps(_plain(asdict(self)), indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
