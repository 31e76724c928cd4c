"""Groups for an optimizer that Accelerate prepares, with or without an optimizer block."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from moe_groups._common.arguments import need
from moe_groups._common.warn import warn
from moe_groups.errors import InvalidArgumentError, ParameterInputError, UnmarkedExpertsWarning
from moe_groups.experts.find import TaggedModel, find_experts, restored_on_error, tag_experts
from moe_groups.groups.inputs import ParamGroup
from moe_groups.groups.make import MARKS, has_name_of_expert
from moe_groups.integrations.autoep import autoep_enabled, autoep_experts_tagged
from moe_groups.param_groups import create_moe_param_groups
from moe_groups.tags import is_expert_parameter

need("accelerate", "hf", "groups for Accelerate")
need("deepspeed", "hf", "groups for Accelerate")  # Accelerate has DummyOptim only then

from accelerate.state import AcceleratorState, is_initialized  # noqa: E402
from accelerate.utils import DummyOptim  # noqa: E402

_Optimizer = TypeVar("_Optimizer", bound=Any)


def group_optimizer(optimizer: _Optimizer, model: nn.Module, **options: Any) -> _Optimizer:
    """Put MoE groups into an optimizer, before ``accelerator.prepare``.

    The optimizer is a torch optimizer over ``model.parameters()`` or over your groups, whose
    hyperparameters are kept. With an ``"optimizer"`` block in the DeepSpeed config it is
    Accelerate's ``DummyOptim``, and the block sets type and hyperparameters. Make a
    learning-rate scheduler afterwards, because it stores the groups of its optimizer.

    The experts of a model of transformers are grouped by layer if the config enables AutoEP, or
    ZeRO-3, under which every rank trains all experts.

    Args:
        optimizer: is changed, and returned.
        model: the model that is prepared with it, not yet wrapped by DeepSpeed.
        options: of :func:`moe_groups.create_moe_param_groups`, except ``weight_decay``.
            ``no_decay`` applies to groups that have no weight decay of their own.

    Raises:
        InvalidArgumentError: such an optimizer or option cannot be used.
        MoEGroupsError: as :func:`moe_groups.create_moe_param_groups` and, if the config enables
            AutoEP, as :func:`moe_groups.integrations.autoep.tag_autoep_experts`. The optimizer is
            then not changed.

    Warns:
        UnmarkedExpertsWarning: no MoE layer is found.

    Example:
        >>> optimizer = group_optimizer(AdamW(model.parameters(), lr=3e-4), model,
        ...                             split_by="expert")                # doctest: +SKIP
        >>> model, optimizer = accelerator.prepare(model, optimizer)      # doctest: +SKIP
    """
    if "weight_decay" in options:
        raise InvalidArgumentError(
            "weight_decay cannot be given here, because the optimizer has one already: give it to "
            "the optimizer."
        )
    _check_optimizer(optimizer)
    own = _own_groups(optimizer)
    if grouped := [group for group in own if "expert_group_name" in group]:
        raise InvalidArgumentError(
            f"the optimizer has groups of moe-groups already ({grouped[0].get('name')!r}): make it "
            "from model.parameters(), or from your own groups, and group it once."
        )
    config = deepspeed_config()
    early: AbstractContextManager[object] = nullcontext()
    if autoep_enabled(config):
        early = autoep_experts_tagged(model, config, found_none=False)
    elif (config.get("zero_optimization") or {}).get("stage") == 3:
        early = _whole_experts_tagged(model)
    with early:
        found = find_experts(model)
        given = _named_groups(own, found)
        if "no_decay" not in options and _second_has_no_decay(given, optimizer):
            given, rule = _as_one_group(given, found)
            options = options | rule
        with found.written():
            groups = create_moe_param_groups(given, **options)
    if not any(map(is_expert_parameter, found.params)):
        _warn_of_a_dense_model(found)
    if isinstance(optimizer, DummyOptim):
        optimizer.params = groups
    else:
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
    return optimizer


@contextmanager
def _whole_experts_tagged(model: nn.Module) -> Iterator[None]:
    """Tag the experts of a model's MoE blocks, all of which every rank trains under ZeRO-3.

    Only if nothing has marked experts, and some of these are trained. Taken back after an error
    inside.
    """
    found = find_experts(model)
    named = zip(found.names, found.params, strict=True)
    trained = any(has_name_of_expert(name) and param.requires_grad for name, param in named)
    with restored_on_error(found.params):
        if trained and not any(found.experts):
            tag_experts(model, "*.experts")
        yield


def _warn_of_a_dense_model(found: TaggedModel) -> None:
    """Experts that are not marked, if their names say so, are warned of where groups are made."""
    if not any(map(has_name_of_expert, found.names)):
        warn(
            f"no MoE layer is found in the model, and all of it is grouped as dense. {MARKS}",
            UnmarkedExpertsWarning,
        )


def deepspeed_config() -> Mapping[str, Any]:
    """That of Accelerate's plugin; empty without one."""
    plugin = AcceleratorState().deepspeed_plugin if is_initialized() else None
    config: Mapping[str, Any] = plugin.deepspeed_config if plugin else {}
    return config


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, DummyOptim):
        block = deepspeed_config().get("optimizer", {})
        if str(block.get("type")).lower() == "muon":
            raise InvalidArgumentError(
                'the optimizer block of the DeepSpeed config has "type": "Muon", for which '
                "DeepSpeed makes groups itself and drops those that it is given: take the block "
                "out of the config, and make the optimizer in code."
            )
    elif not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(
            f"a {type(optimizer).__name__} cannot be grouped: expected a torch optimizer, or "
            "Accelerate's DummyOptim."
        )
    elif any("initial_lr" in group for group in optimizer.param_groups):
        raise InvalidArgumentError(
            f"a learning-rate scheduler was made from this {type(optimizer).__name__}, and has a "
            "rate for each group that it found: group the optimizer first, then make the scheduler."
        )


def _own_groups(optimizer: Any) -> list[ParamGroup]:
    """Its groups, with the options that are not the optimizer's defaults."""
    if isinstance(optimizer, DummyOptim):
        optimizer.params = params = list(optimizer.params)  # it may be a generator
        grouped = bool(params) and isinstance(params[0], dict)
        return params if grouped else [{"params": params}]
    defaults = optimizer.defaults
    return [
        {key: value for key, value in group.items() if defaults.get(key, group) != value}
        for group in optimizer.param_groups
    ]


def _named_groups(groups: list[ParamGroup], found: TaggedModel) -> list[ParamGroup]:
    """The groups with named parameters; the last has what is frozen too, for the manifest."""
    names = found.name_of()
    named = []
    for index, group in enumerate(groups):
        params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        for param in params:
            if id(param) not in names:
                raise ParameterInputError(
                    f"group {index} of the optimizer has a parameter of shape "
                    f"{tuple(param.shape)} that is not in the model: make the optimizer from the "
                    "model's parameters, before it is prepared."
                )
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        named.append({"params": [(names[id(p)], p) for p in params], **options})
    mine = {id(param) for group in named for _, param in group["params"]}
    rest = [p for p in found.params if not p.requires_grad and id(p) not in mine]
    named[-1]["params"] += [(names[id(param)], param) for param in rest]
    return named


def _second_has_no_decay(groups: list[ParamGroup], optimizer: Any) -> bool:
    """Are these the usual two groups, which differ in weight decay and in nothing else?"""
    own = [{k: v for k, v in g.items() if k not in ("params", "weight_decay")} for g in groups]
    default = getattr(optimizer, "defaults", {}).get("weight_decay")
    decay = groups[-1].get("weight_decay", default)
    return len(groups) == 2 and own[0] == own[1] and decay == 0


def _as_one_group(
    groups: list[ParamGroup], found: TaggedModel
) -> tuple[list[ParamGroup], dict[str, Any]]:
    """One group in the model's order and a rule, for the names and order that a rule gives."""
    first, second = groups
    undecayed = {id(param) for _, param in second["params"]}
    place = {id(param): index for index, param in enumerate(found.params)}
    params = sorted([*first["params"], *second["params"]], key=lambda pair: place[id(pair[1])])
    rule: dict[str, Any] = {"no_decay": lambda _, param: id(param) in undecayed}
    if "weight_decay" in first:
        rule["weight_decay"] = first["weight_decay"]
    options = {k: v for k, v in first.items() if k not in ("params", "weight_decay")}
    return [{"params": params, **options}], rule
