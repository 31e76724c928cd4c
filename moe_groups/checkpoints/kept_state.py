"""What an optimizer keeps of each parameter, and whether another optimizer can go on from it.

DeepSpeed puts saved state into an optimizer by the names of its entries, whatever class wrote
them: RAdam reads AdamW's ``exp_avg`` and trains on, SGD fails in the first step.
"""

import inspect
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import torch

from moe_groups.checkpoints.layout import readable_options

_ADAM = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")
"""Their state means the same in all of them."""
_FLAG = "amsgrad"
_HOW = ("params", "fused", "foreach", "capturable", "differentiable")
"""Arguments of torch's optimizers that choose a kernel; they change no state."""


class Kept(NamedTuple):
    """The state of an optimizer.

    Attributes:
        by: the class that keeps it, such as ``torch.optim.adamw.AdamW``; None where not known.
        keys: names of what it keeps of a parameter, such as ``exp_avg``; None where not known.
    """

    by: str | None
    keys: tuple[str, ...] | None

    def __str__(self) -> str:
        by = self.by or "an optimizer"
        return by if self.keys is None else f"{by} ({', '.join(self.keys) or 'no state'})"


def kept_by(optimizer: Any) -> Kept:
    """What an optimizer keeps, or will keep once it has stepped."""
    cls = type(optimizer)
    by = f"{cls.__module__}.{cls.__qualname__}"
    keys = keys_of(getattr(optimizer, "state", {}).values())
    return Kept(by, _expected(by, optimizer.param_groups) if keys is None else keys)


def keys_of(states: Any) -> tuple[str, ...] | None:
    """The names in the states of parameters; None before the first step."""
    keys = {str(key) for state in states if isinstance(state, dict) for key in state}
    return tuple(sorted(keys)) or None


def compare_kept(saved: Kept, running: Kept) -> Literal["same", "unknown", "other"]:
    """Can the running optimizer go on from the saved state? "unknown" for classes of others."""
    kinds = _kind(saved.by), _kind(running.by)
    if saved.by and saved.by != running.by and None not in kinds and kinds[0] != kinds[1]:
        return "other"
    if saved.keys is not None and running.keys is not None:
        counted = {"step"}  # in the state, or in the group
        if {*saved.keys} - counted != {*running.keys} - counted:
            return "other"
    unknown = saved.by and saved.by != running.by and None in kinds
    return "unknown" if unknown else "same"


def other_options(by: str | None, saved: Collection[str], optimizer: Any) -> str | None:
    """What in the names of saved options shows that they are another optimizer's; None if nothing.

    DeepSpeed replaces the options of the groups by the saved ones, and the next step is a KeyError.

    Args:
        by: the class that was saved; None where not known.
        saved: names of the options in the groups of a checkpoint.
        optimizer: the running one.
    """
    defaults = getattr(optimizer, "defaults", {})
    needed = {name for name, value in defaults.items() if not isinstance(value, bool | None)}
    if missing := sorted(needed - {*saved}):
        return f"without {', '.join(missing)}"
    # Adam and AdamW have it, RAdam with the same state has not; "bias_correction" is DeepSpeed's.
    known = by or not type(optimizer).__module__.startswith("torch.optim.")
    has, wants = _FLAG in saved, _FLAG in defaults
    if not known and has != wants and "bias_correction" not in saved:
        return f"with {_FLAG}" if has else f"without {_FLAG}"
    return None


def _kind(by: str | None) -> str | None:
    """Classes of one kind keep the same; None for a class that is not torch's or DeepSpeed's."""
    if by is None or not by.startswith(("torch.optim.", "deepspeed.")):
        return None
    name = by.rpartition(".")[2]
    return "Adam" if name in _ADAM else name


def _expected(by: str, groups: list[dict[str, Any]]) -> tuple[str, ...] | None:
    """The names that torch's optimizer of this kind has after a step with these options."""
    cls = getattr(torch.optim, _kind(by) or "", None)
    if cls is None:
        return None
    known = inspect.signature(cls).parameters.keys() - {*_HOW}
    keys: set[str] = set()
    for group in groups:
        options = {k: v for k, v in readable_options(group).items() if k in known}
        param = torch.zeros(2, 2, requires_grad=True)
        param.grad = torch.zeros(2, 2)
        try:
            probe = cls([param], **options)
            probe.step()
        except (TypeError, ValueError, RuntimeError):  # LBFGS, SparseAdam: steps of another form
            return None
        keys |= probe.state[param].keys()
    return tuple(sorted(keys))
