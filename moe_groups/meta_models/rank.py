"""One rank's part of a whole model: its pipeline stage, tensor slices and experts.

Only the sizes matter: the result is grouped and its memory predicted, but it never runs forward.
"""

import copy

from torch import nn

from moe_groups.errors import InvalidArgumentError, ParameterInputError
from moe_groups.experts.module_tree import ModuleNode, walk
from moe_groups.meta_models.expert_layers import ExpertLayer, find_expert_layers
from moe_groups.meta_models.local_experts import ExpertForm, keep_local_experts, slice_dense


def shard_for_rank(
    model: nn.Module,
    *,
    ep_size: int = 1,
    tp_size: int = 1,
    pp_size: int = 1,
    pp_rank: int = 0,
    experts: ExpertForm = "list",
) -> nn.Module:
    """A copy of one rank's part of ``model``, with tagged experts.

    ``create_moe_param_groups`` groups the copy as it groups a real rank's model; parameters
    have their names in the whole model. Approximations:

    * Pipeline: the number of decoder layers (of the largest ``ModuleList``) is divided as evenly
      as possible over the stages, first stages first, whatever the layers' sizes. Modules before
      them in the model are on the first stage, modules after them on the last; so are a vision
      tower and a second stack. Tied embeddings are one parameter on a stage, and the first and
      the last stage have one each.
    * Tensor parallel: see :func:`slice_dense`; experts are whole.
    * Experts: those of EP rank 0; all EP ranks have the same sizes. Beside the decoder layers,
      experts that ``ep_size`` does not divide are whole on every rank, as dense parameters
      (:func:`undivided_layers`).

    Args:
        model: a whole model, as from ``load_model``. It is not changed.
        ep_size: ranks over which every layer's experts are distributed.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline stages.
        pp_rank: the stage to keep.
        experts: "list": each expert is a module with matrices of its own, as in DeepSpeed's
            MoE layer, with ``gate_up_proj`` cut in two. "fused": one tensor for all experts.

    Raises:
        InvalidArgumentError: ``pp_rank`` is no stage, there are more stages than layers, or
            ``ep_size`` does not divide a decoder layer's experts, or there are none to divide.
        ParameterInputError: the model has experts in an unknown form.
    """
    if not 0 <= pp_rank < pp_size:
        raise InvalidArgumentError(f"pp_rank={pp_rank!r} is no stage of {pp_size}: use 0 to pp - 1")
    whole = {layer.path for layer in undivided_layers(model, ep_size)}
    copied = copy.deepcopy(model)
    if pp_size > 1:
        _keep_stage(copied, pp_size, pp_rank)
    nodes = walk(copied)
    layers = [layer for layer in find_expert_layers(nodes) if layer.path not in whole]
    inside = {id(param) for layer in layers for param in layer.params()}
    for node in nodes if tp_size > 1 else ():
        if not any(id(param) in inside for _, param in node.params):
            slice_dense(node, tp_size)
    for layer in layers:
        keep_local_experts(layer, ep_size, experts)
    return copied


def undivided_layers(model: nn.Module, ep_size: int) -> list[ExpertLayer]:
    """The layers whose experts stay whole, as in a vision tower with fewer experts than ranks.

    Raises:
        InvalidArgumentError: ``ep_size`` does not divide a decoder layer's experts, or there
            are no experts.
    """
    nodes = walk(model)
    layers = find_expert_layers(nodes)
    if ep_size > 1 and not layers:
        raise InvalidArgumentError(
            f"ep_size={ep_size} needs experts, and there are none in {type(model).__name__} that "
            "are known by their form: tensors of shape (experts, ..., ...) or a list of modules, "
            "called experts. For a dense model leave it out; for experts in another form write a "
            "'module:function' that builds one rank's model with tagged experts."
        )
    undivided = [layer for layer in layers if layer.indivisible(ep_size)]
    stack = _decoder_stack(nodes)
    decoder = "" if stack is None else f"{nodes[stack].path}."
    for layer in undivided:
        if layer.path.startswith(decoder) or len(undivided) == len(layers):
            raise InvalidArgumentError(
                f"ep_size={ep_size} does not divide the {layer.indivisible(ep_size)} experts of "
                f"{layer.path!r}."
            )
    return undivided


# ---- pipeline -------------------------------------------------------------------------


def _keep_stage(model: nn.Module, pp_size: int, pp_rank: int) -> None:
    """Remove the modules of other stages from ``model``."""
    nodes = walk(model)
    stack = _decoder_stack(nodes)
    if stack is None:
        raise ParameterInputError(
            "the model has no nn.ModuleList of layers to cut into stages: use pp_size=1."
        )
    layers = [node for node in nodes[: nodes[stack].stop] if node.parent == stack]
    if pp_size > len(layers):
        raise InvalidArgumentError(
            f"pp_size={pp_size} is more than the {len(layers)} layers of {nodes[stack].path!r}."
        )
    share, rest = divmod(len(layers), pp_size)
    first = pp_rank * share + min(pp_rank, rest)
    last = first + share + (pp_rank < rest)
    for node in layers[:first] + layers[last:]:
        delattr(nodes[stack].module, node.slot)
    _keep_ends(nodes, stack, first_stage=pp_rank == 0, last_stage=pp_rank == pp_size - 1)


def _keep_ends(nodes: list[ModuleNode], stack: int, first_stage: bool, last_stage: bool) -> None:
    """Remove the modules before the stack except on the first stage, after it on the last."""
    chain = [stack]
    while chain[-1] > 0:
        chain.append(nodes[chain[-1]].parent)
    for parent in chain[1:]:
        module = nodes[parent].module
        before = True
        for slot, child in list(module._modules.items()):
            if any(child is nodes[index].module for index in chain):
                before = False
            elif not (first_stage if before else last_stage):
                delattr(module, slot)
        if not first_stage:
            for name in list(module._parameters):
                delattr(module, name)


def _decoder_stack(nodes: list[ModuleNode]) -> int | None:
    """Index of the ``ModuleList`` with the most elements that is not inside another one."""
    best, most, index = None, 0, 0
    while index < len(nodes):
        if not isinstance(nodes[index].module, nn.ModuleList):
            index += 1
            continue
        subtree = nodes[index : nodes[index].stop]
        size = sum(param.numel() for node in subtree for _, param in node.params)
        if size > most:
            best, most = index, size
        index = nodes[index].stop
    return best
