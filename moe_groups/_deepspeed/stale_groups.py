"""Groups that were made before ``deepspeed.initialize`` replaced modules of the model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from moe_groups.tags import is_expert_parameter

MAKE_LATER = (
    "make groups after the modules were replaced (AutoEP does that inside of "
    "deepspeed.initialize): deepspeed.initialize(optimizer=lambda params: "
    "torch.optim.AdamW(create_moe_param_groups(model)), ...)"
)


def stale_problem(
    model: Iterable[tuple[str, torch.Tensor]], groups: Sequence[Mapping[str, Any]], wrapped: bool
) -> str | None:
    """Why experts of ``model`` will not be trained, or not as experts; None if they will.

    DeepSpeed puts what replaces a parameter into the group of that parameter, if it finds it
    in an optimizer; in the result of a callable it does not look.

    Args:
        model: names and parameters, as they are now.
        groups: the optimizer's.
        wrapped: will ZeRO-1/2 or another wrapper look for groups of experts?
    """
    homes = {id(param): group for group in groups for param in group["params"]}
    live = set()
    lost, unmarked = [], []
    for name, param in model:
        live.add(id(param))
        if param.requires_grad and is_expert_parameter(param):
            group = homes.get(id(param))
            if group is None:
                lost.append(name)
            elif wrapped and not group.get("moe"):
                unmarked.append(name)
    dead = [key for key in homes if key not in live]
    if lost and dead:
        return (
            f"expert parameter {lost[0]} and {len(lost) - 1} more are in no group, so nothing "
            f"would train them, and {len(dead)} tensors of the groups are not in the model: "
            f"{MAKE_LATER}."
        )
    if unmarked and not any(group.get("moe") for group in groups):
        return (
            f"expert parameter {unmarked[0]} and {len(unmarked) - 1} more are in groups that are "
            "not marked moe. Make groups with create_moe_param_groups; if you did, "
            f"{MAKE_LATER}."
        )
    return None
