"""What AutoEP's layers were before: the names and layouts of the model of transformers."""

import copy
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_groups._deepspeed.layers import is_autoep_layer
from moe_groups.errors import InvalidArgumentError


class SourceLayer(NamedTuple):
    """One MoE layer as the model had it before AutoEP replaced it.

    Attributes:
        renamed: beginning of a name in AutoEP's layer to that in the model's; without its experts.
        experts: name of the module that held the experts.
        gate: of the gate projections in it; also of the up projections if ``up`` is None.
        down: of the down projections.
        up: of the up projections.
        numbered: each expert was a module of its own, in a ``ModuleList``.
        transposed: the matrices of all experts are stored the other way round.
    """

    renamed: Mapping[str, str]
    experts: str
    gate: str
    down: str
    up: str | None
    numbered: bool
    transposed: bool

    def name(self, inside: str) -> str | None:
        """The model's name of a tensor of AutoEP's layer, without its experts.

        None for the second name of the router, by which AutoEP records its logits.
        """
        for own, theirs in self.renamed.items():
            if inside.startswith(own):
                return theirs + inside.removeprefix(own)
        return None

    def unpack(self, fused: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The experts of all ranks with the model's names, from AutoEP's ``w1``, ``w2``, ``w3``."""
        merged: dict[str, list[torch.Tensor]] = {}
        for own, name in (("w1", self.gate), ("w3", self.up or self.gate), ("w2", self.down)):
            if own in fused:
                merged.setdefault(name, []).append(fused[own])
        found = {name: torch.cat(parts, 1) for name, parts in merged.items()}
        if self.transposed:
            found = {name: whole.transpose(1, 2).contiguous() for name, whole in found.items()}
        if not self.numbered:
            return {f"{self.experts}.{name}": whole for name, whole in found.items()}
        return {
            f"{self.experts}.{number}.{name}.weight": matrix.clone()
            for name, whole in found.items()
            for number, matrix in enumerate(whole)
        }


def source_layers(engine: Any) -> dict[str, SourceLayer]:
    """Path of each AutoEP layer of the engine's model to the layer that it replaced.

    AutoEP forgets the names, so its own search for layers is run again, on the model as its class
    and config make it, without memory.

    Raises:
        InvalidArgumentError: the model is not one of transformers, or its class and config make
            other layers than it has.
    """
    paths = [path for path, part in engine.module.named_modules() if is_autoep_layer(part)]
    if not paths:
        return {}
    from deepspeed.module_inject.auto_ep import AutoEP

    source = _source_of(engine.module)
    config = copy.copy(engine._config.expert_parallel_config)  # AutoEP fills it in
    other = (
        "the class and the config of the model make other MoE layers than AutoEP has replaced, so "
        "the names of their weights are not known (was model.config changed after that?): "
    )
    try:
        parser = AutoEP(source, config)
        # early_groups.py may have begun at the model of transformers inside
        root = next(path for path, part in source.named_modules() if part is parser.model)
        specs = {spec.moe_module_name: spec for spec in parser.ep_parser()}
        found = {f"{root}.{path}".lstrip("."): spec for path, spec in specs.items()}
    except ValueError as error:
        raise InvalidArgumentError(f"{other}{error}") from error
    if missing := [path for path in paths if path not in found]:
        raise InvalidArgumentError(f"{other}{missing[0]!r} is none.")
    return {path: _source_layer(source.get_submodule(path), found[path]) for path in paths}


def transformers_model(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of the first model of transformers that ``module`` is or has inside."""
    known: Any = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    found = ((path, part) for path, part in module.named_modules() if isinstance(part, known))
    return next(found, None)


def _source_of(module: nn.Module) -> nn.Module:
    """The model before AutoEP, without memory, with the paths that it has in ``module``."""
    path, model = transformers_model(module) or ("", None)
    if model is None:
        raise InvalidArgumentError(
            f"AutoEP has replaced layers of {type(module).__name__}, in which there is no "
            "PreTrainedModel of transformers: the names of their weights are not known."
        )
    config: Any = copy.deepcopy(model.config)
    with torch.device("meta"):
        source: nn.Module = type(model)(config)
    for part in reversed(path.split(".") if path else []):
        outer = nn.Module()
        outer.add_module(part, source)
        source = outer
    source.config = config
    return source


def _source_layer(layer: nn.Module, spec: Any) -> SourceLayer:
    from deepspeed.moe.fused_expert_layout import classify_fused_gate_up_layout

    bias = "e_score_correction_bias"
    renamed = {"router.gate.": f"{spec.router_name}."}
    if spec.e_score_correction_bias_path is not None:
        renamed[f"router.{bias}"] = f"{spec.e_score_correction_bias_path}.{bias}".lstrip(".")
    if spec.has_shared_experts:
        renamed["shared_experts."] = f"{spec.shared_experts_name}."
    if spec.shared_experts_gate_name:
        renamed["shared_experts_gate."] = f"{spec.shared_experts_gate_name}."
    numbered, transposed = spec.expert_storage == "module_list", False
    if not numbered and spec.expert_w3_name is None:
        experts: Any = getattr(layer, spec.experts_name)
        shapes = (
            getattr(experts, name).shape for name in (spec.expert_w1_name, spec.expert_w2_name)
        )
        layout = classify_fused_gate_up_layout(*map(tuple, shapes))
        transposed = layout is not None and layout.needs_transpose
    names = spec.experts_name, spec.expert_w1_name, spec.expert_w2_name, spec.expert_w3_name
    return SourceLayer(renamed, *names, numbered, transposed)
