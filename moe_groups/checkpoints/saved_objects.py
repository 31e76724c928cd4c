"""What DeepSpeed saves beside tensors and plain containers, read and written without DeepSpeed.

Its objects are read as stand-ins, which have the same attributes, and written by DeepSpeed's names.
So a machine without DeepSpeed can inspect and convert its checkpoints, and no code of it runs.
"""

import pickle
from dataclasses import dataclass
from enum import Enum
from typing import Any


class LossScaler:
    """A fixed loss scale; all attributes are in the file."""


class DynamicLossScaler:
    """A loss scale that follows overflows; all attributes are in the file."""


class ZeroStageEnum(int, Enum):
    """The stage of ZeRO."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


@dataclass
class fragment_address:  # noqa: N801
    """Where a parameter lies in a rank's partition, in elements."""

    numel: int
    start: int


STAND_INS: dict[str, type] = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": LossScaler,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": DynamicLossScaler,
    "deepspeed.runtime.zero.config.ZeroStageEnum": ZeroStageEnum,
    "deepspeed.utils.tensor_fragment.fragment_address": fragment_address,
}
_NAMES = {kind: name for name, kind in STAND_INS.items()}
_Pickler: Any = pickle._Pickler


class Pickler(_Pickler):
    """Writes the names of DeepSpeed's classes in place of those of their stand-ins.

    It is Python's own implementation: the one in C looks up each name before it writes it.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:
        theirs = _NAMES.get(obj) if isinstance(obj, type) else None
        if theirs is None:
            super().save_global(obj, name)
        else:
            module, _, attribute = theirs.rpartition(".")
            self.write(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())
            self.memoize(obj)


class Unpickler(pickle.Unpickler):
    """Makes stand-ins of DeepSpeed's classes; any other class is imported, which can run code."""

    def find_class(self, module: str, name: str) -> Any:
        return STAND_INS.get(f"{module}.{name}") or super().find_class(module, name)
