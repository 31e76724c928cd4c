"""What DeepSpeed loads by the position of groups beside optimizer states: values of schedulers, and
the groups of universal checkpoints. And tags that are not there.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_groups import create_moe_param_groups, protect_checkpoints
from moe_groups._deepspeed.engines import stepped_groups
from moe_groups.errors import CheckpointError, CheckpointMismatchError, CheckpointWarning
from tests.support.checkpoints.guard_runs import collected, options_of, to_universal
from tests.support.ranks import run_on_ranks
from tests.support.training import GroupsOf, largest_difference, start, train, weights

ROUTER = ("*.gate.*", {"lr": 1e-5})


def groups(split: str, *overrides: tuple[str, dict[str, float]]) -> GroupsOf:
    """Groups with a rate of their own each."""
    return lambda model: create_moe_param_groups(model, split_by=split, overrides=list(overrides))  # type: ignore[arg-type]


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)


def rates(engine: Any) -> dict[str, float]:
    """The learning rate that each parameter is stepped with, by name."""
    names = {id(param): name for name, param in engine.module.named_parameters()}
    stepped = stepped_groups(engine)
    return {names[id(param)]: group["lr"] for group, members in stepped for param in members}


def schedule_into_other_groups(wrapper: str, folder: Path, states: bool) -> list[Any]:
    """What a load without conversion says, and the rates after one with."""
    first = start(wrapper, groups("expert", ROUTER), lr_scheduler=halved)
    train(first, 3)
    mine = {"mine": first.lr_scheduler.state_dict()}
    first.save_checkpoint(str(folder), tag="saved", client_state=mine)
    expected = rates(first)

    def other(scheduler: Any = halved) -> Any:
        # As many groups as before, and others.
        split = groups("parallel_group", ("inp.*", {}), ROUTER)
        return start(wrapper, split, lr_scheduler=scheduler)

    outcomes: list[Any] = []
    first, without = other(), other(None)  # whose caller steps the one in the client state
    before = weights(first)
    own = {"load_lr_scheduler_states": False}
    for engine, options in ((first, {}), (without, {}), (without, own), (first, own)):
        try:
            engine.load_checkpoint(
                str(folder), tag="saved", load_optimizer_states=states, **options
            )
            outcomes.append("loaded")
        except CheckpointMismatchError:
            outcomes.append("refused")
            assert largest_difference(weights(engine), before) == 0
    engine = other()
    protect_checkpoints(engine, regroup="auto")
    try:
        engine.load_checkpoint(str(folder), tag="saved", load_optimizer_states=states)
        outcomes.append(engine.lr_scheduler.last_epoch == 3)
        # Without optimizer states the groups get their rates in the next step.
        assert not states or rates(engine) == expected
        train(engine, 1)
        outcomes.append(rates(engine) == {name: lr / 2 for name, lr in expected.items()})
    except CheckpointMismatchError as error:  # without ZeRO
        outcomes.append(str(error).splitlines()[-1].partition(";")[0])
    return outcomes


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("wrapper", ["zero2", "bf16", "fp32"])
def test_schedules_follow_the_groups(wrapper: str, states: bool, tmp_path: Path) -> None:
    wanted: list[Any] = ["refused"] * 2 + ["refused" if states else "loaded"] * 2
    wanted += (
        ["Nothing was loaded. Converting does not help"] if wrapper == "fp32" else [True, True]
    )
    found = run_on_ranks(2, schedule_into_other_groups, wrapper, tmp_path, states)
    assert found == [wanted] * 2


def universal(wrapper: str, folder: Path) -> list[Any]:
    """Load a universal checkpoint into more groups, into as many others, and into the same."""
    options = {"ep_size": 1}
    first = start(wrapper, groups("module", ROUTER), model_options=options)
    train(first, 3)
    first.save_checkpoint(str(folder / "saved"), tag="t")
    saved = weights(first)
    to_universal(folder)

    def load(split: str, tag: str | None = None, **rates_of: float) -> Any:
        overrides = [("*.gate.*", dict(rates_of))] if rates_of else []
        cfg: dict[str, Any] = {"checkpoint": {"load_universal": True}}
        engine = start(wrapper, groups(split, *overrides), model_options=options, **cfg)
        own = options_of(engine)
        before = weights(engine)
        try:
            engine.load_checkpoint(str(folder / "universal"), tag=tag)
        except CheckpointError as error:
            assert largest_difference(weights(engine), before) == 0
            return str(error)
        assert largest_difference(weights(engine), saved) == 0
        return options_of(engine) == own

    with pytest.warns(CheckpointWarning, match="keep the options"):
        fewer = load("parallel_group", lr=1e-4)
    return [load("expert", lr=1e-5), load("module", tag="absent"), fewer, load("module", lr=1e-5)]


@pytest.mark.long
@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "bf16"])
def test_universal_checkpoints(wrapper: str, tmp_path: Path) -> None:
    for more, absent, fewer, same in run_on_ranks(2, universal, wrapper, tmp_path):
        assert "it has 5 groups, the run has 11" in more
        assert "has no checkpoint 'absent': its checkpoints are 't'" in absent
        assert fewer is True
        assert same is True


def absent_tags(folder: Path) -> list[str]:
    engine = start("zero1", groups("module"))
    engine.save_checkpoint(str(folder), tag="step1")
    engine.save_checkpoint(str(folder), tag="step2")
    outcomes = []
    for options in ({"tag": "step3"}, {"tag": "step3", "load_module_only": True}):
        with pytest.raises(CheckpointError) as caught:
            engine.load_checkpoint(str(folder), **options)
        outcomes.append(str(caught.value))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / "latest").write_text("gone")
    torch.distributed.barrier()
    with pytest.raises(CheckpointError) as caught:
        engine.load_checkpoint(str(folder))
    with collected() as warned:
        assert engine.load_checkpoint(str(folder / "empty")) == (None, None)
    first = torch.distributed.get_rank() == 0
    assert [text.split(":")[0] for text, _ in warned] == [
        f"{folder}/empty has no file latest"
    ] * first
    return [*outcomes, str(caught.value)]


def test_a_tag_that_is_not_there(tmp_path: Path) -> None:
    for *given, latest in run_on_ranks(2, absent_tags, tmp_path):
        for outcomes in given:
            assert "no checkpoint 'step3': its checkpoints are 'step2', 'step1'." in outcomes
        assert "no checkpoint 'gone'" in latest
