"""Options of a group that apply only while it is stepped.

They are in the group's dict under one key, so DeepSpeed saves and loads them with the group. A hook
writes them into the group right before the torch optimizer steps and removes them right after:
learning-rate schedulers, ``verify`` and checkpoints see the group without them.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch

from moe_groups._deepspeed.engines import Engine, stepped_groups
from moe_groups.tags import STEP_OPTIONS

_OWN = "_own_options"
_REPLACED = ("lr", "weight_decay")

Options: TypeAlias = Mapping[str, float | bool | None]
"""lr, lr_multiplier, weight_decay, frozen."""


def stepped_lr(group: Mapping[str, Any]) -> Any:
    """The learning rate of the group's step, whether called before, in or after the step."""
    options = group.get(STEP_OPTIONS, {})
    if options.get("frozen"):
        return 0.0
    own = group.get(_OWN, group)["lr"]
    return options.get("lr", own) * options.get("lr_multiplier", 1.0)


class StepHooks:
    """Applies the options of an optimizer's groups while it steps, and skips frozen groups."""

    needs_gradients = False
    """For :func:`moe_groups.lean_step`: asks only whether there is one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)
        self._changed: list[dict[str, Any]] = []
        self._skipped: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._held: dict[int, list[Any]] = {}

    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._after()  # if the last step raised, they are still there
        for group in optimizer.param_groups:
            if options := group.get(STEP_OPTIONS):
                self._put(group, options)

    def _put(self, group: dict[str, Any], options: Mapping[str, Any]) -> None:
        if options.get("frozen"):
            for tensor in group["params"]:
                self._skipped.append((tensor, tensor.grad))
                tensor.grad = None  # so a torch optimizer skips it and its state
            return
        lr = stepped_lr(group)
        group[_OWN] = {key: group[key] for key in _REPLACED if key in group}
        self._changed.append(group)
        group["lr"] = lr
        if "weight_decay" in options:
            group["weight_decay"] = options["weight_decay"]

    def _after(self, *_: object) -> None:
        while self._changed:
            group = self._changed.pop()
            group.update(group.pop(_OWN))
        while self._skipped:  # an offloaded optimizer reuses its gradient buffers
            tensor, grad = self._skipped.pop()
            tensor.grad = grad

    def hold(self, index: int, params: Iterable[torch.Tensor]) -> None:
        """Make the gradients of a frozen group zero, so that it does not count in the norm."""
        if index not in self._held:
            trained = [param for param in params if param.requires_grad]
            self._held[index] = [param.register_hook(torch.zeros_like) for param in trained]

    def release(self, index: int) -> None:
        """Give the group its gradients again."""
        for handle in self._held.pop(index, ()):
            handle.remove()


_HOOKS: "weakref.WeakKeyDictionary[Any, StepHooks]" = weakref.WeakKeyDictionary()


def write_options(engine: Engine, options: Mapping[int, Options]) -> None:
    """Set options of groups, by their position in the optimizer; None removes an option."""
    groups = engine.optimizer.param_groups
    switched: list[int] = []
    for index, given in options.items():
        old = groups[index].pop(STEP_OPTIONS, {})
        merged = {key: value for key, value in {**old, **given}.items() if value is not None}
        if merged:
            groups[index][STEP_OPTIONS] = merged
        if old.get("frozen", False) != merged.get("frozen", False):
            switched.append(index)
    if switched or engine not in _HOOKS:
        _hold_frozen(engine, switched)


def take_up_options(engine: Engine) -> None:
    """Apply the options in the groups, for example after a checkpoint was loaded."""
    groups = getattr(engine.optimizer, "param_groups", [])
    if engine in _HOOKS or any(STEP_OPTIONS in group for group in groups):
        _hold_frozen(engine, range(len(groups)))


def _hold_frozen(engine: Engine, indices: Iterable[int]) -> None:
    if engine not in _HOOKS:
        _HOOKS[engine] = StepHooks(engine.basic_optimizer)
    hooks, stepped = _HOOKS[engine], stepped_groups(engine)
    for index in indices:
        group, params = stepped[index]
        if group.get(STEP_OPTIONS, {}).get("frozen"):
            hooks.hold(index, params)
        else:
            hooks.release(index)
