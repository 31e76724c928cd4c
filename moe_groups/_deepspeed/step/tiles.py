"""Step a torch optimizer in tiles: slices of its flat parameters, so that temporaries stay small.

An optimizer is elementwise if each element's new value follows from the element, its gradient and
its state alone. Stepping slices one after another then gives the same bits as one step.
"""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch

from moe_groups.errors import InvalidArgumentError

ALIGNED = 1024
"""Tiles begin at multiples of this: vectorized kernels treat the end of a tensor differently."""
BYTES_PER_ELEMENT = 12
"""What a tile takes: the fp32 copy of its gradients, and two more for AdamW or the norm."""
MORE_BYTES = 24
"""The same with another of torch's optimizers, or other options: RAdam's for-loop takes so much."""
ELEMENTWISE = {
    "torch.optim": ("AdamW", "Adam", "Adamax", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam"),
    "deepspeed.ops": ("FusedAdam", "DeepSpeedCPUAdam", "FusedLion", "DeepSpeedCPULion"),
}
"""Optimizers by package. The tests step torch's and FusedAdam whole and in tiles; the others update
each element in one line of their kernel (``csrc/adam``, ``csrc/lion``)."""

_GLOBAL = importlib.import_module("torch.optim.optimizer")  # torch.optim hides the name

Group: TypeAlias = dict[str, Any]
Gradient: TypeAlias = Callable[[int, int], torch.Tensor]
"""The gradient of a slice, from a first element up to another one, in the parameter's dtype."""


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that tiles would change.

    Raises:
        InvalidArgumentError: not one of :data:`ELEMENTWISE`, or a differentiable one.
    """
    kind = type(optimizer)
    known = any(
        f"{kind.__module__}.".startswith(f"{package}.") and kind.__name__ in names
        for package, names in ELEMENTWISE.items()
    )
    if not known:
        names = ", ".join(name for names in ELEMENTWISE.values() for name in names)
        raise InvalidArgumentError(
            f"lean_step cannot step {kind.__module__}.{kind.__name__} in tiles: it is not known "
            f"to compute each element from that element alone. Use one of {names}, or leave "
            "lean_step out (compact_gradients works with any optimizer but Muon)."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise InvalidArgumentError(
            "lean_step cannot step an optimizer with differentiable=True: leave the option out."
        )


def bytes_per_element(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer takes for an element of a tile, its gradient included, at most."""
    if not type(optimizer).__module__.startswith("torch."):
        return BYTES_PER_ELEMENT  # its kernel allocates nothing
    groups = optimizer.param_groups
    plain = type(optimizer) is torch.optim.AdamW and not any(
        group.get(option) for group in groups for option in ("amsgrad", "maximize", "capturable")
    )
    fused = all(group.get("fused") for group in groups)
    return BYTES_PER_ELEMENT if plain or fused else MORE_BYTES


def elements_of(tile_bytes: int, name: str = "tile", each: int = BYTES_PER_ELEMENT) -> int:
    """Elements of a tile whose temporaries take ``tile_bytes``, ``each`` so much.

    Raises:
        InvalidArgumentError: less than the smallest tile takes; ``name`` is the argument's.
    """
    elements = tile_bytes // each // ALIGNED * ALIGNED
    if elements == 0:
        raise InvalidArgumentError(
            f"{name}={tile_bytes} bytes is less than the smallest tile takes: give at least "
            f"{ALIGNED * each}."
        )
    return elements


def batches(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Neighbouring tensors that have at most ``most`` elements together, or one larger tensor."""
    begin, held = 0, 0
    for index, size in enumerate(sizes):
        if index > begin and held + size > most:
            yield range(begin, index)
            begin, held = index, 0
        held += size
    if sizes:
        yield range(begin, len(sizes))


def slices(size: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` elements into slices of ``most``: each its first element and its end."""
    for start in range(0, size, most):
        yield start, min(start + most, size)


@contextmanager
def only(optimizer: torch.optim.Optimizer, groups: list[Group]) -> Iterator[None]:
    """Let the optimizer have these groups alone, as DeepSpeed does while it steps one."""
    everything = optimizer.param_groups
    optimizer.param_groups = groups
    try:
        yield
    finally:
        optimizer.param_groups = everything


def need_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Does a hook of the optimizer's step read gradients?

    It may, unless the object whose method it is says ``needs_gradients = False``, as ours do. torch
    itself has one for its profiler.
    """
    hooks = (hook for owner, name in _hooks_of(optimizer) for hook in getattr(owner, name).values())
    others = (hook for hook in hooks if not str(hook.__module__).startswith("torch."))
    owners = (getattr(hook, "__self__", None) for hook in others)
    return any(getattr(owner, "needs_gradients", True) for owner in owners)


def _hooks_of(optimizer: torch.optim.Optimizer) -> list[tuple[Any, str]]:
    """Where hooks are: those before a step, for all optimizers and this one, and those after it."""
    return [
        (_GLOBAL, "_global_optimizer_pre_hooks"),
        (optimizer, "_optimizer_step_pre_hooks"),
        (optimizer, "_optimizer_step_post_hooks"),
        (_GLOBAL, "_global_optimizer_post_hooks"),
    ]


@contextmanager
def around_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Call the hooks of the optimizer's step here, once, and not in the steps within."""
    places = _hooks_of(optimizer)
    hooks = [getattr(owner, name) for owner, name in places]
    for hook in (*hooks[0].values(), *hooks[1].values()):
        hook(optimizer, (), {})
    for owner, name in places:
        setattr(owner, name, OrderedDict())
    try:
        yield
    finally:
        for (owner, name), kept in zip(places, hooks, strict=True):
            setattr(owner, name, kept)
    for hook in (*hooks[2].values(), *hooks[3].values()):
        hook(optimizer, (), {})


def step_in_tiles(
    optimizer: torch.optim.Optimizer, group: Group, gradient: Gradient, most: int
) -> None:
    """Step the one parameter of ``group`` in slices of ``most`` elements.

    Calls no hooks that :func:`around_hooks` has called. The optimizer's state is as after one step:
    what has an entry per element is stepped in place, and what has one for the parameter (its
    number of steps) is stepped from the same value in each slice.
    """
    (param,) = group["params"]
    before: Mapping[str, Any] = dict(optimizer.state.get(param, {}))
    state, tile_group = dict(before), group
    for start, end in slices(param.numel(), most):
        tile = param.detach()[start:end]
        tile.grad = gradient(start, end)
        if before:
            optimizer.state[tile] = {
                key: _part(value, param, start, end) for key, value in before.items()
            }
        tile_group = {**group, "params": [tile]}
        try:
            with only(optimizer, [tile_group]):
                optimizer.step()
        finally:
            _take(optimizer.state.pop(tile, {}), state, param, start, end)
            tile.grad = None  # before the next one is made
    for key, value in before.items():
        if isinstance(value, torch.Tensor) and value is not state[key]:
            state[key] = value.copy_(state[key])  # others may hold it
    if state:
        optimizer.state[param].update(state)
    group.update({key: value for key, value in tile_group.items() if key != "params"})


def _take(
    stepped: dict[str, Any], state: dict[str, Any], param: torch.Tensor, start: int, end: int
) -> None:
    """Put the state of a slice into that of the parameter."""
    for key, value in stepped.items():
        if not isinstance(value, torch.Tensor) or value.shape != (end - start,):
            state[key] = value
            continue
        if state.get(key) is None:
            state[key] = param.new_empty(param.shape, dtype=value.dtype)
        kept = state[key][start:end]
        if kept.data_ptr() != value.data_ptr():
            kept.copy_(value)


def _part(value: Any, param: torch.Tensor, start: int, end: int) -> Any:
    """A slice of a state that has an entry per element; a copy of another tensor."""
    if not isinstance(value, torch.Tensor):
        return value
    return value[start:end] if value.shape == param.shape else value.clone()
