"""Which parameters Muon steps, and which the Adam beside it: the two halves of each group.

Muon orthogonalizes the update of a matrix (Keller Jordan, "Muon: An optimizer for hidden
layers in neural networks"). It is meant for matrices between hidden features; embeddings,
heads, norms and biases stay with Adam.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from moe_groups._common.arguments import check, checked
from moe_groups.errors import InvalidArgumentError
from moe_groups.groups.hyperparameters import check_hyperparameters
from moe_groups.groups.inputs import GroupInput, ParamGroup, ParamsInput, read_input
from moe_groups.groups.rules import is_norm_or_bias
from moe_groups.tags import shape_of

IsMuon: TypeAlias = Callable[[str, torch.Tensor], bool]
"""``(qualified name, parameter) -> True`` where Muon steps the parameter."""

_EMBEDDING_OR_HEAD = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|(\w+_)?head|output_layer|classifier|score)(\.|$)"
)
_GROUPING = ("params", "param_names", "name", "moe", "use_muon")  # no hyperparameters
_OTHER_HALF = {True: ("betas", "eps"), False: ("momentum", "ns_method")}


@checked
def split_for_muon(
    params: ParamsInput,
    *,
    muon: Mapping[str, Any],
    adam: Mapping[str, Any],
    is_muon: IsMuon | None = None,
) -> list[ParamGroup]:
    """Split parameters into a half for Muon and one for Adam, to be grouped.

    Pass the result to :func:`create_moe_param_groups`: groups then never mix the halves, and
    each has ``use_muon``, which DeepSpeed's ``MuonWithAuxAdam`` needs. Each parameter gets
    ``use_muon`` too, which DeepSpeed's wrappers read.

    Args:
        params: as for :func:`create_moe_param_groups`. A module is tagged first. Each
            group dict becomes two; its own options win over those of the halves, but
            ``betas`` and ``eps`` reach only Adam, ``momentum`` and ``ns_method`` only Muon.
        muon: options of the Muon half, as ``{"lr": 0.02, "momentum": 0.95}``.
        adam: options of the Adam half, as ``{"lr": 3e-4, "betas": (0.9, 0.95)}``.
        is_muon: ``(name, parameter) -> bool``; by default :func:`is_hidden_matrix`, and False
            for the weights of ``nn.Embedding``.

    Returns:
        Group dicts called ``muon`` and ``adam``, or ``<name>.muon`` and ``<name>.adam`` if the
        given group has a name, with ``(name, parameter)`` pairs.

    Raises:
        InvalidArgumentError: an option that the grouping sets, or ``is_muon`` selects a
            parameter that is not a matrix.
        ParameterInputError: ``params`` is not one of the accepted forms.
        TagError: as :func:`tag_experts`.

    Example:
        >>> halves = split_for_muon(model, muon={"lr": 0.02}, adam={"lr": 3e-4})
        ...                                                               # doctest: +SKIP
        >>> groups = create_moe_param_groups(halves, split_by="expert")   # doctest: +SKIP
        >>> optimizer = MuonWithAuxAdam(groups)                           # doctest: +SKIP
    """
    halves = {True: muon, False: adam}
    for use_muon, options in halves.items():
        _check_options("muon" if use_muon else "adam", options)
    given = read_input(params)
    choose = is_muon or _default_rule(params)
    if given.model is None:
        chosen = _choose(given, choose)
    else:
        with given.model.written():  # the rule reads tags
            chosen = _choose(given, choose)
    for param, use_muon in zip(given.params, chosen, strict=True):
        param.use_muon = use_muon  # type: ignore[attr-defined]
    return _half_groups(given, chosen, halves)


@checked
def is_hidden_matrix(name: str, param: torch.Tensor) -> bool:
    """The usual rule: True for matrices, except embeddings, heads, norms and biases.

    True for fused experts of shape ``(experts, rows, columns)``: Muon orthogonalizes each
    expert's matrix separately. False for a bias of all experts, ``(experts, features)``.

    Args:
        name: qualified name, to recognize embeddings and heads; with "" only the shape counts.
        param: the parameter; its values are not read.

    Example:
        >>> is_hidden_matrix("layers.0.mlp.up_proj.weight", torch.empty(64, 16))
        True
        >>> is_hidden_matrix("lm_head.weight", torch.empty(256, 16))
        False
    """
    return (
        _own_dims(param) == 2
        and not is_norm_or_bias(name, param)
        and not _EMBEDDING_OR_HEAD.search(name.lower())
    )


def _own_dims(param: torch.Tensor) -> int:
    """Dimensions of the parameter, or of one expert's part of fused experts."""
    return len(shape_of(param)) - bool(getattr(param, "fused_experts", False))


def _default_rule(params: ParamsInput) -> IsMuon:
    if not isinstance(params, nn.Module):
        return is_hidden_matrix
    tables = {id(m.weight) for m in params.modules() if isinstance(m, nn.Embedding)}
    return lambda name, param: id(param) not in tables and is_hidden_matrix(name, param)


def _check_options(half: str, options: Mapping[str, Any]) -> None:
    reserved = [key for key in options if key in _GROUPING]
    if reserved:
        raise InvalidArgumentError(
            f"{half}={dict(options)!r} sets {reserved}, which the grouping itself sets: give "
            'hyperparameters only, such as {"lr": 0.02}.'
        )
    check_hyperparameters(half, options, ())


def _choose(given: GroupInput, is_muon: IsMuon) -> list[bool]:
    chosen = [is_muon(*pair) for pair in zip(given.names, given.params, strict=True)]
    for name, param, use_muon in zip(given.names, given.params, chosen, strict=True):
        check(f"is_muon({name!r}, ...)", use_muon, bool)
        if use_muon and param.requires_grad and _own_dims(param) < 2:
            fused = " of which the first counts experts" * (len(shape_of(param)) > 1)
            raise InvalidArgumentError(
                f"is_muon chooses {name or 'a parameter'} of shape {tuple(shape_of(param))}"
                f"{fused}, and Muon orthogonalizes matrices: return False for it, so that Adam "
                "steps it (is_hidden_matrix does)."
            )
    return chosen


def _half_groups(
    given: GroupInput, chosen: list[bool], halves: Mapping[bool, Mapping[str, Any]]
) -> list[ParamGroup]:
    """The halves of each given group that hold something."""
    members: dict[tuple[int, bool], list[tuple[str, torch.Tensor]]] = {
        (source, use_muon): [] for source in range(len(given.groups)) for use_muon in halves
    }
    for row, use_muon in enumerate(chosen):
        members[given.sources[row], use_muon].append((given.names[row], given.params[row]))
    groups = []
    for (source, use_muon), pairs in members.items():
        own = given.groups[source]
        half = "muon" if use_muon else "adam"
        name = own.get("name") or (f"group.{source}" if len(given.groups) > 1 else None)
        kept = {key: own[key] for key in own if key not in (*_GROUPING, *_OTHER_HALF[use_muon])}
        if pairs:
            groups.append(
                {**halves[use_muon], **kept, "use_muon": use_muon}
                | {"name": f"{name}.{half}" if name else half, "params": pairs}
            )
    return groups
