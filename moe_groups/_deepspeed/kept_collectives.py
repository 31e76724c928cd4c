"""Keep the results of the collectives of a checkpointed region for its recomputation.

``engine/activation_checkpointing.py`` opens a region, ``collectives.py`` sends collectives here.
In the forward pass a region keeps each result; in the recomputation it returns them in the same
order and runs no collective. Regions can be nested, and each belongs to one thread, because
autograd recomputes in a separate thread for each GPU.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from moe_groups.errors import RecomputationError


class Result(NamedTuple):
    """The result of one collective.

    Attributes:
        tensor: shares the memory of the collective's result, but not its graph.
        version: torch's count of in-place changes of ``tensor`` when it was kept.
        left: attributes that the collective set on its autograd context.
        kind: which collective it was.
    """

    tensor: torch.Tensor
    version: int
    left: dict[str, Any]
    kind: str


class _Thread(threading.local):
    def __init__(self) -> None:
        self.passes: list[KeepPass | ReplayPass] = []


_thread = _Thread()


def inside_region() -> bool:
    """Does this thread run or recompute a region?"""
    return bool(_thread.passes)


def once(kind: str, context: Any, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result of ``run``; in a recomputation the result that it had in the forward pass.

    Args:
        kind: which collective ``run`` is, for errors.
        context: object on which ``run`` sets attributes for the backward pass, or None.

    Raises:
        RecomputationError: the recomputation runs other collectives than the forward pass,
            or a kept result has been changed in place.
    """
    return _through(len(_thread.passes), kind, context, run)


def _through(depth: int, kind: str, context: Any, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Ask the innermost region first: if it has the result, the enclosing ones need none."""
    if depth == 0:
        return run()
    current = _thread.passes[depth - 1]
    if isinstance(current, ReplayPass):
        return current.next(kind, context)
    value = _through(depth - 1, kind, context, run)
    current.results.append(_kept(value, context, kind))
    return value


def _kept(value: torch.Tensor, context: Any, kind: str) -> Result:
    # Detached, because the graph refers to the checkpoint, which refers to these results.
    alias = value.detach()
    left = {} if context is None else dict(vars(context))
    return Result(alias, alias._version, left, kind)


class _Pass:
    """A context manager that can be entered again, for example for a second backward pass."""

    def __init__(self, results: list[Result]) -> None:
        self.results = results

    def __exit__(self, *error: object) -> None:
        _thread.passes.pop()


class KeepPass(_Pass):
    """The forward pass of a region."""

    def __enter__(self) -> None:
        self.results.clear()
        _thread.passes.append(self)


class ReplayPass(_Pass):
    """A recomputation of a region."""

    position = 0

    def __enter__(self) -> None:
        self.position = 0
        _thread.passes.append(self)

    def next(self, kind: str, context: Any) -> torch.Tensor:
        """The next kept result, which must be of this kind."""
        if self.position == len(self.results) or self.results[self.position].kind != kind:
            raise RecomputationError(
                f"collective {self.position + 1} of a checkpointed function is {kind} in the "
                f"recomputation, and {self._kind_before()} in the forward pass. The function must "
                "do the same both times: let it depend on its arguments and on torch's random "
                "numbers alone, and leave preserve_rng_state on."
            )
        result = self.results[self.position]
        self.position += 1
        if result.tensor._version != result.version:
            raise RecomputationError(
                f"the result of {kind} (shape {tuple(result.tensor.shape)}) was changed in place "
                "after the forward pass kept it for the recomputation. Replace the operation by "
                "one that is not in place, such as relu_ by relu."
            )
        if context is not None:
            vars(context).update(result.left)
        return result.tensor.detach()

    def _kind_before(self) -> str:
        if self.position == len(self.results):
            return "missing"
        return self.results[self.position].kind
