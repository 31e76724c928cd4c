"""Functions of the packages above that the changed DeepSpeed calls; ``_wiring.py`` connects them.

With the defaults DeepSpeed behaves as without us, so ``_deepspeed`` needs no package above it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Call: TypeAlias = Callable[..., Any]
Arguments: TypeAlias = dict[str, Any]
"""All of a call, defaults included."""


def _nothing(_: Any) -> None:
    """The default: do nothing with an engine or a model."""


def _not_followed(*_: Any) -> bool:
    return False


def _no_problem(*_: Any) -> tuple[bool, str | None]:
    return False, None


def _call(_: Any, original: Call, given: Arguments) -> Any:
    return original(**given)


@dataclass(slots=True)
class Ports:
    """Functions that are called at these moments, each on all ranks.

    Attributes:
        engine_started: with an engine, before it wraps its optimizer.
        modules_replaced: with the model in which AutoEP has replaced modules, and for the ``id`` of
            each new parameter those that it was made of: do groups of ours hold such?
        process_groups_made: with the engine's model, before its weights are broadcast.
        stage_problem: with a pipeline stage's layers and loss function, whether activations are
            partitioned, whether DeepSpeed recomputes them, and the stage's name in errors: does
            it carry a loss along the pipeline, and what prevents that (None if nothing)?
        save_checkpoint: with the engine, DeepSpeed's bound method and its arguments.
        load_checkpoint: with the same arguments.
        checkpoint_loaded: with the engine, after the load.
    """

    engine_started: Callable[[Any], None] = _nothing
    modules_replaced: Callable[[Any, Mapping[int, Any]], bool] = _not_followed
    process_groups_made: Callable[[Any], None] = _nothing
    stage_problem: Callable[[Any, Any, bool, bool, str], tuple[bool, str | None]] = _no_problem
    save_checkpoint: Callable[[Any, Call, Arguments], Any] = _call
    load_checkpoint: Callable[[Any, Call, Arguments], Any] = _call
    checkpoint_loaded: Callable[[Any], None] = _nothing


PORTS = Ports()
