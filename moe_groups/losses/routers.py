"""Find the routers of a model, and read from a forward pass of one which experts it chose.

Three kinds are known: DeepSpeed's ``MoE`` layers (ours included), the layers of its AutoEP, and the
MoE blocks of ``transformers``, where a module ``gate`` or ``router`` beside ``experts`` chooses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from moe_groups._deepspeed.layers import gate_logits, is_autoep_layer, layer_router, routed
from moe_groups.errors import InvalidArgumentError
from moe_groups.experts.module_tree import ModuleNode, walk
from moe_groups.tags import label_from_path

_LOGITS_CHOOSE = {
    f"{family}SparseMoeBlock"
    for family in ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Olmoe", "FlexOlmo")
}
"""Blocks of transformers 4 that choose the experts themselves, as the top k of the softmax."""


class Routed(NamedTuple):
    """What a router did in one forward pass, on this rank.

    Attributes:
        counts: assignments to each expert, of shape (E,).
        logits: of shape (tokens, experts); None if the router does not return them.
        loss: its load-balancing loss; None if it has none.
        dropped: how many assignments exceeded a capacity; None for none.
    """

    counts: torch.Tensor
    logits: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    dropped: torch.Tensor | int | None = None


Read: TypeAlias = Callable[[Any], Routed]
"""Takes the outputs of a router's forward pass."""


class Router(NamedTuple):
    """A router of the model.

    Attributes:
        label: of its layer: the layer's, or its module path without wrappers.
        experts: number of experts over all ranks.
        layer: the layer or block.
        module: chooses the experts, in its forward pass.
        read: what it chose in that.
        has_loss: it computes a load-balancing loss, and has a capacity.
        logits: module that returns the logits, if ``read`` does not have them.
        score: computes the logits from the inputs of ``module``, if no module returns them.
    """

    label: str
    experts: int
    layer: nn.Module
    module: nn.Module
    read: Read
    has_loss: bool = False
    logits: nn.Module | None = None
    score: Callable[[Any], torch.Tensor] | None = None


def find_routers(model: nn.Module, blocks: bool = True) -> list[Router]:
    """The routers of ``model``, in its order.

    Args:
        blocks: look for those that are not DeepSpeed's too.
    """
    nodes = walk(model)
    found, stop = [], 0
    for index, node in enumerate(nodes):
        if index < stop:  # inside of a layer
            continue
        router = _of_deepspeed(node) or (_of_block(node) if blocks else None)
        if router is not None:
            found.append(router)
            stop = node.stop
    return found


def _label(node: ModuleNode) -> str:
    given = getattr(node.module, "group_label", None)
    return str(given or label_from_path(node.path) or "moe")


def _of_deepspeed(node: ModuleNode) -> Router | None:
    found = layer_router(node.module)
    if found is None:
        return None
    experts, module, logits = found
    own = _label(node), experts, node.module, module
    if is_autoep_layer(node.module):
        return Router(*own, lambda outputs: Routed(outputs[2]), logits=logits)

    def read(outputs: Any) -> Routed:
        loss, counts, dropped = routed(module, outputs)
        return Routed(counts, None, loss, dropped)

    return Router(*own, read, has_loss=True, score=partial(gate_logits, module))


def _of_block(node: ModuleNode) -> Router | None:
    """The router beside ``experts``: it, or for transformers 4 the block, knows k and E."""
    children = node.module._modules
    router = children.get("gate", children.get("router"))
    if router is None or "experts" not in children:
        return None
    kind = type(node.module)
    chooses = kind.__name__ in _LOGITS_CHOOSE and kind.__module__.startswith("transformers.")
    knows: Any = node.module if chooses and not hasattr(router, "top_k") else router
    k = getattr(knows, "top_k", None)
    experts = getattr(knows, "num_experts", getattr(knows, "n_routed_experts", None))
    if not isinstance(k, int) or not isinstance(experts, int):
        return None
    label = _label(node)
    return Router(label, experts, node.module, router, _reader(label, k, experts))


def _reader(label: str, k: int, experts: int) -> Read:
    """Reads (logits, weights, chosen), and what else routers of transformers return.

    That is (chosen, weights) of DeepSeek and (scores, chosen) of GPT-OSS in transformers 4,
    (scores, logits) of Llama 4, and the logits alone.
    """

    def read(outputs: Any) -> Routed:
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        tensors = [one for one in given if isinstance(one, torch.Tensor)]
        chosen = [one for one in tensors if not one.is_floating_point() and one.shape[-1] == k]
        if chosen:
            logits = tensors[0] if len(tensors) > 2 else None
            return Routed(_count(chosen[0], experts), logits)
        logits = tensors[-1]
        if len(tensors) > 2 or logits.shape[-1] != experts:
            shapes = ", ".join(str(tuple(one.shape)) for one in tensors)
            raise InvalidArgumentError(
                f"the router of {label!r} returns tensors of shapes {shapes}, and none has the "
                f"{k} experts that it chose: name your routers in LossTracker(experts={{name: "
                "number of experts}) and call its record in their forward."
            )
        scores = logits if len(tensors) == 2 else logits.float().softmax(-1)
        return Routed(_count(scores.topk(k).indices, experts), logits)

    return read


def _count(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """How often each expert was chosen; unlike ``bincount`` it does not wait for the device.

    Numbers out of range, which mean no expert, are counted at both ends, which are cut off.
    """
    index = chosen.flatten().long().clamp(-1, experts) + 1
    counts = torch.zeros(experts + 2, dtype=torch.long, device=chosen.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))[1:-1]


def summed_entropy(logits: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The entropy of each token's softmax in nats, summed over the tokens, and their number."""
    tokens = logits.numel() // logits.shape[-1]
    return torch.special.entr(logits.softmax(-1, dtype=torch.float32)).sum(), tokens


class Passes:
    """Distinguishes the forward passes of training from those of evaluation.

    The first pass of a re-entrant checkpoint runs without gradients, as evaluation may; so the
    beginning of the whole model's forward pass decides whether there are gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._has_gradients = True
        self._handle = model.register_forward_pre_hook(self._begin)

    def _begin(self, *_: Any) -> None:
        self._has_gradients = torch.is_grad_enabled()

    def trains(self, module: nn.Module) -> bool:
        """Is this forward pass of ``module`` one of training?"""
        return module.training and self._has_gradients

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()


def recomputes() -> bool:
    """Is this forward pass a repetition by activation checkpointing, inside of a backward pass?"""
    return torch._C._current_graph_task_id() != -1
