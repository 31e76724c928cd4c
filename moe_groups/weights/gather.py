"""``gather_model``: the weights of all ranks on rank 0, as ``save_pretrained`` takes them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moe_groups._common.arguments import checked
from moe_groups._common.warn import warn
from moe_groups._deepspeed.autoep.source_layers import SourceLayer, source_layers
from moe_groups._deepspeed.engines import InitializedEngine
from moe_groups._deepspeed.layers import (
    autoep_parallel_group,
    layer_experts,
    layer_parallel_group,
    moe_layer_types,
)
from moe_groups._deepspeed.parts import gathered, ready_to_gather
from moe_groups._deepspeed.process_groups import gather_from_ep_group
from moe_groups.errors import InvalidArgumentError
from moe_groups.weights.local_experts import refuse_parts
from moe_groups.weights.write import Named

_EXPERT = re.compile(r"((?:(.+)\.)?deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..+)")


@checked
@torch.no_grad()
def gather_model(model: InitializedEngine, *, exclude_frozen_parameters: bool = False) -> Named:
    """Gather the weights of an engine's model on rank 0, with the experts of all ranks.

    Call it on all ranks, and save what rank 0 gets. Names, shapes and dtypes are those of the
    model without expert parallelism: layers that AutoEP has replaced get the names of the
    transformers model (``mlp.experts.gate_up_proj``), and the experts of DeepSpeed's layers are
    numbered as with ``ep_size=1``. It works with ZeRO-1, ZeRO-2, ZeRO-3 and BF16_Optimizer, with
    and without ``stage3_gather_16bit_weights_on_model_save``.

    It goes through the model a tensor at a time, so that the other ranks need memory for one
    tensor; rank 0 needs CPU memory for the whole model.

    Args:
        model: the engine, which ``deepspeed.initialize`` and Accelerate's ``prepare`` return.
        exclude_frozen_parameters: leave out what does not train, as to save adapters only.

    Returns:
        The weights by name, in CPU memory; empty on the other ranks.

    Raises:
        InvalidArgumentError: the model is a pipeline or tensor-parallel; or AutoEP's layers are
            in no transformers model, not those that its config makes, or have a tensor that it
            does not have.

    Warns:
        UserWarning: the bias of :func:`balance_experts` is left out, for which a model without
            ``e_score_correction_bias`` has no place.

    Example:
        >>> weights = gather_model(engine)                                # doctest: +SKIP
        >>> if torch.distributed.get_rank() == 0:                         # doctest: +SKIP
        ...     engine.module.save_pretrained("trained", state_dict=weights)
    """
    module = model.module
    refuse_parts(module, "gather_model")
    state = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
        and not (exclude_frozen_parameters and _is_frozen(tensor))
    }
    sources = source_layers(model)
    layers: dict[str, Named] = {}
    for path, source in sources.items():
        inside = [name for name in state if name.startswith(f"{path}.")]
        layers[path] = {name.removeprefix(f"{path}."): state.pop(name) for name in inside}
        _refuse_unknown(path, source, layers[path])
    gathering = _Gathering(module)
    with ready_to_gather(model):
        for path, own in layers.items():
            gathering.add_autoep(path, sources[path], own)
        for name, tensor in state.items():
            gathering.add(name, tensor)
    compiled = "_orig_mod."  # what torch.compile puts before the names of a module
    return {name.replace(compiled, ""): tensor for name, tensor in gathering.whole.items()}


def _is_frozen(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _refuse_unknown(path: str, source: SourceLayer, inside: Named) -> None:
    known = {
        id(tensor)
        for name, tensor in inside.items()
        if name.startswith("experts.") or source.name(name)
    }
    for name, tensor in inside.items():
        if name == "expert_bias" and tensor.any():
            warn(
                f"{path}.expert_bias is left out, because the model of transformers has no such "
                "bias: without it the router chooses other experts (balance_experts).",
                UserWarning,
            )
        elif name != "expert_bias" and id(tensor) not in known:
            raise InvalidArgumentError(
                f"{path}.{name} is AutoEP's own: the model of transformers has no such tensor in "
                "which gather_model could save it."
            )


class _Gathering:
    """One walk through a model's tensors.

    Attributes:
        whole: what rank 0 has by now.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.whole: Named = {}
        self._known: dict[int, list[torch.Tensor]] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor of ``state_dict``; of an expert of DeepSpeed's, those of all ranks."""
        expert = _EXPERT.fullmatch(name)
        layer: Any = self.module.get_submodule(expert[2] or "") if expert else None
        if expert is None or not isinstance(layer, moe_layer_types()):
            self.whole.update((name, copy) for copy in self._copies(tensor))
            return
        for ep_rank, part in enumerate(self._copies(tensor, layer_parallel_group(layer))):
            number = ep_rank * len(layer_experts(layer)) + int(expert[3])
            self.whole[f"{expert[1]}{number}{expert[4]}"] = part

    def add_autoep(
        self, path: str, source: SourceLayer, inside: Mapping[str, torch.Tensor]
    ) -> None:
        """Add a layer of AutoEP."""
        group = autoep_parallel_group(self.module.get_submodule(path))
        experts: Named = {}
        for name, tensor in inside.items():
            kind, _, matrix = name.partition(".")
            if kind == "experts":
                if parts := self._copies(tensor, group):
                    experts[matrix] = torch.cat(parts)
                self._known.pop(id(tensor))
            elif known := source.name(name):
                self.add(f"{path}.{known}", tensor)
        self.whole |= {f"{path}.{name}": value for name, value in source.unpack(experts).items()}

    def _copies(self, tensor: torch.Tensor, parallel_group: str = "") -> list[torch.Tensor]:
        """On rank 0 the tensor, or those of the EP group in place of it; once for all its names."""
        if id(tensor) not in self._known:
            with gathered(tensor) as values:
                first = [values] if torch.distributed.get_rank() == 0 else []
                parts = gather_from_ep_group(values, parallel_group) if parallel_group else first
                self._known[id(tensor)] = [part.to("cpu", copy=True) for part in parts]
        return self._known[id(tensor)]
