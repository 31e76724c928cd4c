"""DeepSpeed's MoE layers and AutoEP's: their experts, routers and sizes."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_groups._deepspeed.parts import Part

GATE_BIAS = "weight_bias"
"""Buffer of a gate's ``wg``: the bias in its choice of experts."""
_AUTOEP_BIAS = "expert_bias"


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
    wg = layer.deepspeed_moe.gate.wg
    router = {**_wholes(wg), **{name: Part.whole(buffer) for name, buffer in wg.named_buffers()}}
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


def give_bias(layer: Any) -> tuple[nn.Module, str]:
    """Give a layer's router a bias of 0 in its choice; returns its module, and its name there.

    DeepSpeed refuses ``load_balance_coeff`` in its config, which would make the buffer of an
    ``AutoEPMoELayer``, because nothing would change it; but the layer passes on what it has.
    """
    if not is_autoep_layer(layer):
        from moe_groups._deepspeed.balanced_gate import give_gate_bias

        give_gate_bias(layer)
        return layer.deepspeed_moe.gate.wg, GATE_BIAS
    if layer.expert_bias is None:
        del layer.expert_bias
        device = layer.tokens_per_expert.device
        bias = torch.zeros(layer.num_experts, dtype=torch.float32, device=device)
        layer.register_buffer(_AUTOEP_BIAS, bias)
    return layer, _AUTOEP_BIAS


def bias_problem(layer: Any) -> str | None:
    """Why the gate of a DeepSpeed ``MoE`` cannot get a bias; None if it can."""
    gate = layer.deepspeed_moe.gate
    if layer.deepspeed_moe.use_tutel:
        return "its layer runs on Tutel, which was not tried with a bias: set use_tutel=False"
    if f"{type(gate).__module__}.{type(gate).__name__}" not in _GATES:
        return f"its gate is a {type(gate).__name__} of your own: use DeepSpeed's TopKGate"
    return None


_GATES = (
    "deepspeed.moe.sharded_moe.TopKGate",
    "moe_groups._deepspeed.balanced_gate.BalancedGate",
)


def biases(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """By name in the state dict, the biases that layers of DeepSpeed have or could be given."""
    found: dict[str, torch.Tensor | None] = {}
    for path, module in model.named_modules():
        layer: Any = module
        if is_autoep_layer(module):
            found[f"{path}.{_AUTOEP_BIAS}".removeprefix(".")] = layer.expert_bias
        elif isinstance(module, moe_layer_types()):
            name = f"{path}.deepspeed_moe.gate.wg.{GATE_BIAS}".removeprefix(".")
            found[name] = layer.deepspeed_moe.gate.wg._buffers.get(GATE_BIAS)
    return found


def routed(gate: Any, outputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``(loss, assignments to each expert, how many were dropped)`` of a gate's outputs.

    ``TopKGate`` returns (loss, capacity, experts, indices, locations, weights, counts), and -1 as
    the index of a dropped assignment (``sharded_moe.py``). Before DeepSpeed 0.19 it is (loss,
    weights, mask, counts), the mask True for what a capacity takes, [tokens, experts, capacity].
    Without ``drop_tokens`` the capacity takes all, and nothing is counted: None.
    """
    loss, *rest, counts = outputs
    counts = counts.to(loss.device)  # before 0.15 on the CPU
    if not gate.drop_tokens:
        return loss, counts, None
    taken = rest[2] >= 0 if len(outputs) == 7 else rest[1]
    return loss, counts, counts.sum() - taken.sum()


def gate_logits(gate: Any, inputs: Sequence[Any]) -> torch.Tensor:
    """The logits of a ``TopKGate``, which it does not return; without the noise of a policy."""
    return nn.functional.linear(inputs[0].float(), gate.wg.weight.float())
