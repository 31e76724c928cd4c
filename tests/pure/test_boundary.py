"""Every public function refuses what it cannot use with an error of ours, whatever it is given.

The public functions are found, not listed: a new one is tried too, and has to be ``checked``.
"""

import contextlib
import functools
import inspect
import random
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moe_groups import (
    ExpertTag,
    LossTracker,
    MoEGroupsError,
    StepConfig,
    Topology,
    create_moe_param_groups,
    estimate_step_memory,
    inspect_checkpoint,
    load_balancing_loss,
    measure_step_memory,
    plan_param_groups,
    tag_experts,
)
from moe_groups._common.arguments import shown
from moe_groups.errors import InvalidArgumentError
from tests.pure.test_public_names import NAMES

MADE_BY_US = (
    *("ExpertBalancer", "ParamGroupPlan"),
    *("MeasuredIteration", "MeasuredPhase", "MeasuredStep"),
)
"""Results, besides the dataclasses; users make of these only the following."""
MADE_BY_USERS = ("StepConfig", "Topology")


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions, constructors and methods that are public and take arguments."""
    for package in set(NAMES) - {"moe_groups.errors"}:
        module = import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            is_class = inspect.isclass(value)
            result = (is_dataclass(value) and name not in MADE_BY_USERS) or name in MADE_BY_US
            plain = is_class and (issubclass(value, Exception) or hasattr(value, "_fields"))
            if not result and not plain:
                yield name, value
            for key, member in vars(value).items() if is_class else ():
                own = getattr(member, "__func__", member)
                public = key[0] != "_" and inspect.isfunction(own)
                if public and len(inspect.signature(own).parameters) > 1:
                    yield f"{name}.{key}", own


FUNCTIONS = dict(sorted(public_functions()))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


PARAM = nn.Parameter(torch.zeros(2, 2))
WRONG: list[Any] = [
    *(None, True, 0, -1, 3, 2**63, 10**30, 10**400, -(10**400), 10**5000),
    *(float("nan"), float("inf"), -float("inf"), 0.5, 1e308, 1j, np.float32("nan"), np.int64(-1)),
    *("", "x", "a b", "\0", "\ud800", "ünï 💥", "x" * 100_000, "1e999", "*", "[", "10**9"),
    *(b"", [], [None], [[]], (), (1, 2), {}, {"": None}, {1: 2}, {"params": 3}, set(), {1}),
    *(object(), int, Exception, lambda *_, **__: None, lambda *_, **__: "x", iter([3]), range(3)),
    *(torch.zeros(0), torch.tensor(float("nan")), torch.zeros(2, dtype=torch.bool), PARAM),
    *(torch.full((4, 2), -1), torch.full((4, 2), 10**9), torch.empty(2, device="meta")),
    *(np.zeros(2), nn.Linear, nn.Linear(2, 2), Path("nowhere"), Path("\0"), StepConfig(), ...),
    *(ExpertTag("ep_size_2"), ExpertTag(3, [], "x", -1.5), Topology(world_size=2)),  # type: ignore
]


def is_hashable(value: Any) -> bool:
    try:
        return isinstance(hash(value), int)
    except TypeError:
        return False


def nested(hint: Any, depth: int = 0) -> Iterator[Any]:
    """Containers as the hint wants them, of wrong things, and functions that return these."""
    inner = typing.get_args(hint)
    origin = typing.get_origin(hint)
    few = WRONG[:: 3 + 4 * depth]
    if origin is typing.Annotated:
        return
    if origin is tuple and depth < 3:
        good = ["x" if kind is str else {} for kind in inner]
        for index, kind in enumerate(inner):
            for value in (*few, *nested(kind, depth + 1)):
                yield (*good[:index], value, *good[index + 1 :])
    elif origin in (Mapping, dict) and inner and depth < 3:
        yield from ({key: value} for key in ("lr", "lerning_rate", "x") for value in few)
        yield from ({key: "x"} for key in few if is_hashable(key))
    elif origin in (Sequence, list) and depth < 3:
        yield from ([value] for value in (*few, *nested(inner[0], depth + 1)))
    elif origin is Callable:
        yield from (lambda *_, value=value, **__: value for value in few)
    else:
        for kind in inner:
            yield from nested(kind, depth)


def groups_of_wrong() -> Iterator[Any]:
    """What looks like parameters or group dicts, with wrong things in it."""
    for value in WRONG:
        yield [value]
        yield [PARAM, value]
        yield [(value, PARAM)]
        yield [("x", value)]
        for key in ("params", "name", "param_names", "lr", "betas", "moe", "weight_decay", "x"):
            yield [{"params": [PARAM], key: value}]
        if is_hashable(value):
            yield [{"params": [PARAM], value: 1}]
        if isinstance(value, Exception | str | int | float | None):
            param = nn.Parameter(torch.zeros(2, 2))
            param.__dict__.update(allreduce=False, group_name="ep_size_2", expert_group_name=value)
            yield [param]


GOOD: dict[str, Callable[[], Any]] = {
    "params": model,
    "param_groups": lambda: [{"params": [PARAM]}],
    "groups": lambda: [{"params": [PARAM]}],
    "model": model,
    "probs": lambda: torch.ones(4, 2) / 2,
    "assigned": lambda: torch.zeros(4, 1, dtype=torch.long),
    "logits": lambda: torch.ones(4, 2),
    "hidden": lambda: torch.ones(2, requires_grad=True),
    "loss": lambda: torch.ones((), requires_grad=True),
    "tag": lambda: ExpertTag("ep_size_2", "x", 0, 1),
    "expert": lambda: nn.Linear(2, 2),
    "hidden_size": lambda: 2,
    "world_size": lambda: 4,
    "block": lambda: nn.Linear(2, 2),
    "muon": dict,
    "adam": dict,
    "kind": lambda: "data",
    "family": lambda: "mixtral",
    "function": lambda: lambda: torch.ones(1, requires_grad=True),
    "loss_fn": lambda: lambda hidden, labels: hidden.sum(),
    "config": lambda: {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
}
"""An argument that works, by name; others get one by their type."""
BY_TYPE: dict[Any, Any] = {torch.Tensor: PARAM, str: "x", int: 1, float: 0.5, bool: True}
SELVES: dict[str, Callable[[], Any]] = {
    "Topology": lambda: Topology(world_size=4, ep_size=2),
    "ExpertTag": lambda: ExpertTag("ep_size_2", "x", 0, 1),
    "StepConfig": lambda: StepConfig,
}


def use(result: Any) -> None:
    """Do with a result what a user does next."""
    if isinstance(result, contextlib.AbstractContextManager):
        with result:
            pass
    elif isinstance(result, torch.Tensor) and result.requires_grad:
        result.sum().backward()
    elif not isinstance(result, int | list):  # Python prints integers of 4,300 digits at most
        str(result)


def attempts(name: str, function: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Arguments: one wrong and the rest good, then some of them wrong at random."""
    target: Any = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target, include_extras=True)
    known = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    good: dict[str, Callable[[], Any]] = {}
    for one in known:
        if one.default is one.empty and one.name != "self" and one.name != "cls":
            by_type = functools.partial(BY_TYPE.get, hints.get(one.name))
            good[one.name] = GOOD.get(one.name, by_type)
    holder = name.partition(".")[0]
    selves = {}
    for one in known:
        if one.name in ("self", "cls"):
            if holder not in SELVES:
                return
            selves = {one.name: SELVES[holder]}

    def call(**wrong: Any) -> dict[str, Any]:
        return {key: make() for key, make in (selves | good).items()} | wrong

    names = [one.name for one in known if one.name not in ("self", "cls")]
    for key in names:
        values = [*WRONG, *nested(hints.get(key, Any))]
        if key in ("params", "param_groups", "groups"):
            values += [*groups_of_wrong()][:: 1 if name == "describe" else 3]
        kinds: list[Any] = [hints.get(key), *typing.get_args(hints.get(key))]
        if any(typing.get_origin(kind) is Callable for kind in kinds):  # what they raise is theirs
            values = [value for value in values if not isinstance(value, type | nn.Module)]
        yield from (call(**{key: value}) for value in values)
    chance = random.Random(name)
    plain = [value for value in WRONG if not callable(value)]
    for _ in range(25 if len(names) > 1 else 0):
        yield call(**{key: chance.choice(plain) for key in names if chance.random() < 0.5})


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_but_our_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in attempts(name, FUNCTIONS[name]):
        try:
            use(FUNCTIONS[name](**arguments))
        except MoEGroupsError:
            pass
        except Exception as error:
            given = {key: shown(value) for key, value in arguments.items()}
            raise AssertionError(f"{name}: {given}") from error


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_boundary_is_at_every_public_function(name: str) -> None:
    function: Any = FUNCTIONS[name]
    target = function.__init__ if inspect.isclass(function) else function
    assert hasattr(target, "__wrapped__"), f"@checked is missing at {name}"
    assert typing.get_type_hints(target)


LIKELY: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (plan_param_groups, {"step": {"zero_stage": 2}}, r"step=\{.*\} must be a StepConfig or None"),
    (plan_param_groups, {"max_groups": "8"}, "max_groups='8' must be an integer of at least 1"),
    (plan_param_groups, {"step_memory_budget": None}, "step_memory_budget=None must be"),
    (plan_param_groups, {"data_parallel_size": 10**30}, "data_parallel_size=1000.* must be"),
    (create_moe_param_groups, {"overrides": 5}, "overrides=5 must be a list, a dict or None"),
    (create_moe_param_groups, {"weight_decay": -1.0}, "weight_decay=-1.0 must be .* at least 0"),
    (create_moe_param_groups, {"no_decay": lambda *_: None}, r"no_decay\(.*\)=None must be True"),
    (estimate_step_memory, {"groups": nn.Linear(2, 2)}, "groups: <Linear> is no group dict"),
    (measure_step_memory, {"device": nn.Linear(2, 2)}, "device=<Linear> must be a torch.device"),
    (LossTracker, {"engine": nn.Linear(2, 2), "coefficient": 1}, "engine=<Linear> must be an eng"),
    (tag_experts, {"model": None}, "model=None must be a torch module"),
    (inspect_checkpoint, {"directory": ".", "workers": float("nan")}, "workers=nan must be an int"),
    (inspect_checkpoint, {"directory": "\0"}, "must be a path"),
    (
        load_balancing_loss,
        {"probs": torch.ones(4, 2) / 2, "assigned": torch.full((4, 1), -1)},
        "assigned has no expert",
    ),
]


@pytest.mark.parametrize(("function", "arguments", "message"), LIKELY)
def test_likely_mistakes(
    function: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    needs_model = "params" in inspect.signature(function).parameters
    with pytest.raises(InvalidArgumentError, match=message):
        function(**({"params": model()} if needs_model else {}) | arguments)
