"""Hyperparameters of groups and overrides: keys that an optimizer reads, values that it can use.

An optimizer reads its own keys from a group, and ignores all other keys without a warning.
"""

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from moe_groups._common.arguments import check, shown
from moe_groups.errors import InvalidArgumentError

RESERVED: dict[str, Any] = {
    "params": Any,
    "param_names": Sequence[str] | None,
    "name": str | int | None,
    "moe": bool | None,
    "expert_group_name": str | None,
    "expert_number": int | None,
}
"""Keys of the grouping itself, and their types."""
_DEEPSPEED = ("bias_correction", "max_coeff", "min_coeff", "max_grad_norm", "ns_method", "use_muon")
"""Keys of DeepSpeed's optimizers, which may be imported later."""
_OTHER_WORDS = {
    "learning_rate": "lr",
    "decay": "weight_decay",
    "wd": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
}
_NOT_NEGATIVE = ("lr", "weight_decay", "eps", "momentum", "alpha", "betas")


def check_hyperparameters(
    where: str, options: Mapping[str, Any], own: Collection[str] | None = None
) -> None:
    """Refuse keys that no optimizer reads, and values that none can use.

    Args:
        where: what sets the options.
        own: keys that the caller's group dicts have too, for a reader of their own. None for such
            a dict itself, where only a key that looks like a misspelt one is refused.

    Raises:
        InvalidArgumentError: names the key and the nearest known one, or the value.
    """
    known = _arguments(tuple(_below(torch.optim.Optimizer)))
    for key, value in options.items():
        check(f"a key of {where}", key, str)
        if key in RESERVED:
            check(f"{where}: {key}", value, RESERVED[key])
        elif key in known:
            _check_value(f"{where}: {key}", key, value)
        elif key not in (own or ()):
            words = [*sorted(known), *_OTHER_WORDS]
            near = difflib.get_close_matches(key.strip().lower(), words, 1, 0.8)
            if near or own is not None:
                raise InvalidArgumentError(
                    f"{where} sets {key!r}, which no optimizer reads"
                    + (f": use {_OTHER_WORDS.get(near[0], near[0])!r}. " if near else ". ")
                    + "For an optimizer of your own, import its class first, with the key as an "
                    "argument, or give the key in group dicts too."
                )


def _check_value(name: str, key: str, value: Any) -> None:
    check(name, value, _types().get(key, float if isinstance(value, float) else Any))
    if key in _NOT_NEGATIVE:
        values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(v, torch.Tensor) and (v.numel() != 1 or v.is_meta) for v in values):
            raise InvalidArgumentError(f"{name}={shown(value)} must be one number.")
        numbers = list(map(float, values))
        if not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise InvalidArgumentError(f"{name}={shown(value)} must be finite and at least 0.")
        if key == "betas" and not (len(numbers) > 1 and all(number < 1 for number in numbers)):
            raise InvalidArgumentError(f"{name}={shown(value)} must be 2 or 3 numbers below 1.")


def _below(kind: Any) -> Iterator[Any]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


@functools.cache
def _arguments(kinds: tuple[Any, ...]) -> frozenset[str]:
    """What these optimizer classes take."""
    found = {key for kind in kinds for key in inspect.signature(kind).parameters}
    return frozenset(found.union(_DEEPSPEED) - {"params", "defaults", "args", "kwargs"})


@functools.cache
def _types() -> dict[str, Any]:
    """Types of hyperparameters, as torch annotates its optimizers."""
    found: dict[str, Any] = {}
    for kind in vars(torch.optim).values():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            for key, hint in typing.get_type_hints(kind.__init__).items():
                found[key] = found[key] | hint if key in found else hint
    return {**found, "betas": tuple[float | torch.Tensor, ...]}  # some optimizers take three
