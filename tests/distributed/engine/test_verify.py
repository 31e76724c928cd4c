"""verify(engine): silent if all is well; every rank names what is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_groups import create_moe_param_groups, is_norm_or_bias, verify
from moe_groups.errors import InvalidArgumentError, VerificationError
from tests.support.models import HIDDEN
from tests.support.ranks import run_on_ranks
from tests.support.training import WRAPPERS, start, train

Groups = list[dict[str, Any]]
EP2 = {"ep_size": 2}
EXPERT_0 = "blocks.0.moe.deepspeed_moe.experts.deepspeed_experts.0"


def groups_with_options(model: Any) -> Groups:
    """A group for each expert, and rates of their own for two of them."""
    return create_moe_param_groups(
        model,
        split_by="expert",
        weight_decay=0.1,
        no_decay=is_norm_or_bias,
        overrides=[("blocks.0.*expert.1*", {"lr": 1e-4}), ("inp", {"lr": 2e-2})],
    )


def as_they_are(value: Any) -> None:
    """Change nothing."""


def problems_of(
    wrapper: str,
    spoil_groups: Callable[[Groups], None],
    spoil_engine: Callable[[Any], None] = as_they_are,
) -> list[str]:
    """What verify finds on this rank."""

    def groups_of(model: Any) -> Groups:
        groups = groups_with_options(model)
        spoil_groups(groups)
        return groups

    engine = start(wrapper, groups_of, model_options=EP2)
    spoil_engine(engine)
    return found_by_verify(engine)


def found_by_verify(engine: Any) -> list[str]:
    try:
        verify(engine)
    except VerificationError as error:
        return error.problems if error.problems[0] in str(error) else []
    return []


def named(groups: Groups, name: str) -> dict[str, Any]:
    return next(group for group in groups if group["name"] == name)


@pytest.mark.parametrize("wrapper", [wrapper for wrapper in WRAPPERS if wrapper != "fp16"])
def test_passes(wrapper: str) -> None:
    assert run_on_ranks(2, problems_of, wrapper, as_they_are, train_a_step) == [[], []]


def train_a_step(engine: Any) -> None:
    train(engine, 1)


# ---- what is wrong on every rank ------------------------------------------------------


def forget_a_parameter(groups: Groups) -> None:
    named(groups, "ep_size_2_blocks.0.moe.expert.0")["params"].pop()


def change_lr(engine: Any) -> None:
    named(engine.optimizer.param_groups, "ep_size_2_blocks.0.moe.expert.1.override.0")["lr"] = 0.5


def change_weight_decay(engine: Any) -> None:
    named(engine.optimizer.param_groups, "dense.override.1")["weight_decay"] = 0.5


def move_an_expert_to_dense(groups: Groups) -> None:
    named(groups, "dense")["params"].append(
        named(groups, "ep_size_2_blocks.0.moe.expert.0")["params"].pop()
    )


def rename_to_unknown(engine: Any) -> None:
    named(engine.optimizer.param_groups, "ep_size_2_blocks.1.moe.expert.0")["name"] = "blocks.1"


def rename_to_other_size(engine: Any) -> None:
    group = named(engine.optimizer.param_groups, "ep_size_2_blocks.1.moe.expert.0")
    group["name"] = "ep_size_4_blocks.1"


def replace_a_module(engine: Any) -> None:
    engine.module.out = torch.nn.Linear(HIDDEN, HIDDEN)


def repeat_a_name(groups: Groups) -> None:
    named(groups, "ep_size_2_blocks.1.moe.expert.0")["name"] = "ep_size_2_blocks.1.moe.expert.1"


WRONG: dict[str, tuple[Callable[[Any], None], Callable[[Any], None], tuple[str, ...]]] = {
    "in no group": (
        forget_a_parameter,
        as_they_are,
        (f"{EXPERT_0}.down.weight is trainable, but no group steps it",),
    ),
    "other lr": (
        as_they_are,
        change_lr,
        ("'ep_size_2_blocks.0.moe.expert.1.override.0' steps ", "lr=0.5", "lr=0.0001"),
    ),
    "other weight decay": (
        as_they_are,
        change_weight_decay,
        ("'dense.override.1' steps inp.weight", "weight_decay=0.5", "weight_decay=0.1"),
    ),
    "expert among dense": (
        move_an_expert_to_dense,
        as_they_are,
        (
            f"expert parameter {EXPERT_0}.down.weight of 'ep_size_2' is in group 'dense'",
            "marked moe",
        ),
    ),
    "unknown name": (
        as_they_are,
        rename_to_unknown,
        ("group 'blocks.1' is marked moe", "does not lead to the process groups"),
    ),
    "name of another size": (
        as_they_are,
        rename_to_other_size,
        ("group 'ep_size_4_blocks.1' is marked moe", "does not lead to the process groups"),
    ),
    "module replaced": (
        as_they_are,
        replace_a_module,
        ("group 'dense' steps a tensor of shape (16, 16) that is not in the model",),
    ),
    "module not stepped": (
        as_they_are,
        replace_a_module,
        ("parameter out.weight is trainable, but no group steps it",),
    ),
    "name twice": (
        repeat_a_name,
        as_they_are,
        ("repeats the name 'ep_size_2_blocks.1.moe.expert.1'",),
    ),
}


@pytest.mark.parametrize("wrapper", ["zero1", "bf16", "fp32"])
@pytest.mark.parametrize(("spoil_groups", "spoil_engine", "words"), WRONG.values(), ids=WRONG)
def test_names_what_is_wrong(
    wrapper: str,
    spoil_groups: Callable[[Groups], None],
    spoil_engine: Callable[[Any], None],
    words: tuple[str, ...],
) -> None:
    first, second = run_on_ranks(2, problems_of, wrapper, spoil_groups, spoil_engine)
    assert first == second, "ranks raise different errors"
    for rank in (0, 1):
        about = [line for line in first if line.startswith(f"rank {rank}: ")]
        assert any(all(word in line for word in words) for line in about), first


# ---- what is wrong on one rank --------------------------------------------------------


def swap_on_last_rank(groups: Groups) -> None:
    """Two groups of one size change places, so that DeepSpeed notices nothing."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        wanted = [f"ep_size_2_blocks.{layer}.moe.expert.0" for layer in (0, 1)]
        i, j = (index for index, group in enumerate(groups) if group["name"] in wanted)
        groups[i], groups[j] = groups[j], groups[i]


def other_content_on_last_rank(groups: Groups) -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        a, b = (named(groups, f"ep_size_2_blocks.{layer}.moe.expert.0") for layer in (0, 1))
        a["params"], b["params"] = b["params"], a["params"]


def change_lr_on_last_rank(engine: Any) -> None:
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        change_lr(engine)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("spoil_groups", "spoil_engine", "words"),
    [
        (swap_on_last_rank, as_they_are, ["blocks.0.moe.expert.0", "blocks.1.moe.expert.0"]),
        (other_content_on_last_rank, as_they_are, [EXPERT_0, EXPERT_0.replace("0", "1", 1)]),
        (as_they_are, change_lr_on_last_rank, ["lr=0.0001", "lr=0.5"]),
    ],
)
def test_difference_between_ranks_is_the_same_error_on_all(
    world: int,
    spoil_groups: Callable[[Groups], None],
    spoil_engine: Callable[[Any], None],
    words: list[str],
) -> None:
    errors = run_on_ranks(world, problems_of, "zero2", spoil_groups, spoil_engine)
    assert all(error == errors[0] for error in errors)
    line = next(line for line in errors[0] if "not the same on all ranks" in line)
    others, last = line.split(f"ranks [{world - 1}]: ")
    assert f"ranks {list(range(world - 1))}: " in others
    assert words[0] in others
    assert words[1] in last


def break_a_tag_on_last_rank(engine: Any) -> None:
    """Experts of one rank lose the name of their process groups."""
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        param = engine.module.get_parameter("inp.weight")
        param.allreduce, param.group_name = False, "mine"


def test_tag_that_breaks_on_one_rank_is_an_error_on_all() -> None:
    first, second = run_on_ranks(
        2, problems_of, "zero2", as_they_are, break_a_tag_on_last_rank, timeout=20
    )
    assert first == second
    assert any("inp.weight" in line and "'mine'" in line for line in first)


@pytest.mark.parametrize("value", [None, torch.nn.Linear(1, 1)])
def test_refuses_what_is_no_engine(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=r"engine=.* must be an engine"):
        verify(value)  # type: ignore[arg-type]
