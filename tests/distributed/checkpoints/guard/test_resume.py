"""Save, load in fresh processes, go on: equal bit for bit to the run that never stopped."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moe_groups import verify
from tests.support.old_deepspeed import can_resume
from tests.support.pairwise import pairwise
from tests.support.ranks import run_in_fresh_processes, run_on_ranks
from tests.support.training import groups_by, largest_difference, start, train, weights

BEFORE, AFTER = 3, 3  # steps


class Case(NamedTuple):
    wrapper: str
    ep_size: int
    split: str
    cap: int | None = None
    layers: int = 2

    def engine(self, **options: Any) -> Any:
        options |= {"ep_size": self.ep_size, "layers": self.layers}
        return start(self.wrapper, groups_by(self.split, self.cap), model_options=options)


def save_and_go_on(cases: list[Case], folder: Path) -> None:
    """Train, save, train on; what came out is left in ``folder``."""
    rank = torch.distributed.get_rank()
    for number, case in enumerate(cases):
        engine = case.engine()
        train(engine, BEFORE)
        engine.save_checkpoint(str(folder / str(number)))
        saved = weights(engine)
        history = train(engine, AFTER, first=BEFORE)
        torch.save((saved, history, weights(engine)), folder / f"{number}-{rank}.pt")


def load_and_go_on(cases: list[Case], folder: Path) -> list[str]:
    """Train on from each checkpoint; what differs from the run that never stopped."""
    problems = []
    for number, case in enumerate(cases):
        engine = case.engine()
        problems += load(engine, number, case, folder)
        verify(engine)
    return problems


def load(engine: Any, number: int, case: Case, folder: Path) -> list[str]:
    saved, history, end = torch.load(folder / f"{number}-{torch.distributed.get_rank()}.pt")
    assert largest_difference(weights(engine), saved) > 1e-3, "nothing to load"
    path, _ = engine.load_checkpoint(str(folder / str(number)))
    assert path is not None
    problems = []
    if largest_difference(weights(engine), saved) != 0:
        problems.append(f"{case}: other weights than were saved")
    resumed = train(engine, AFTER, first=BEFORE)
    if resumed != history:
        problems.append(f"{case}: {resumed} instead of {history}")
    if largest_difference(weights(engine), end) != 0:
        problems.append(f"{case}: other weights at the end")
    return problems


def check(world: int, cases: list[Case], folder: Path) -> None:
    run_on_ranks(world, save_and_go_on, cases, folder, timeout=300)
    problems = run_in_fresh_processes(world, load_and_go_on, cases, folder, timeout=300)
    assert problems == [[]] * world


ROWS = pairwise(
    {
        "world": [2, 4],
        "wrapper": ["zero1", "zero2", "zero2_fp32_grads", "bf16", "half"],
        "ep_size": [1, 2],
        "split": ["parallel_group", "module", "expert"],
        "cap": [None, 400],
    }
)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])
def test_resume_equals_the_run_that_never_stopped(world: int, tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "world"} for row in ROWS]
    cases = [Case(**row) for row, whole in zip(rows, ROWS, strict=True) if whole["world"] == world]
    check(world, [case for case in cases if can_resume(case.wrapper)], tmp_path)


def load_into_renamed_layer(cases: list[Case], folder: Path) -> list[str]:
    """The checkpoint has the group names of a layer that this model calls otherwise."""
    problems = []
    for number, case in enumerate(cases):
        engine = case.engine(expert_group_name="renamed")
        problems += load(engine, number, case, folder)
        names = [group["name"] for group in engine.optimizer.param_groups]
        if "ep_size_2_renamed.expert.0" not in names:
            problems.append(f"{case}: {names}, not those of the run")
    return problems


def test_resume_after_a_layer_was_renamed(tmp_path: Path) -> None:
    wrappers = filter(can_resume, ("zero1", "bf16", "half"))
    cases = [Case(wrapper, 2, "expert", layers=1) for wrapper in wrappers]
    run_on_ranks(2, save_and_go_on, cases, tmp_path)
    assert run_in_fresh_processes(2, load_into_renamed_layer, cases, tmp_path) == [[], []]
