"""``compact_gradients``: trains the same bit for bit, and holds exactly the partitions."""

from typing import Any, NamedTuple

import pytest
import torch

from moe_groups.compact import compact_gradients
from tests.ranks import run_on_ranks
from tests.training import groups_by, start, train

Snapshot = dict[str, torch.Tensor]


class Case(NamedTuple):
    """One run with, and one without compact gradients.

    Attributes:
        split: of the groups, as in :func:`tests.training.make_groups`.
        accumulate: micro-batches in a step.
        changes: of DeepSpeed's config, as pairs.
    """

    wrapper: str = "zero2"
    split: str = "expert"
    ep_size: int = 2
    accumulate: int = 1
    changes: tuple[tuple[str, Any], ...] = ()
    cap: int | None = None

    def engine(self, compact: bool) -> Any:
        engine = start(
            self.wrapper,
            groups_by(self.split, self.cap),
            model_options={"ep_size": self.ep_size},
            gradient_accumulation_steps=self.accumulate,
            **dict(self.changes),
        )
        if compact:
            compact_gradients(engine)
        return engine


def snapshot(engine: Any) -> Snapshot:
    """All that a run made on this rank: parameters, master weights and optimizer state."""
    optimizer = engine.optimizer
    found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        found[f"master {index}"] = master.detach().clone()
        for key, value in optimizer.state[master].items():
            found[f"{key} {index}"] = torch.as_tensor(value).clone()
    return found


def differences(a: Snapshot, b: Snapshot) -> list[str]:
    assert list(a) == list(b)
    assert any(name.startswith("exp_avg_sq") for name in a)
    return [name for name in a if not torch.equal(a[name], b[name])]


def against_plain(cases: list[Case], steps: int = 3) -> list[str]:
    """What differs between runs with and without compact gradients."""
    problems = []
    for case in cases:
        runs = []
        for compact in (False, True):
            engine = case.engine(compact)
            runs.append((train(engine, steps * case.accumulate), snapshot(engine)))
        (plain, end), (compacted, compacted_end) = runs
        if plain != compacted:
            problems.append(f"{case}: {compacted} instead of {plain}")
        if found := differences(end, compacted_end):
            problems.append(f"{case}: {found} differ")
    return problems


def check(world: int, cases: list[Case]) -> None:
    assert run_on_ranks(world, against_plain, cases, timeout=300) == [[]] * world


@pytest.mark.parametrize("world", [1, 2, 4])
def test_trains_the_same(world: int) -> None:
    ep_size = min(world, 2)
    check(
        world,
        [
            Case(wrapper, split, ep_size, accumulate)
            for wrapper in ("zero1", "zero2")
            for split, accumulate in (("expert", 1), ("expert", 4), ("module", 4), ("stock", 1))
        ],
    )
