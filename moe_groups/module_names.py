"""Qualified names of modules and parameters as the user wrote them, without wrappers.

``torch.compile``, DDP, activation checkpointing and PEFT put modules of their own into
the tree; labels and patterns would change with each. Wrappers are recognised by class
name, so that none of these packages needs to be imported. Only a wrapper's own slot is
left out of the path: a user's submodule that happens to be called ``module`` stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

# class name -> names of the child slots that are not part of the user's path
_SLOTS: dict[str, tuple[str, ...]] = {
    "OptimizedModule": ("_orig_mod",),  # torch.compile
    "DistributedDataParallel": ("module",),
    "DataParallel": ("module",),
    "AveragedModel": ("module",),  # torch.optim.swa_utils
    "ActivationWrapper": ("_checkpoint_wrapped_module",),  # torch checkpoint_wrapper
    "FullyShardedDataParallel": ("_fsdp_wrapped_module",),
    "DeepSpeedEngine": ("module",),
    "PeftModel": ("base_model",),
    "BaseTuner": ("model",),  # PEFT's LoraModel and its siblings
    "BaseTunerLayer": ("base_layer",),
    # PEFT's modules_to_save: a frozen original beside a dict of copies, one per adapter
    "ModulesToSaveWrapper": ("original_module", "modules_to_save"),
}
_PACKAGES = ("torch", "deepspeed", "peft")
_SLOT_CACHE: dict[type, tuple[str, ...]] = {}


@dataclass(slots=True)
class ModuleNode:
    """One module of the tree.

    Attributes:
        module: the module itself.
        path: its qualified name without wrappers; "" for the root.
        parent: index of the parent in the walk's order; -1 for the root.
        slot: the name under which the parent holds it.
        params: its own parameters as ``(qualified name, parameter)``.
        stop: index behind the last descendant, so that ``nodes[i:stop]`` is the subtree.
    """

    module: nn.Module
    path: str
    parent: int
    slot: str
    params: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    stop: int = 0


def wrapper_slots(module: nn.Module) -> tuple[str, ...]:
    """Names of the children that ``module`` only wraps, by the class names it derives from."""
    kind = type(module)
    known = _SLOT_CACHE.get(kind)
    if known is None:
        known = tuple(
            slot
            for base in kind.__mro__
            if base.__module__.partition(".")[0] in _PACKAGES
            for slot in _SLOTS.get(base.__name__, ())
        )
        _SLOT_CACHE[kind] = known
    return known


def walk(model: nn.Module) -> list[ModuleNode]:
    """All modules in the order of ``model.modules()``, each once, with unwrapped names.

    A parameter that several modules share is listed with the first of them.
    """
    nodes: list[ModuleNode] = []
    seen_modules: set[int] = set()
    seen_params: set[int] = set()

    def visit(module: nn.Module, path: str, parent: int, slot: str) -> None:
        seen_modules.add(id(module))
        index = len(nodes)
        node = ModuleNode(module, path, parent, slot)
        nodes.append(node)
        for name, param in module._parameters.items():
            if param is not None and id(param) not in seen_params:
                seen_params.add(id(param))
                node.params.append((_join(path, name), param))
        slots = tuple(module._modules) if slot == "modules_to_save" else wrapper_slots(module)
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen_modules:
                visit(child, path if name in slots else _join(path, name), index, name)
        node.stop = len(nodes)

    visit(model, "", -1, "")
    return nodes


def named_parameters(nodes: list[ModuleNode]) -> Iterator[tuple[str, torch.Tensor]]:
    """``(qualified name, parameter)`` of all modules in order, each parameter once."""
    for node in nodes:
        yield from node.params


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
