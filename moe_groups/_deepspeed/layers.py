"""DeepSpeed's MoE layers and AutoEP's: their experts, routers and sizes."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_groups._deepspeed.parts import Part


def moe_layer_types() -> tuple[type, ...]:
    """``(deepspeed.moe.layer.MoE,)``; empty if it was not imported, because no module is one."""
    layer = sys.modules.get("deepspeed.moe.layer")
    return () if layer is None else (layer.MoE,)


def is_autoep_layer(module: object) -> bool:
    """Has AutoEP made this module?"""
    autoep = sys.modules.get("deepspeed.module_inject.auto_ep_layer")
    return autoep is not None and isinstance(module, autoep.AutoEPMoELayer)


def layer_experts(module: Any) -> list[nn.Module]:
    """This rank's experts of a DeepSpeed ``MoE`` layer, in the order of their numbers."""
    return list(module.deepspeed_moe.experts.deepspeed_experts)


def layer_parallel_group(module: Any) -> str:
    """Process-group key of a DeepSpeed ``MoE``, which calls it ``expert_group_name``."""
    return str(module.expert_group_name)


def autoep_parallel_group(module: Any) -> str:
    """Process-group key of an AutoEP layer."""
    return str(module.ep_group_name)


class LayerParts(NamedTuple):
    """The parts of a layer of DeepSpeed on this rank.

    Attributes:
        num_experts: number of experts over all ranks.
        ep_size: ranks over which they are distributed.
        parallel_group: key of their process groups.
        experts: the matrices of each expert on this rank, by their name in it.
        router: the router's tensors, by their name in it.
    """

    num_experts: int
    ep_size: int
    parallel_group: str
    experts: Sequence[Mapping[str, Part]]
    router: Mapping[str, Part]


def layer_parts(module: Any) -> LayerParts | None:
    """The parts of a DeepSpeed ``MoE`` or an ``AutoEPMoELayer``; None for another module.

    AutoEP names ``gate_proj``, ``down_proj`` and ``up_proj`` of all its experts ``w1``, ``w2`` and
    ``w3`` (``repack_expert_weights``, ``moe/ep_repack.py``).
    """
    layer: Any = module
    if is_autoep_layer(module):
        fused = {f"{name}.weight": getattr(layer.experts, name) for name in ("w1", "w2", "w3")}
        own = [
            {name: Part.rows(param, number) for name, param in fused.items()}
            for number in range(layer.num_local_experts)
        ]
        router = _wholes(layer.router.gate)
        if layer.router.e_score_correction_bias is not None:
            router["e_score_correction_bias"] = Part.whole(layer.router.e_score_correction_bias)
        sizes = layer.num_experts, layer.ep_size, layer.ep_group_name
        return LayerParts(*sizes, own, router)
    if not isinstance(module, moe_layer_types()):
        return None
    own = [_wholes(expert) for expert in layer_experts(layer)]
    router = _wholes(layer.deepspeed_moe.gate.wg)
    return LayerParts(layer.num_experts, layer.ep_size, layer.expert_group_name, own, router)


def _wholes(module: nn.Module) -> dict[str, Part]:
    return {name: Part.whole(param) for name, param in module.named_parameters()}


def gather_listed_experts(model: nn.Module) -> None:
    """Let ZeRO-3 gather all experts of a layer together if each is a module of its own.

    It gathers a module when it is called. If a rank has no token for an expert, it does not call
    the expert, and the other ranks wait for it. DeepSpeed's ``leaf_module`` knows three classes of
    transformers; here each layer with a list of experts becomes a leaf.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and _is_of_experts(path, module):
            while path and type(module).forward is nn.Module.forward:  # nobody calls a list
                path = path.rpartition(".")[0]
                module = model.get_submodule(path)
            vars(module)["_z3_leaf"] = True  # set_z3_leaf_modules chooses by class


def _is_of_experts(path: str, module: nn.Module) -> bool:
    """Is it a list of experts by its name, or by the numbers that they are tagged with?"""
    if "expert" in path.rpartition(".")[2]:
        return True
    numbers = [
        {getattr(p, "expert_number", None) for p in e.parameters()} for e in module.children()
    ]
    found = {number for own in numbers for number in own}
    return None not in found and len(found) == len(numbers) == sum(map(len, numbers)) > 1


class LayerRouter(NamedTuple):
    """The router of a layer of DeepSpeed.

    Attributes:
        num_experts: number of experts over all ranks.
        module: chooses the experts.
        logits: the part of an AutoEP router that returns its logits. A ``TopKGate`` has none: it
            multiplies by the weight of ``wg`` itself, so no hook of ``wg`` ever runs.
    """

    num_experts: int
    module: nn.Module
    logits: nn.Module | None


def layer_router(module: Any) -> LayerRouter | None:
    """The router of a DeepSpeed ``MoE`` or an ``AutoEPMoELayer``; None for another module."""
    if is_autoep_layer(module):
        return LayerRouter(module.num_experts, module.router, module.router.gate)
    if isinstance(module, moe_layer_types()):
        layer: Any = module
        return LayerRouter(layer.num_experts, layer.deepspeed_moe.gate, None)
    return None


def give_autoep_bias(layer: Any) -> str:
    """Give an ``AutoEPMoELayer`` the bias that its router adds in the choice; returns its name.

    DeepSpeed refuses ``load_balance_coeff`` in its config, which would make the buffer, because
    nothing would change it; but the layer passes on what it has.
    """
    name = "expert_bias"
    if layer.expert_bias is None:
        del layer.expert_bias
        device = layer.tokens_per_expert.device
        bias = torch.zeros(layer.num_experts, dtype=torch.float32, device=device)
        layer.register_buffer(name, bias)
    return name


def routed(outputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(loss, assignments to each expert, how many were dropped)`` of a gate's outputs.

    ``TopKGate`` returns (loss, capacity, experts, indices, locations, weights, counts), and -1 as
    the index of a dropped assignment (``sharded_moe.py``). Before DeepSpeed 0.19 it is (loss,
    weights, mask, counts), the mask True for what a capacity takes, [tokens, experts, capacity].
    """
    loss, *rest, counts = outputs
    taken = rest[2] >= 0 if len(outputs) == 7 else rest[1]
    counts = counts.to(loss.device)  # before 0.15 on the CPU
    return loss, counts, counts.sum() - taken.sum()


def gate_logits(gate: Any, inputs: Sequence[Any]) -> torch.Tensor:
    """The logits of a ``TopKGate``, which it does not return; without the noise of a policy."""
    return nn.functional.linear(inputs[0].float(), gate.wg.weight.float())
