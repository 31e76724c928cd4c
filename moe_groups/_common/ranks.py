"""All ranks, or none."""

from collections.abc import Callable

from torch import distributed

from moe_groups.errors import CheckpointError


def together(work: Callable[[], None]) -> None:
    """Wait for all ranks to do the work; if it fails on one of them, all raise its error."""
    problem: CheckpointError | None = None
    try:
        work()
    except CheckpointError as error:
        problem = error
    except Exception as error:  # the others wait for this rank
        problem = CheckpointError(f"{type(error).__name__}: {error}")
    problems: list[CheckpointError | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise found
