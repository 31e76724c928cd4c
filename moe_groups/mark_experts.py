"""Say which modules hold experts, where no layer of DeepSpeed does."""

from fnmatch import fnmatchcase

from torch import nn

from moe_groups.errors import InvalidArgumentError, TagError
from moe_groups.expert_layers import tag_experts
from moe_groups.module_names import named_parameters, walk
from moe_groups.tags import ExpertTag, set_expert_tag


def mark_experts(model: nn.Module, pattern: str, *, ep_size: int = 1) -> dict[str, ExpertTag]:
    """Tag all parameters below the modules that ``pattern`` matches as experts'.

    For models that no DeepSpeed layer makes expert-parallel, as with FSDP2: call it after
    ``fully_shard``, which puts new parameters in the place of those that it is given.

    Args:
        model: the module; a list of experts (``nn.ModuleList``) is numbered, a tensor that
            holds all experts of a layer is fused (:func:`tag_experts`).
        pattern: glob pattern of qualified module names, as ``"*.experts"``.
        ep_size: ranks that a layer's experts are shared out to; the parallel group is
            called ``ep_size_<N>``.

    Returns:
        Qualified parameter name to tag, for each expert parameter of the model.

    Raises:
        InvalidArgumentError: ``ep_size`` is no positive integer, or nothing matches.
        TagError: two layers with one name. Nothing has been tagged then.

    Example:
        >>> mark_experts(model, "layers.*.moe.experts", ep_size=8)    # doctest: +SKIP
        >>> groups = create_moe_param_groups(model, split_by="module")    # doctest: +SKIP
    """
    if type(ep_size) is not int or ep_size < 1:
        raise InvalidArgumentError(f"ep_size={ep_size!r} must be an integer of 1 or more.")
    nodes = walk(model)
    found = {
        id(param): param
        for index, node in enumerate(nodes)
        if fnmatchcase(node.path, pattern)
        for _, param in named_parameters(nodes[index : node.stop])
    }
    if not found:
        near = [node.path for node in nodes if "expert" in node.slot][:3]
        raise InvalidArgumentError(
            f"mark_experts: no module with parameters matches {pattern!r}"
            + (f"; there are {', '.join(map(repr, near))}." if near else ".")
        )
    before = {key: dict(param.__dict__) for key, param in found.items()}
    for param in found.values():
        set_expert_tag(param, ExpertTag(f"ep_size_{ep_size}"))
    try:
        return tag_experts(model)
    except TagError:
        for key, param in found.items():
            param.__dict__.clear()
            param.__dict__.update(before[key])
        raise
