"""Are the experts that were loaded before ``deepspeed.initialize`` those of this rank?

Which rank has which experts is settled by the process groups, which the engine makes.
"""

from collections.abc import Iterable

import torch
from torch import nn

from moe_groups.errors import InvalidArgumentError
from moe_groups.local_experts import LocalExperts, find_local_experts

_LOADED = "_moe_groups_loaded"


def note_places(model: nn.Module, layers: Iterable[LocalExperts]) -> None:
    """Keep on the model which experts it was filled with, by the layer's path."""
    setattr(model, _LOADED, {layer.path: layer.numbers for layer in layers})


def check_places(model: nn.Module) -> None:
    """Compare what was noted of ``model`` or a part of it; process groups exist now.

    Where something was noted all ranks take part, and all raise if one of them would.

    Raises:
        InvalidArgumentError: a rank holds the experts of another one.
    """
    noted = [part for part in model.modules() if hasattr(part, _LOADED)]
    if not noted:
        return
    problem = next(filter(None, map(_problem, noted)), None)
    if torch.distributed.is_initialized():
        problems: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, problem)
        problem = next(filter(None, problems), None)
    for part in noted:
        delattr(part, _LOADED)
    if problem:
        raise InvalidArgumentError(problem)


def _problem(model: nn.Module) -> str | None:
    loaded: dict[str, range] = getattr(model, _LOADED)
    for layer in find_local_experts(model, None):
        was = loaded.get(layer.path, layer.numbers)
        if was != layer.numbers:
            rank = torch.distributed.get_rank()
            return (
                f"load_experts gave rank {rank} experts {was.start} to {was.stop - 1} of "
                f"{layer.path!r}, but DeepSpeed's process groups give it {layer.numbers.start} to "
                f"{layer.numbers.stop - 1}: say with load_experts(topology=Topology(...)) how "
                "ranks are ordered, or load into the engine, after deepspeed.initialize."
            )
    return None
