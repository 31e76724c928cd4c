"""What :func:`moe_groups.estimate_step_memory` returns: figures, and how they are shown."""

from dataclasses import dataclass, field

from moe_groups.step_config import StepConfig
from moe_groups.units import show_bytes


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """One group's part.

    Attributes:
        name: the group's name.
        elements: of all its parameters, without padding.
        ranks: ranks that share it.
        partition: elements of one rank's partition, padding included.
        held: bytes of gradients that the worst rank holds for it when the step begins.
        peak: bytes above the floor while it is stepped, worst rank.
    """

    name: str
    elements: int
    ranks: int
    partition: int
    held: int
    peak: int


@dataclass(frozen=True, slots=True)
class StepMemory:
    """What :func:`estimate_step_memory` returns; bytes, of the worst rank unless said.

    Attributes:
        transient: T, allocated on top of what is there when the step begins.
        held: R, gradients that are there when it begins and gone when it ends.
        step_peak: T + R, the peak above what stays.
        first_step_peak: the same in the first step, with the optimizer's state created in it.
        phase: what sets the peak.
        group: name of the group that sets it.
        worst_rank: in the data-parallel world, or of it times ``step.tensor_ranks``.
        least: step peak of the rank that needs least.
        resident: what stays between steps, by kind.
        host: the same on the host, where the optimizer is offloaded.
        groups: one row for each group, in order.
        step: how the model is stepped.
        data_parallel_size: ranks of the data-parallel world.
        rank_peaks: step peak of each of these ranks.
    """

    transient: int
    held: int
    step_peak: int
    first_step_peak: int
    phase: str
    group: str
    worst_rank: int
    least: int
    resident: dict[str, int]
    host: dict[str, int]
    groups: list[GroupMemory]
    step: StepConfig
    data_parallel_size: int
    rank_peaks: list[int] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        rest = ", ".join(f"{kind} {show_bytes(size)}" for kind, size in self.resident.items())
        lines = [
            f"step peak T + R   {show_bytes(self.step_peak):>10}   on the worst of "
            f"{len(self.rank_peaks)} ranks (rank {self.worst_rank}; the least needs "
            f"{show_bytes(self.least)})",
            f"  T, transient    {show_bytes(self.transient):>10}   set by: {self.phase}"
            + (f", {self.group}" if self.group else ""),
            f"  R, gradients    {show_bytes(self.held):>10}   held when the step begins",
            f"first step        {show_bytes(self.first_step_peak):>10}   creates optimizer state",
            f"resident          {show_bytes(sum(self.resident.values())):>10}   {rest}",
        ]
        if self.host:
            host = ", ".join(f"{kind} {show_bytes(size)}" for kind, size in self.host.items())
            lines.append(f"on the host       {show_bytes(sum(self.host.values())):>10}   {host}")
        return "\n".join([f"{len(self.groups)} groups, {self.step.label}", *lines])
