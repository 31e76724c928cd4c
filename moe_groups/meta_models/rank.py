"""One rank's part of a whole model: its pipeline stage, tensor slices and experts.

Only the sizes matter: the result is grouped and its memory predicted, but it never runs forward.
"""

import copy
import re
from typing import Literal

from torch import nn

from moe_groups.errors import InvalidArgumentError, ParameterInputError
from moe_groups.experts.module_tree import ModuleNode, walk
from moe_groups.meta_models.experts import ExpertForm, find_expert_layers, keep_local_experts
from moe_groups.meta_models.slices import is_replicated, shrink, slice_projection
from moe_groups.tags import is_expert_parameter

_POSITIONS = re.compile(r"pos|wpe|type")
_FORMS = ("list", "fused")


def shard_for_rank(
    model: nn.Module,
    *,
    ep_size: int = 1,
    tp_size: int = 1,
    pp_size: int = 1,
    pp_rank: int = 0,
    experts: Literal["list", "fused"] = "list",
    expert_tensor_parallel: bool = False,
) -> nn.Module:
    """A copy of one rank's part of ``model``, with tagged experts.

    ``create_moe_param_groups`` groups the copy as it groups a real rank's model; parameters
    have their names in the whole model. Approximations:

    * Pipeline: the number of decoder layers (of the largest ``ModuleList``) is divided as evenly
      as possible over the stages, first stages first, whatever the layers' sizes. Modules before
      them in the model are on the first stage, modules after them on the last; so are a vision
      tower and a second stack. Tied embeddings are one parameter on a stage, and the first and
      the last stage have one each.
    * Tensor parallel: every linear layer and the vocabulary of the embedding and the head are
      cut. Norms, routers, position embeddings, convolutions, DeepSeek's projections to a latent
      (``*_a_proj``) and vectors other than the biases of cut outputs are uncut on every rank. If
      a size is not divisible, the larger slice counts; key and value heads are cut even if a
      rank gets less than one head.
    * Experts: those of EP rank 0; all EP ranks have the same sizes.

    Args:
        model: a whole model, preferably on meta, as from ``load_model``. It is not changed.
        ep_size: ranks over which every layer's experts are distributed.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline stages.
        pp_rank: the stage to keep.
        experts: "list": each expert is a module with matrices of its own, as in DeepSpeed's
            MoE layer, with ``gate_up_proj`` cut in two. "fused": one tensor for all experts.
        expert_tensor_parallel: cut experts over the tensor-parallel ranks too.

    Raises:
        InvalidArgumentError: a size is no positive integer, ``pp_rank`` is no stage, there are
            more stages than layers, or ``ep_size`` does not divide a layer's experts.
        ParameterInputError: the model already has tagged experts, or has experts in an
            unknown form.
    """
    for name, value in (("ep_size", ep_size), ("tp_size", tp_size), ("pp_size", pp_size)):
        _check_size(name, value)
    if type(pp_rank) is not int or not 0 <= pp_rank < pp_size:
        raise InvalidArgumentError(f"pp_rank={pp_rank!r} is no stage of {pp_size}: use 0 to pp - 1")
    if experts not in _FORMS:
        raise InvalidArgumentError(f"experts={experts!r} is unknown: use 'list' or 'fused'.")
    _check_untagged(model)
    copied = copy.deepcopy(model)
    if pp_size > 1:
        _keep_stage(copied, pp_size, pp_rank)
    form = ExpertForm(ep_size, experts, tp_size if expert_tensor_parallel else 1)
    _split(copied, form, tp_size)
    return copied


def _split(model: nn.Module, form: ExpertForm, tp_size: int) -> None:
    nodes = walk(model)
    layers = find_expert_layers(nodes)
    inside = {id(param) for layer in layers for param in layer.params()}
    if tp_size > 1:
        for node in nodes:
            if not any(id(param) in inside for _, param in node.params):
                _slice_dense(node, tp_size)
    for layer in layers:
        keep_local_experts(layer, form)


def _check_size(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise InvalidArgumentError(f"{name}={value!r} must be an integer of at least 1.")


def _check_untagged(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if is_expert_parameter(param):
            raise ParameterInputError(
                f"{name} is tagged as an expert's already: this is one rank's model, group it "
                "as it is."
            )


# ---- tensor parallel ------------------------------------------------------------------


def _slice_dense(node: ModuleNode, tp_size: int) -> None:
    """Cut the module's own parameters, if tensor parallelism cuts such a module."""
    own = [param for _, param in node.params]
    if isinstance(node.module, nn.Embedding):
        for param in () if _POSITIONS.search(node.slot) else own:
            shrink(param, 0, tp_size)
    elif _is_linear(node.module) and not is_replicated(node.path):
        slice_projection(node.slot, own, tp_size)


def _is_linear(module: nn.Module) -> bool:
    """Is it a linear layer? ``Conv1D`` is transformers' name for that of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


# ---- pipeline -------------------------------------------------------------------------


def _keep_stage(model: nn.Module, pp_size: int, pp_rank: int) -> None:
    """Remove the modules of other stages from ``model``."""
    nodes = walk(model)
    stack = _decoder_stack(nodes)
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


def _decoder_stack(nodes: list[ModuleNode]) -> int:
    """Index of the ``ModuleList`` with the most elements that is not inside another one."""
    best, most, index = -1, 0, 0
    while index < len(nodes):
        if not isinstance(nodes[index].module, nn.ModuleList):
            index += 1
            continue
        subtree = nodes[index : nodes[index].stop]
        size = sum(param.numel() for node in subtree for _, param in node.params)
        if size > most:
            best, most = index, size
        index = nodes[index].stop
    if best < 0:
        raise ParameterInputError(
            "the model has no nn.ModuleList of layers to share out to stages: use pp_size=1."
        )
    return best
