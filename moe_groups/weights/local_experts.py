"""A rank's part of each MoE layer of a model: its experts and their tensors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import distributed, nn

from moe_groups._deepspeed.engines import is_engine, is_pipeline
from moe_groups._deepspeed.layers import LayerParts, layer_parts
from moe_groups._deepspeed.parts import Part
from moe_groups._deepspeed.process_groups import (
    expert_parallel_ranks,
    expert_place,
    tensor_parallel_size,
)
from moe_groups.errors import InvalidArgumentError
from moe_groups.experts.module_tree import walk
from moe_groups.tags import shape_of
from moe_groups.topology import Topology, world_size
from moe_groups.weights.names import ROUTER


@dataclass(frozen=True)
class LocalExperts:
    """One MoE layer as this rank has it.

    Attributes:
        path: of the layer in the model.
        total: experts over all ranks.
        first: number of this rank's first expert among them.
        experts: the matrices of each of this rank's experts by their name in it; parts of a
            parameter that holds all of them.
        router: tensors of the router, by their name in it.
        writes: the rank is the first of those that hold the same experts.
        assumed: the ranks from which this was computed; None if process groups exist.
    """

    path: str
    total: int
    first: int
    experts: Sequence[Mapping[str, Part]]
    router: Mapping[str, Part]
    writes: bool
    assumed: Topology | None

    @property
    def numbers(self) -> range:
        """Global numbers of this rank's experts."""
        return range(self.first, self.first + len(self.experts))

    @property
    def tensors(self) -> frozenset[int]:
        """``id`` of each parameter or buffer that these are, or are parts of."""
        return frozenset(
            id(part.tensor) for own in (*self.experts, self.router) for part in own.values()
        )


def module_of(model: Any) -> nn.Module:
    """The module that ``model`` is, or that the engine ``model`` steps."""
    module: nn.Module = model.module if is_engine(model) else model
    return module


def refuse_parts(module: nn.Module, name: str) -> None:
    """Refuse a model of which rank 0 has a part.

    Raises:
        InvalidArgumentError: it is a pipeline, or tensor-parallel.
    """
    if is_pipeline(module) or tensor_parallel_size() > 1:
        raise InvalidArgumentError(
            f"{name} writes what is dense from rank 0, which under tensor or pipeline "
            "parallelism has a part of it."
        )


def find_local_experts(model: nn.Module, topology: Topology | None) -> list[LocalExperts]:
    """The layers of DeepSpeed (ours and AutoEP's included) in the model's order.

    And the blocks of transformers with one tensor for all experts, which every rank has whole.

    Args:
        topology: the ranks, while DeepSpeed's expert groups do not exist; None: all ranks of
            ``torch.distributed``, as DeepSpeed distributes experts by default.

    Raises:
        InvalidArgumentError: the number of this rank is not known.
    """
    found = []
    for node in walk(model):
        parts = layer_parts(node.module)
        if parts is None:
            if block := _block_of_transformers(node.path, node.module):
                found.append(block)
            continue
        ep_rank, writes, assumed = _place(parts, topology, node.path)
        local = parts.num_experts // parts.ep_size
        found.append(
            LocalExperts(
                node.path,
                parts.num_experts,
                ep_rank * local,
                parts.experts,
                parts.router,
                writes,
                assumed,
            )
        )
    return found


def _place(
    parts: LayerParts, topology: Topology | None, path: str
) -> tuple[int, bool, Topology | None]:
    """This rank in its EP group, and whether it is the first rank that holds its experts."""
    known = expert_place(parts.parallel_group)
    ep_size = parts.ep_size
    if known is not None:
        return *known, None
    world = world_size()
    if world is None:
        if ep_size == 1:
            return 0, True, None
        raise InvalidArgumentError(
            f"the experts of {path!r} are distributed over {ep_size} ranks (ep_size), and the "
            "number of this rank is not known: call deepspeed.init_distributed() first."
        )
    if topology is None:
        topology = Topology(world_size=world, ep_size=ep_size)
    if topology.world_size != world:
        raise InvalidArgumentError(
            f"topology has world_size={topology.world_size}, but there are {world} ranks."
        )
    here, rank = replace(topology, ep_size=ep_size), distributed.get_rank()
    return here.expert_rank(rank), here.group_of("expert_data", rank)[0] == rank, here


def _block_of_transformers(path: str, module: nn.Module) -> LocalExperts | None:
    """A block of transformers 5 whose ``experts`` hold one tensor for all; None for another."""
    experts = module._modules.get("experts")
    own: dict[str, Any] = dict(experts._parameters) if experts is not None else {}
    if own.keys() != {"gate_up_proj", "down_proj"}:
        return None
    both, down = own["gate_up_proj"], own["down_proj"]
    (total, *sizes), (_, hidden, inner) = shape_of(both), shape_of(down)
    if sizes != [2 * inner, hidden] or not getattr(experts, "is_concatenated", True):
        return None
    parts = [
        {
            "gate_proj.weight": Part.rows(both, number, slice(inner)),
            "up_proj.weight": Part.rows(both, number, slice(inner, None)),
            "down_proj.weight": Part.rows(down, number),
        }
        for number in range(total)
    ]
    gate = module._modules.get(ROUTER)
    state: Mapping[str, Any] = gate.state_dict(keep_vars=True) if gate is not None else {}
    router = {name: Part.whole(tensor) for name, tensor in state.items()}
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    return LocalExperts(path, total, 0, parts, router, first, None)


def dense_tensors(
    model: nn.Module, layers: list[LocalExperts]
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Parameters and saved buffers outside of the layers; all names of tied ones."""
    taken = frozenset().union(*(layer.tensors for layer in layers))
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    state: Mapping[str, object] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in taken:
            names.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
    for key, tensor in tensors.items():
        yield names[key], tensor


_LOADED = "_moe_groups_loaded"


def note_places(model: nn.Module, layers: Iterable[LocalExperts]) -> None:
    """Store on the model the ranks for which its layers were loaded, by their paths."""
    setattr(model, _LOADED, {layer.path: layer.assumed for layer in layers if layer.assumed})


def check_places(model: nn.Module) -> None:
    """Compare the stored ranks of ``model`` or a part of it with the process groups.

    No communication, because ranks that have not loaded anything would not take part. Ranks of
    an EP group compute each other's places, and so raise the same.

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
