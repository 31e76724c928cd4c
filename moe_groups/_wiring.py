"""Connects the changed DeepSpeed with what it calls: the one file that knows both sides.

Each function imports what it calls when it is called, so that ``import moe_groups`` stays light.
"""

from collections.abc import Mapping
from typing import Any

from moe_groups._deepspeed.ports import PORTS, Arguments, Call


def _engine_started(engine: Any) -> None:
    from moe_groups.checkpoints.guard.guard import guard_from_now_on
    from moe_groups.memory.step_config import refuse_planned

    if engine.zero_optimization_stage() == 3:
        refuse_planned(engine)
    guard_from_now_on(engine)


def _modules_replaced(model: Any, sources: Mapping[int, Any]) -> bool:
    from moe_groups.experts.find import find_experts
    from moe_groups.groups.origin import follow_replacement

    followed = follow_replacement(list(model.parameters()), sources)
    if followed:
        find_experts(model).write()
    return followed


def _process_groups_made(model: Any) -> None:
    from moe_groups.weights.local_experts import check_places

    check_places(model)


def _stage_problem(
    layers: Any, loss_fn: Any, partitioned: bool, recomputed: bool, where: str
) -> tuple[bool, str | None]:
    from moe_groups.losses.carry import CarryLoss, carrying_problem

    carries = any(isinstance(layer, CarryLoss) for layer in layers)
    return carries, carrying_problem(layers, loss_fn, partitioned, recomputed, where)


def _save_checkpoint(engine: Any, save: Call, given: Arguments) -> Any:
    from moe_groups.checkpoints.guard.guard import guarded_save

    return guarded_save(engine, save, given)


def _load_checkpoint(engine: Any, load: Call, given: Arguments) -> Any:
    from moe_groups.checkpoints.guard.guard import guarded_load

    return guarded_load(engine, load, given)


def _checkpoint_loaded(engine: Any) -> None:
    from moe_groups.engine.step_options import take_up_options

    take_up_options(engine)


def connect() -> None:
    """Let the changed DeepSpeed call the package."""
    PORTS.engine_started = _engine_started
    PORTS.modules_replaced = _modules_replaced
    PORTS.process_groups_made = _process_groups_made
    PORTS.stage_problem = _stage_problem
    PORTS.save_checkpoint = _save_checkpoint
    PORTS.load_checkpoint = _load_checkpoint
    PORTS.checkpoint_loaded = _checkpoint_loaded
