"""Qualified names of modules and parameters as the user wrote them, without wrappers.

``torch.compile``, DDP, activation checkpointing and PEFT put modules of their own into
the tree; labels and patterns would change with each. Wrappers are recognised by class
name, so that none of these packages needs to be imported. Only a wrapper's own slot is
left out of the path: a user's submodule that happens to be called ``module`` stays.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from typing import NamedTuple, cast

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


class Columns(NamedTuple):
    """The parameters of a model in its order, each once.

    Attributes:
        names: qualified names.
        params: the parameters.
        indices: of the modules, by their class.
    """

    names: list[str]
    params: list[torch.Tensor]
    indices: dict[type[nn.Module], list[int]]

    def modules(self, types: tuple[type, ...]) -> list[int]:
        """Indices of the modules of these types, in order."""
        found = [own for kind, own in self.indices.items() if issubclass(kind, types)]
        return found[0] if len(found) == 1 else sorted(chain.from_iterable(found))


class ModuleNode(NamedTuple):
    """One module of the tree.

    Attributes:
        module: the module itself.
        path: its qualified name without wrappers; "" for the root.
        parent: index of the parent in the walk's order; -1 for the root.
        slot: the name under which the parent holds it.
        columns: the parameters of all modules.
        row: where its parameters begin there.
        own_stop: where its own end, and those of its children begin.
        row_stop: where those of the last descendant end.
        stop: index behind the last descendant, so that ``nodes[i:stop]`` is the subtree.
    """

    module: nn.Module
    path: str
    parent: int
    slot: str
    columns: Columns
    row: int
    own_stop: int
    row_stop: int
    stop: int

    @property
    def params(self) -> list[tuple[str, torch.Tensor]]:
        """Its own parameters as ``(qualified name, parameter)``."""
        names, params, _ = self.columns
        own = slice(self.row, self.own_stop)
        return list(zip(names[own], params[own], strict=True))


def wrapper_slots(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the children that such a module only wraps, by the class names it derives from."""
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


_VISITED = cast(ModuleNode, None)
"""Stands for a module until those below it are known."""


def walk(model: nn.Module) -> list[ModuleNode]:
    """All modules in the order of ``model.modules()``, each once, with unwrapped names.

    A parameter that several modules share is listed with the first of them.
    """
    nodes: list[ModuleNode] = []
    _visit({"": model}, ("",), "", -1, nodes, Columns([], [], {}), set())
    return nodes


def _visit(
    children: Mapping[str, nn.Module | None],
    left_out: Collection[str],
    path: str,
    parent: int,
    nodes: list[ModuleNode],
    columns: Columns,
    seen: set[int],
) -> None:
    """Walk the subtrees of children; ``left_out`` are those whose slots no path has."""
    prefix = f"{path}." if path else ""
    names, params, indices = columns
    new = tuple.__new__  # a model has tens of thousands of modules
    for slot, module in children.items():
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        own = path if slot in left_out else prefix + slot
        row = len(params)
        for name, param in module._parameters.items():
            if param is not None and id(param) not in seen:
                seen.add(id(param))
                names.append(f"{own}.{name}" if own else name)
                params.append(param)
        index, stop, kind = len(nodes), len(params), type(module)
        if kind in indices:
            indices[kind].append(index)
        else:
            indices[kind] = [index]
        row_stop = stop
        nodes.append(_VISITED)
        if below := module._modules:
            slots = below if slot == "modules_to_save" else wrapper_slots(kind)
            _visit(below, slots, own, index, nodes, columns, seen)
            row_stop = len(params)
        node = (module, own, parent, slot, columns, row, stop, row_stop, len(nodes))
        nodes[index] = new(ModuleNode, node)


def named_parameters(nodes: list[ModuleNode]) -> Iterator[tuple[str, torch.Tensor]]:
    """``(qualified name, parameter)`` of all modules in order, each parameter once."""
    for node in nodes:
        yield from node.params
