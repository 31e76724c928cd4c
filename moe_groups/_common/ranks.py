"""All ranks or none: an error on one rank is raised on all of them.

The collectives are those of the world. Each rank first runs its part and then reports, so no rank
waits for one that has raised.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from moe_groups.errors import CheckpointError, MoEGroupsError

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T], outcome: str = "") -> list[T]:
    """Run ``work`` on every rank; all ranks call this together, and get the results of all ranks.

    Args:
        outcome: the sentence that ends an error, such as "Nothing was loaded."

    Raises:
        CheckpointError: that of the first rank on which ``work`` raised. Another type of error
            becomes its cause, with the traceback, on that rank, and its text on the others; what is
            neither ours nor the system's is called unexpected, as it may be a bug of this library.
    """
    value, problem = _tried(work)
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (value, problem))
    return _given(found, problem, outcome)


def on_first_rank(work: Callable[[], T], outcome: str = "") -> T:
    """Run ``work`` on rank 0 and return its result on all ranks, which call this together.

    Raises:
        CheckpointError: ``work`` raised.
    """
    value, problem = _tried(work) if distributed.get_rank() == 0 else (None, None)
    found: list[Any] = [(value, problem)]
    distributed.broadcast_object_list(found)
    given: list[T] = _given(found, problem, outcome)
    return given[0]


def _tried(work: Callable[[], T]) -> tuple[T | None, CheckpointError | None]:
    try:
        return work(), None
    except CheckpointError as error:
        return None, error
    except Exception as error:  # the other ranks would wait for this one for ever
        rank = distributed.get_rank()
        what = "" if isinstance(error, MoEGroupsError | OSError) else "unexpected "
        problem = CheckpointError(f"rank {rank}: {what}{type(error).__name__}: {error}.")
        problem.__cause__ = error
        return None, problem


def _given(found: list[Any], own: CheckpointError | None, outcome: str) -> list[Any]:
    for _, problem in found:
        if problem is not None:
            same = own is not None and str(own) == str(problem)
            cause = own if same else None  # it has the traceback of this rank
            raise CheckpointError(f"{problem} {outcome}".rstrip()) from cause
    return [value for value, _ in found]
