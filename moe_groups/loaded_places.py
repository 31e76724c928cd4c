"""Are the experts that were loaded before ``deepspeed.initialize`` those of this rank?

Which rank has which experts is settled by the process groups, which the engine makes.
"""

from collections.abc import Iterable

from torch import nn

from moe_groups._deepspeed.layers import LayerParts, layer_parts
from moe_groups._deepspeed.process_groups import expert_parallel_ranks
from moe_groups.errors import InvalidArgumentError
from moe_groups.local_experts import LocalExperts
from moe_groups.topology import Topology

_LOADED = "_moe_groups_loaded"


def note_places(model: nn.Module, layers: Iterable[LocalExperts]) -> None:
    """Keep on the model by which ranks its layers were filled, by their paths."""
    setattr(model, _LOADED, {layer.path: layer.assumed for layer in layers if layer.assumed})


def check_places(model: nn.Module) -> None:
    """Compare what was noted of ``model`` or a part of it; process groups exist now.

    No communication: who has not loaded anything would not take part. Ranks that share out
    experts among them look at each other's places, and say the same.

    Raises:
        InvalidArgumentError: a rank of this expert-parallel group holds another one's experts.
    """
    for part in model.modules():
        noted: dict[str, Topology] = getattr(part, _LOADED, {})
        for path, module in part.named_modules() if noted else ():
            layer = layer_parts(module) if path in noted else None
            if layer is not None and (problem := _problem(path, layer, noted[path])):
                raise InvalidArgumentError(problem)


def _problem(path: str, layer: LayerParts, assumed: Topology) -> str | None:
    size = layer.num_experts // layer.ep_size
    for place, rank in enumerate(expert_parallel_ranks(layer.parallel_group)):
        was = assumed.expert_rank(rank)
        if was != place:
            return (
                f"load_experts gave rank {rank} experts {was * size} to {was * size + size - 1} of "
                f"{path!r}, but by DeepSpeed's process groups it has {place * size} to "
                f"{place * size + size - 1}: say with load_experts(topology=Topology(...)) how "
                "ranks are ordered, or load into the engine, after deepspeed.initialize."
            )
    return None
