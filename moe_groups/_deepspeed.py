"""The one file that touches DeepSpeed's private parts.

Tested against the version in ``constraints.txt``; ``tests/distributed/test_contract.py``
holds one test for each fact relied on here. DeepSpeed is imported when a function needs
it, never when this module is imported.

What :func:`support_our_groups` changes in DeepSpeed (groups that DeepSpeed made itself
train as before, bit for bit, but where its norm was wrong and clipping uses it):

* the ZeRO-1/2 and BF16 wrappers look up a group's ``name`` as a process-group key, so
  unique names get aliases of the key ``ep_size_<N>`` (the same handle, no communicator),
  registered by the engine after it created the process groups;
* ``BF16_Optimizer`` and ``FP16_Optimizer`` run one all-reduce of the norm for each name
  that has a gradient on this rank, which hangs when ranks disagree, and clip by different
  norms where ranks that share an expert disagree: names are merged to one per parallel
  group before the norm and the reduction see them, and all experts count. Sums are then
  those of DeepSpeed's own names, bit for bit;
* stages of a pipeline make the same process groups, and take part in each other's
  all-reduces of the norm (ZeRO-1 runs one for each group, BF16_Optimizer one for each
  parallel group), where DeepSpeed waits for ever unless all stages are alike;
* ZeRO's norm counts the experts of all tensor-parallel ranks;
* gloo gathers tokens over tensor-parallel ranks;
* parameters under Muon are those of the groups that say ``use_muon``, and what cannot step
  our groups (the config's Muon, ``torch.optim.Muon`` under ZeRO) is refused;
* ``save_checkpoint`` and ``load_checkpoint`` write and compare what the groups were
  (``checkpoint_guard.py``);
* ``BF16_Optimizer`` collects garbage and prints the memory twice for each group while it
  is set up, 0.3 s a group: not for more groups than a handful.

What :func:`support_kept_collectives` changes, for functions in ``checkpoint_activations``
alone: the MoE layers' collectives give the results of the forward pass in a recomputation.
"""

import functools
import importlib
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from moe_groups.early_groups import early_problem
from moe_groups.errors import (
    InvalidArgumentError,
    ParameterInputError,
    UnsupportedDeepSpeedError,
)
from moe_groups.kept_collectives import inside_region, once
from moe_groups.tags import is_expert_parameter, numel_of, parallel_group_of

TESTED_VERSION = "0.19.8"
_DICTS = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)
_PATCHED = "_moe_groups_original"
_GIVEN = "_moe_groups_given"
_MANY_GROUPS = 8
_ENGINES: "weakref.WeakSet[Any]" = weakref.WeakSet()


# ---- layers ---------------------------------------------------------------------------


def moe_layer_types() -> tuple[type, ...]:
    """``(deepspeed.moe.layer.MoE,)``, or nothing where it was never imported: no module is one."""
    layer = sys.modules.get("deepspeed.moe.layer")
    return () if layer is None else (layer.MoE,)


def layer_experts(module: Any) -> list[nn.Module]:
    """This rank's experts of a DeepSpeed ``MoE`` layer, in the order of their numbers."""
    return list(module.deepspeed_moe.experts.deepspeed_experts)


def layer_parallel_group(module: Any) -> str:
    """Process-group key of a DeepSpeed ``MoE``, which calls it ``expert_group_name``."""
    return str(module.expert_group_name)


class LayerParts(NamedTuple):
    """What a layer of DeepSpeed holds on this rank.

    Attributes:
        num_experts: over all ranks.
        ep_size: ranks that share them.
        parallel_group: key of their process groups.
        experts: the tensors of each expert here by their name in it.
        params: the parameters that these are, or are views of.
        router: its tensors, by their name in it.
    """

    num_experts: int
    ep_size: int
    parallel_group: str
    experts: Sequence[Mapping[str, torch.Tensor]]
    params: list[torch.Tensor]
    router: Mapping[str, torch.Tensor]


def layer_parts(module: Any) -> LayerParts | None:
    """The parts of a DeepSpeed ``MoE`` or an ``AutoEPMoELayer``; None for another module.

    AutoEP keeps ``gate_proj``, ``down_proj`` and ``up_proj`` of all its experts as ``w1``, ``w2``
    and ``w3`` (``repack_expert_weights``, ``moe/ep_repack.py``).
    """
    autoep = sys.modules.get("deepspeed.module_inject.auto_ep_layer")
    if autoep is not None and isinstance(module, autoep.AutoEPMoELayer):
        layer: Any = module
        fused = {f"{name}.weight": getattr(layer.experts, name) for name in ("w1", "w2", "w3")}
        own = [
            {name: param.detach()[number] for name, param in fused.items()}
            for number in range(layer.num_local_experts)
        ]
        router = dict(layer.router.gate.named_parameters())
        if layer.router.e_score_correction_bias is not None:
            router["e_score_correction_bias"] = layer.router.e_score_correction_bias
        sizes = layer.num_experts, layer.ep_size, layer.ep_group_name
        return LayerParts(*sizes, own, [*fused.values()], router)
    if not isinstance(module, moe_layer_types()):
        return None
    layer = module
    own = [dict(expert.named_parameters()) for expert in layer_experts(layer)]
    params = [param for expert in own for param in expert.values()]
    router = dict(layer.deepspeed_moe.gate.wg.named_parameters())
    return LayerParts(
        layer.num_experts, layer.ep_size, layer.expert_group_name, own, params, router
    )


def is_partitioned(model: nn.Module) -> bool:
    """Does ZeRO-3 keep the parameters, and leave placeholders in the model?"""
    return any(hasattr(param, "ds_id") for param in model.parameters())


def routers_of(model: nn.Module) -> list[tuple[str, int, nn.Module]]:
    """``(label or path, experts over all ranks, gate)`` of each DeepSpeed ``MoE``, in order."""
    return [
        (
            str(getattr(layer, "group_label", None) or path),
            int(cast(Any, layer).num_experts),
            cast(Any, layer).deepspeed_moe.gate,
        )
        for path, layer in model.named_modules()
        if isinstance(layer, moe_layer_types())
    ]


def routed(outputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(loss, assignments to each expert, how many were dropped)`` of a gate's outputs.

    ``TopKGate`` gives (loss, capacity, experts, indices, locations, weights, counts) to its
    layer, and -1 as the index of what was dropped (``sharded_moe.py``).
    """
    loss, _, _, indices, _, _, counts = outputs
    return loss, counts, counts.sum() - (indices >= 0).sum()


# ---- process groups -------------------------------------------------------------------


def resolves(name: str) -> bool:
    """Does ``name`` lead to the process groups of its parallel group?"""
    from deepspeed.utils import groups

    base = parallel_group_of(name)
    return all(
        name in (known := getattr(groups, d)) and known[name] is known.get(base) for d in _DICTS
    )


def expert_data_parallel_size(parallel_group: str) -> int | None:
    """Ranks that share an expert parameter, or None while the group does not exist."""
    groups = sys.modules.get("deepspeed.utils.groups")
    ranks = groups and groups._EXPERT_DATA_PARALLEL_GROUP_RANKS.get(parallel_group)
    return len(ranks) if ranks else None


def expert_parallel_rank(parallel_group: str) -> int | None:
    """This rank's place in the expert-parallel group, or None while it does not exist."""
    groups = sys.modules.get("deepspeed.utils.groups")
    ranks = groups and groups._EXPERT_PARALLEL_GROUP_RANKS.get(parallel_group)
    return list(ranks).index(torch.distributed.get_rank()) if ranks else None


def expert_place(parallel_group: str) -> tuple[int, bool] | None:
    """:func:`expert_parallel_rank`, and whether the rank is the first with the same experts."""
    ep_rank = expert_parallel_rank(parallel_group)
    if ep_rank is None:
        return None
    from deepspeed.utils import groups

    sharing = groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[parallel_group]
    return ep_rank, torch.distributed.get_rank() == min(sharing)


def tensor_parallel_size() -> int:
    """Ranks that share each dense layer, by the ``mpu`` that DeepSpeed was given."""
    groups = sys.modules.get("deepspeed.utils.groups")
    return 1 if groups is None else int(groups._get_model_parallel_world_size())


def register_names(names: Iterable[str]) -> None:
    """Make each name a key of the process groups that it starts with.

    Call it on all ranks with the same names in the same order. A name whose process
    groups do not exist is left alone: DeepSpeed's own lookup then says so.
    """
    from deepspeed.utils import groups

    for name in names:
        base = parallel_group_of(name)
        if base == name:
            continue
        for known in (getattr(groups, d) for d in _DICTS):
            if base in known:
                known[name] = known[base]


# ---- the engine -----------------------------------------------------------------------


def stepped_groups(engine: Any) -> list[tuple[dict[str, Any], list[torch.Tensor]]]:
    """``(param group, model parameters it steps)`` of an initialized engine, in order.

    The wrappers put flat partitions into ``param_groups`` and keep the model's parameters
    in a list of their own: ``bit16_groups`` (ZeRO-1/2), ``bf16_groups`` (BF16_Optimizer),
    ``fp16_groups`` (FP16 optimizers; ZeRO-3, where it holds several lists for a group).
    """
    optimizer = engine.optimizer
    groups = optimizer.param_groups
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups"):
        if hasattr(optimizer, attribute):
            members: list[list[torch.Tensor]] = [[] for _ in groups]
            index_of = getattr(optimizer, "sub_group_to_group_id", {})
            for index, params in enumerate(getattr(optimizer, attribute)):
                members[index_of.get(index, index)].extend(params)
            return list(zip(groups, members, strict=True))
    return [(group, list(group["params"])) for group in groups]


def engine_data_parallel_group(engine: Any) -> Any:
    """The process group over which all optimizer groups of this engine line up."""
    return engine.seq_data_parallel_group


class Given(NamedTuple):
    """What a parameter's group had when the engine took the optimizer over.

    Attributes:
        name: of the group.
        options: its learning rate and weight decay.
        own_lr: the learning rate is not the optimizer's default.
    """

    name: str
    options: dict[str, float]
    own_lr: bool


def given_options(engine: Any) -> dict[int, Given]:
    """``id(parameter)`` to what its group was given; empty if no group of ours was there."""
    given: dict[int, Given] = getattr(engine, _GIVEN, {})
    return given


def _remember(engine: Any, optimizer: Any) -> None:
    default = getattr(optimizer, "defaults", {}).get("lr")
    given: dict[int, Given] = {}
    for group in optimizer.param_groups:
        options = {key: float(group[key]) for key in ("lr", "weight_decay") if key in group}
        if "initial_lr" in group:  # a scheduler was there first (Accelerate), and set its own
            options["lr"] = float(group["initial_lr"])
        record = Given(str(group.get("name", "")), options, options.get("lr") != default)
        given.update((id(param), record) for param in group["params"])
    setattr(engine, _GIVEN, given)
    _ENGINES.add(engine)
    if guard_of(engine) is None:
        from moe_groups.checkpoint_guard import Guard

        set_guard(engine, Guard())


def scheduled_peaks(engine: Any) -> list[float] | None:
    """Learning rates to which a DeepSpeed warm-up schedule brings the groups, if there is one."""
    peaks = getattr(engine.lr_scheduler, "max_lrs", None)
    return None if peaks is None else list(map(float, peaks))


def known_engines() -> list[Any]:
    """Engines that were initialized since :func:`support_our_groups` and are still there."""
    return list(_ENGINES)


def runs_backward(engine: Any) -> bool:
    """Is the engine (one of pipelines included) in its ``backward`` now?"""
    return bool(getattr(engine, "_running_engine_backward", False))


def backward_scale(engine: Any) -> float:
    """Factor of a loss on its way into ``backward``: DeepSpeed's own scaling of a loss of 1."""
    optimizer, steps = engine.optimizer, engine.gradient_accumulation_steps()
    with torch.enable_grad():
        one = torch.ones((), requires_grad=True) * 1  # DeepSpeed scales what has a graph
    if hasattr(optimizer, "scale_if_loss"):
        one = optimizer.scale_if_loss(one)
    elif engine.torch_autocast_z0_gradscaler:
        one = engine.torch_autocast_z0_gradscaler.scale(one)
    return float(one) / float(steps)


def is_engine(value: object) -> bool:
    """Is ``value`` a DeepSpeed engine (its pipeline engine included)?"""
    module = sys.modules.get("deepspeed.runtime.engine")
    return module is not None and isinstance(value, module.DeepSpeedEngine)


def has_engine(model: nn.Module) -> bool:
    """Is ``model`` what an engine steps, or a part of it? Every engine puts hooks on its module."""
    hooks = model._forward_pre_hooks.values()
    if any(getattr(hook, "__module__", "") == "deepspeed.runtime.engine" for hook in hooks):
        return True
    return any(part is model for engine in _ENGINES for part in engine.module.modules())


def refresh_master_weights(engine: Any) -> None:
    """Copy the model's weights into the full-precision ones that the wrapper steps, if it has any.

    DeepSpeed's own call, after loading weights alone (``load_checkpoint``, ``runtime/engine.py``).
    """
    refresh = getattr(engine.optimizer, "refresh_fp32_params", None)
    if refresh is not None:
        refresh()


# ---- checkpoints ----------------------------------------------------------------------

_GUARD = "_moe_groups_guard"


class LaidOut(NamedTuple):
    """A group as this rank's wrapper laid it out.

    Attributes:
        options: the dict of the optimizer.
        members: ``(name, parameter, first element in the group's flat buffer)``.
        ranks: data-parallel ranks that share it, in the order of their partitions; the number
            of these plus the global rank for those of another model-parallel rank.
    """

    options: dict[str, Any]
    members: list[tuple[str, torch.Tensor, int]]
    ranks: list[int]


def laid_out_groups(engine: Any) -> list[LaidOut]:
    """This rank's groups in order, with the names that DeepSpeed writes into checkpoints.

    ZeRO-1/2 may reorder a group (``round_robin_gradients``) and align parameters
    (``parameter_alignment``); the other wrappers lay parameters behind each other.
    """
    optimizer = engine.optimizer
    data_parallel = torch.distributed.get_process_group_ranks(_data_parallel_group(engine))
    position = {rank: index for index, rank in enumerate(data_parallel)}
    groups = []
    for index, (options, params) in enumerate(stepped_groups(engine)):
        if hasattr(optimizer, "round_robin_bit16_groups"):
            params = optimizer.round_robin_bit16_groups[index]
            offsets = optimizer.round_robin_bit16_offsets[index]
        else:
            sizes = [numel_of(param) for param in params]
            offsets = [0, *itertools.accumulate(sizes)][: len(sizes)]
        shared = getattr(optimizer, "real_dp_process_group", None)
        if shared:
            ranks = torch.distributed.get_process_group_ranks(shared[index])
        else:
            ranks = _sharing_ranks(options) or data_parallel
        names = (engine.param_names.get(param, "?") for param in params)
        members = list(zip(names, params, offsets, strict=True))
        places = [position.get(rank, len(position) + rank) for rank in ranks]
        groups.append(LaidOut(options, members, places))
    return groups


def _data_parallel_group(engine: Any) -> Any:
    group = getattr(engine.optimizer, "dp_process_group", None)
    return engine_data_parallel_group(engine) if group is None else group


def _sharing_ranks(options: Mapping[str, Any]) -> list[int] | None:
    from deepspeed.utils import groups

    base = parallel_group_of(str(options.get("name", "")))
    known = groups._EXPERT_DATA_PARALLEL_GROUP_RANKS.get(base) if options.get("moe") else None
    return None if known is None else list(known)


def checkpoint_rank(engine: Any) -> tuple[int, int]:
    """``(model-parallel rank, data-parallel rank)``, which name this rank's files."""
    return engine.checkpoint_mp_rank, torch.distributed.get_rank(_data_parallel_group(engine))


def wrapper_name(engine: Any) -> str:
    """Who steps: "ZeRO-1", "ZeRO-2", "BF16_Optimizer", or the class of another wrapper."""
    optimizer = engine.optimizer
    name = type(optimizer).__name__
    if name == "DeepSpeedZeroOptimizer":
        return "ZeRO-2" if optimizer.partition_gradients else "ZeRO-1"
    return name


def checkpoint_tag(engine: Any, tag: object) -> str:
    """The name under which ``save_checkpoint`` saves."""
    return f"global_step{engine.global_steps}" if tag is None else str(tag)


def guard_of(engine: Any) -> Any:
    """What :func:`set_guard` set; None where the engine's checkpoints are not guarded."""
    return getattr(engine, _GUARD, None)


def set_guard(engine: Any, guard: Any) -> None:
    """Guard the engine's checkpoints (``checkpoint_guard.py`` says with what)."""
    setattr(engine, _GUARD, guard)


def _wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        from moe_groups.checkpoint_guard import guarded_save

        return guarded_save(self, functools.partial(original, self), args, kwargs)

    return save_checkpoint


def _wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        from moe_groups.checkpoint_guard import guarded_load
        from moe_groups.step_options import take_up_options

        result = guarded_load(self, functools.partial(original, self), args, kwargs)
        take_up_options(self)
        return result

    return load_checkpoint


# ---- around the optimizer's step -------------------------------------------------------

_BEFORE_CLIPPING = "_moe_groups_before_clipping"
_PARTITIONED = ("ZeRO-1", "ZeRO-2", "BF16_Optimizer")


def steps_parameters(engine: Any) -> bool:
    """Is there no wrapper, so that the model's parameters themselves are stepped?"""
    return engine.optimizer is engine.basic_optimizer


def check_steps_partitions(engine: Any, what: str) -> None:
    """Refuse engines whose torch optimizer does not step what :class:`LaidOut` tells.

    Raises:
        InvalidArgumentError: not an engine with an optimizer, or one with another wrapper.
    """
    if not is_engine(engine) or getattr(engine, "basic_optimizer", None) is None:
        raise InvalidArgumentError(
            f"{what} takes an engine that deepspeed.initialize made with an optimizer, not "
            f"{type(engine).__name__}."
        )
    if not steps_parameters(engine) and wrapper_name(engine) not in _PARTITIONED:
        raise InvalidArgumentError(
            f"{what} knows engines that step with {', '.join(_PARTITIONED)} or without a wrapper, "
            f"not with {wrapper_name(engine)}: choose one of them in the config "
            '("zero_optimization": {"stage": 1 or 2}).'
        )


def is_counted(engine: Any, param: torch.Tensor) -> bool:
    """Does the global norm count this parameter here, and not a copy on another rank?

    As in ``get_grads_for_norm`` and ``get_grad_norm_direct``: of copies on tensor-parallel ranks
    the first counts, and of those that pipeline stages tie the first stage's.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_rank

    if getattr(param, "ds_pipe_replicated", False):
        return False
    own = _is_own(param, is_model_parallel_parameter(param))
    return own or bwc_tensor_model_parallel_rank(engine.mpu) == 0


def _is_own(param: torch.Tensor, marked: Any) -> bool:
    """Has each tensor-parallel rank another ``param``, and not a copy of the first rank's?

    Whole experts are others on each rank, unless tensor parallelism cuts them: then their
    parts are ``marked`` (``model_parallel``), and the rest (a bias, a norm) are copies.
    """
    from deepspeed.utils import groups

    if marked or not is_expert_parameter(param):
        return bool(marked)
    return bool(groups._get_expert_model_parallel_world_size() == 1)


def clipping_divisor(engine: Any) -> float:
    """What the wrapper divided all gradients of the last step by, to clip them; 1 if by nothing.

    The formula is in ``unscale_and_clip_grads`` and ``clip_tensors_by_global_norm``.
    """
    optimizer = engine.optimizer
    clip, norm = getattr(optimizer, "clip_grad", 0.0), engine.get_global_grad_norm()
    if steps_parameters(engine) or not clip or norm is None:
        return 1.0
    return max(1.0, (float(norm) + 1e-6) / clip)


def before_own_clipping(engine: Any, function: Callable[[], None]) -> Callable[[], None]:
    """Call ``function`` before an engine without a wrapper clips; gives what undoes it."""
    functions: list[Callable[[], None]] | None = getattr(engine, _BEFORE_CLIPPING, None)
    if functions is None:
        setattr(engine, _BEFORE_CLIPPING, functions := [])
        original, called = engine.clip_fp32_gradients, functions

        def clip_fp32_gradients() -> None:
            for one in called:
                one()
            original()

        engine.clip_fp32_gradients = clip_fp32_gradients
    functions.append(function)

    def undo() -> None:
        functions.remove(function)
        if not functions:
            del engine.clip_fp32_gradients
            delattr(engine, _BEFORE_CLIPPING)

    return undo


# ---- unique names in DeepSpeed's wrappers ----------------------------------------------


def support_our_groups(moe: bool) -> None:
    """Teach DeepSpeed our group names; see the module's docstring.

    Does nothing when called again, where DeepSpeed is not installed (grouping a model to
    look at the result needs no DeepSpeed), or where it is not imported and no group is
    ``moe``.

    Raises:
        UnsupportedDeepSpeedError: this DeepSpeed lacks something that is relied on.
            Nothing has been changed then.
    """
    if not moe and "deepspeed" not in sys.modules:
        return
    try:
        import deepspeed  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "deepspeed":
            return
        raise
    _change(_CHANGES, "unique group names need")


_Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
_Change = tuple[str, str, _Wrap]


def _change(changes: Iterable[_Change], needed_by: str) -> None:
    """Wrap functions of DeepSpeed, each once; if one of them is missing or another, none."""
    places = [(owner, name, wrap, *_find(owner, name)) for owner, name, wrap in changes]
    new = [place for place in places if not hasattr(place[-1], _PATCHED)]
    for owner, name, wrap, _, original in new:
        _check_known(f"{owner}.{name}", original, wrap, needed_by)
    for _, name, wrap, holder, original in new:
        changed: Any = functools.wraps(original)(wrap(original))
        setattr(changed, _PATCHED, original)
        static = isinstance(inspect.getattr_static(holder, name), staticmethod)
        setattr(holder, name, staticmethod(changed) if static else changed)


def _check_known(place: str, original: Any, wrap: _Wrap, needed_by: str) -> None:
    """Refuse a DeepSpeed whose function is not there, or takes other arguments than ours."""
    import deepspeed

    if not callable(original):
        problem = f"has no {place}, which {needed_by}"
    else:
        wanted, theirs = _arguments(wrap(original)), _arguments(original)
        if theirs is None or wanted is None or theirs[: len(wanted)] == wanted:
            return
        problem = (
            f"has {place}({', '.join(theirs)}), which {needed_by} with the arguments "
            f"({', '.join(wanted)})"
        )
    raise UnsupportedDeepSpeedError(
        f"deepspeed {deepspeed.__version__} {problem}: install deepspeed {TESTED_VERSION}, which "
        "this release was tested with."
    )


def _arguments(function: Callable[..., Any]) -> list[str] | None:
    """Names of its positional arguments; None where it takes any."""
    found = list(inspect.signature(function).parameters.values())
    if found and found[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return None
    return [p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _find(owner: str, name: str) -> tuple[Any, Any]:
    module, _, cls = owner.partition(":")
    try:
        holder: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return None, None
    holder = getattr(holder, cls, None) if cls else holder
    return holder, getattr(holder, name, None)


def _merged(tensors: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """One list per parallel group instead of one per name, in the order of appearance."""
    merged: dict[str, list[Any]] = {}
    for name, values in tensors.items():
        merged.setdefault(parallel_group_of(name), []).extend(values)
    return merged


def _wrap_broadcast(original: Callable[..., None]) -> Callable[..., None]:
    """The first place where the engine needs the process groups of our experts."""

    def _broadcast_model(self: Any) -> None:
        from deepspeed.utils import groups

        for name, param in self.module.named_parameters():
            known = getattr(param, "group_name", None) in groups._EXPERT_DATA_PARALLEL_GROUP
            if hasattr(param, "expert_group_name") and is_expert_parameter(param) and not known:
                raise ParameterInputError(
                    f"{name} is an expert parameter of {param.group_name!r}, but no layer of the "
                    "model makes these process groups. DeepSpeed knows deepspeed.moe.layer.MoE (or "
                    "moe_groups.MoE) and AutoEP's layers: build one with this ep_size, or set "
                    "param.allreduce = True to train the parameter as a dense one."
                )
        original(self)

    return _broadcast_model


def _wrap_sanity_check(original: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's last step before it wraps the optimizer: process groups exist, names not."""

    def _do_optimizer_sanity_check(self: Any, basic_optimizer: Any) -> Any:
        moe = [g for g in basic_optimizer.param_groups if g.get("moe")]
        ours = [g["name"] for g in moe if "expert_group_name" in g]
        if ours and not self.has_moe_layers:
            raise ParameterInputError(
                f"group {ours[0]!r} holds experts, but the model has no MoE layer that DeepSpeed "
                "knows (deepspeed.moe.layer.MoE, moe_groups.MoE or AutoEP's), and without one it "
                "reduces all parameters as dense ones. Build a layer with one of these, or set "
                "param.allreduce = True to train the experts as dense parameters."
            )
        if self.has_moe_layers:
            named, stage = self.module.named_parameters(), self.zero_optimization_stage()
            if problem := early_problem(named, basic_optimizer.param_groups, wrapped=stage < 3):
                raise ParameterInputError(problem)
        _settle_muon(self, basic_optimizer)
        register_names(str(g.get("name")) for g in moe)
        _remember(self, basic_optimizer)
        return original(self, basic_optimizer)

    return _do_optimizer_sanity_check


def _settle_muon(engine: Any, optimizer: Any) -> None:
    """The wrappers ask the parameters for ``use_muon``; what the groups say is what holds.

    DeepSpeed marks all parameters anew where the config names Muon, and copies of a model
    lose the marks; a group that says True over parameters that do not would be stepped by
    plain gradients, without a word.
    """
    if isinstance(optimizer, torch.optim.Muon) and engine.zero_optimization():
        raise InvalidArgumentError(
            "torch.optim.Muon cannot step under ZeRO: it takes matrices, and ZeRO gives it flat "
            "partitions. Use DeepSpeed's, deepspeed.runtime.zero.muon.muon_optimizer."
            "MuonWithAuxAdam, over the same groups, or train without ZeRO (or with FSDP2)."
        )
    for group in optimizer.param_groups:
        if "use_muon" in group:
            for param in group["params"]:
                param.use_muon = bool(group["use_muon"])


def _wrap_basic(original: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed makes groups of its own for the config's Muon: ours would be lost."""

    def _configure_basic_optimizer(self: Any, model_parameters: Any) -> Any:
        given = model_parameters if isinstance(model_parameters, list) else []
        groups = [group for group in given if isinstance(group, dict)]
        ours = any("use_muon" in group or "expert_group_name" in group for group in groups)
        if ours and self.optimizer_name() == "muon":
            raise InvalidArgumentError(
                'the config\'s "optimizer": {"type": "Muon"} makes groups of its own, by the '
                "shapes of the parameters, and drops the names and labels of those that it is "
                "given. Take it out of the config and pass optimizer=MuonWithAuxAdam(groups) "
                "(deepspeed.runtime.zero.muon.muon_optimizer), with the groups of split_for_muon."
            )
        return original(self, model_parameters)

    return _configure_basic_optimizer


def _wrap_configure(original: Callable[..., None]) -> Callable[..., None]:
    """Stages of a pipeline make the same process groups, in the same order.

    A layer makes those that are missing, and all ranks have to take part: a stage without
    MoE layers, or with other ep_sizes, would leave the rest waiting.
    """

    def _configure_distributed_model(self: Any, model: Any) -> None:
        if is_pipeline(model):
            _agree_with_other_stages(self, model)
        original(self, model)

    return _configure_distributed_model


def stage_of(model: Any) -> int:
    """The pipeline stage that this rank has of ``model``; 0 without a pipeline."""
    return int(model.stage_id) if is_pipeline(model) else 0


def is_pipeline(model: object) -> bool:
    """Is ``model`` a ``PipelineModule``?"""
    module = sys.modules.get("deepspeed.runtime.pipe.module")
    return module is not None and isinstance(model, module.PipelineModule)


def _agree_with_other_stages(engine: Any, model: Any) -> None:
    from deepspeed.utils import groups

    layers: list[Any] = [m for m in model.modules() if isinstance(m, moe_layer_types())]
    here = [(layer.ep_size, layer.enable_expert_tensor_parallelism) for layer in layers]
    stages: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(stages, (here, *_carrying(engine, model)))
    problems = [problem for _, _, problem in stages if problem]
    if problems and any(carries for _, carries, _ in stages):
        raise InvalidArgumentError(problems[0])
    groups.mpu = engine.mpu
    wanted = dict.fromkeys(itertools.chain.from_iterable(layers for layers, _, _ in stages))
    order = engine._config.use_data_before_expert_parallel_
    for ep_size, expert_tensor_parallelism in wanted:
        if f"ep_size_{ep_size}" in groups._EXPERT_PARALLEL_GROUP:
            continue
        if expert_tensor_parallelism and groups.mpu is not None:
            groups._create_expert_data_and_model_parallel(ep_size, groups.mpu, order)
        else:
            groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=order)


def _carrying(engine: Any, model: Any) -> tuple[bool, str | None]:
    """Does the stage carry a loss, and what would be in the way if any stage does?

    The engine has not given the module its config's checkpointing yet.
    """
    from moe_groups.carry_loss import CarryLoss, carrying_problem

    pipeline = engine._config.pipeline
    partitioned = model.topology().get_dim("model") > 1 and (
        pipeline["pipe_partitioned"] or pipeline["grad_partitioned"]
    )
    interval = pipeline["activation_checkpoint_interval"] or model.activation_checkpoint_interval
    own = getattr(model.activation_checkpoint_func, "__module__", "").startswith("deepspeed.")
    once = own and pipeline.get("use_reentrant") is not False
    recomputed = interval > 0 and model.num_stages > 1 and once
    stage, layers = f"pipeline stage {model.stage_id}", model.forward_funcs
    problem = carrying_problem(layers, model.loss_fn, partitioned, recomputed, stage)
    return any(isinstance(layer, CarryLoss) for layer in layers), problem


def _wrap_zero_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """One all-reduce over the stages for each group of the stage that has most of them."""

    def scaled_global_norm(self: Any, norm_type: Any = 2) -> Any:
        missing = _groups_of_any_stage(self) - len(self.bit16_groups)
        norms = [original(self, norm_type)]
        for _ in range(missing):
            if self.cpu_offload:  # this stage adds nothing to what the others have there
                norms.append(self.complete_grad_norm_calculation_for_cpu_offload([]))
            else:
                norms.append(self.get_grad_norm_direct([], []))
        if not missing:
            return norms[0]
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(norms, norm_type)

    return scaled_global_norm


def _wrap_is_model_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    """ZeRO's norm leaves out what it takes for copies of the first tensor-parallel rank."""

    def is_model_parallel_parameter(p: torch.Tensor) -> bool:
        return _is_own(p, original(p))

    return is_model_parallel_parameter


def _groups_of_any_stage(optimizer: Any) -> int:
    """The number of groups, on the stage of this pipeline (model-parallel rank) with most."""
    count = len(optimizer.bit16_groups)
    group = optimizer.model_parallel_group
    if group is None or torch.distributed.get_world_size(group) == 1:
        return count
    most: int | None = getattr(optimizer, _MOST, None)
    if most is None:
        counts = torch.tensor([count], device=optimizer.device)
        torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX, group=group)
        most = int(counts)
        setattr(optimizer, _MOST, most)
    return most


def _wrap_grads_for_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_grads_for_norm(self: Any, for_clipping: bool = False) -> Any:
        groups = self.optimizer.param_groups
        for has_gradients, group in zip(self.fp32_groups_has_gradients, groups, strict=True):
            if group.get("moe"):
                # Its buffer holds what all ranks that share it made, also where this one had none.
                has_gradients[:] = [True] * len(has_gradients)
        if for_clipping:
            return original(self, for_clipping)
        dense, experts = original(self)
        nothing = self.fp32_groups_flat_partition[0].new_zeros(1)
        if not dense:  # an empty list would crash
            dense = [nothing]
        experts = _merged(experts)
        if _has_stages(self):
            experts = {key: experts.get(key, [nothing]) for key in _parallel_groups()}
            if experts and not self.has_moe_layers:  # other stages have: all take part in the sum
                self.has_moe_layers, self.expert_gradients = True, {}
        return dense, experts

    return get_grads_for_norm


def _has_stages(optimizer: Any) -> bool:
    from deepspeed.utils.bwc import bwc_pipeline_parallel_world_size

    return optimizer.mpu is not None and bwc_pipeline_parallel_world_size(optimizer.mpu) > 1


def _parallel_groups() -> list[str]:
    """``ep_size_<N>`` of all process groups, in the order in which all ranks made them."""
    from deepspeed.utils import groups

    return [name for name in groups._EXPERT_PARALLEL_GROUP if parallel_group_of(name) == name]


def _wrap_grads_for_reduction(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_grads_for_reduction(self: Any) -> Any:
        dense, experts = original(self)
        return dense, _merged(experts)

    return get_grads_for_reduction


def _wrap_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_norm_with_moe_layers(
        non_expert_norm: Any, mpu: Any, expert_tensors: Any, norm_type: Any = 2
    ) -> Any:
        return original(non_expert_norm, mpu, _merged(expert_tensors), norm_type)

    return get_norm_with_moe_layers


def _wrap_gather_tokens(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """gloo wants the shape of what it gathers, not a flat buffer, as nccl takes it."""

    def _gather_tokens(input_: torch.Tensor, dim: int = 0) -> torch.Tensor:
        from deepspeed.utils import groups
        from deepspeed.utils.bwc import bwc_tensor_model_parallel_group

        if input_.device.type != "cpu":
            return original(input_, dim)
        group = bwc_tensor_model_parallel_group(groups.mpu)
        count = torch.distributed.get_world_size(group)
        parts = [torch.empty_like(input_).contiguous() for _ in range(count)]
        torch.distributed.all_gather(parts, input_.contiguous(), group=group)
        return torch.cat(parts, dim)

    return _gather_tokens


def _wrap_setup(original: Callable[..., None]) -> Callable[..., None]:
    def _setup_for_real_optimizer(self: Any) -> None:
        if len(self.optimizer.param_groups) <= _MANY_GROUPS:
            return original(self)
        namespace = original.__globals__
        report = namespace["see_memory_usage"]
        namespace["see_memory_usage"] = lambda *args, **kwargs: None
        try:
            original(self)
        finally:
            namespace["see_memory_usage"] = report

    return _setup_for_real_optimizer


_BF16 = "deepspeed.runtime.bf16_optimizer"
_ZERO = "deepspeed.runtime.zero.stage_1_and_2"
_MOST = "_moe_groups_most"
_CHANGES: tuple[_Change, ...] = (
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_configure_distributed_model", _wrap_configure),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_broadcast_model", _wrap_broadcast),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_do_optimizer_sanity_check", _wrap_sanity_check),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "_configure_basic_optimizer", _wrap_basic),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "save_checkpoint", _wrap_save),
    ("deepspeed.runtime.engine:DeepSpeedEngine", "load_checkpoint", _wrap_load),
    (f"{_BF16}:BF16_Optimizer", "_setup_for_real_optimizer", _wrap_setup),
    (_ZERO, "is_model_parallel_parameter", _wrap_is_model_parallel),
    (f"{_ZERO}:DeepSpeedZeroOptimizer", "scaled_global_norm", _wrap_zero_norm),
    (f"{_BF16}:BF16_Optimizer", "get_grads_for_norm", _wrap_grads_for_norm),
    (f"{_BF16}:BF16_Optimizer", "get_grads_for_reduction", _wrap_grads_for_reduction),
    ("deepspeed.moe.mappings", "_gather_tokens", _wrap_gather_tokens),
    ("deepspeed.runtime.fp16.fused_optimizer", "get_norm_with_moe_layers", _wrap_norm),
)


# ---- collectives of a checkpointed region ----------------------------------------------


def support_kept_collectives() -> None:
    """Send the MoE layers' collectives through ``kept_collectives.py``.

    Outside of a checkpointed region, in the backward pass for one, they run as before. Does
    nothing when called again, or where DeepSpeed is not imported: no layer is its.

    Raises:
        UnsupportedDeepSpeedError: this DeepSpeed lacks something that is relied on.
            Nothing has been changed then.
    """
    if "deepspeed" in sys.modules:
        _change(_KEPT, "checkpoint_activations needs")


def _wrap_forward(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Of an autograd function that communicates and returns the result."""
    kind = original.__qualname__

    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        if not inside_region():
            return original(ctx, *args)
        return once(kind, ctx, lambda: original(ctx, *args))

    return forward


def _wrap_all_reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    """The gates agree on a capacity with it; other tensors are none of ours."""

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        capacity = tensor.numel() == 1 and not tensor.is_floating_point()
        if not capacity or not inside_region() or _is_async(*args, **kwargs):
            return original(tensor, *args, **kwargs)

        def reduce() -> torch.Tensor:
            original(tensor, *args, **kwargs)
            result: torch.Tensor = tensor.clone()
            return result

        tensor.copy_(once("all_reduce of a whole number", None, reduce))
        return None

    return all_reduce


def _is_async(
    op: Any = None, group: Any = None, async_op: bool = False, *_: Any, **__: Any
) -> bool:
    return async_op


_KEPT: tuple[_Change, ...] = (
    ("deepspeed.moe.sharded_moe:_AllToAll", "forward", _wrap_forward),
    ("deepspeed.moe.mappings:_GatherTokens", "forward", _wrap_forward),
    ("deepspeed.comm", "all_reduce", _wrap_all_reduce),
)


# ---- exact gradient partitions ---------------------------------------------------------

_EXACT = "_use_compact_grad_partition_buffer"
_EXACT_MEANS = (_EXACT, "_build_compact_grad_partition_buffer", "_get_preflattened_grad_partition")
_OTHER_WRAPPERS = {
    "NoneType": "it has no optimizer",
    "DummyOptim": "it has no optimizer",
    "BF16_Optimizer": "BF16_Optimizer keeps all gradients in one fp32 buffer for the whole run",
    "DeepSpeedZeroOptimizer_Stage3": "ZeRO-3 already keeps nothing but its partitions",
}


def keep_exact_partitions(engine: Any) -> None:
    """Make a ZeRO-1/2 engine keep exact gradient partitions, as with fp32 accumulation.

    DeepSpeed has the code (``runtime/zero/stage_1_and_2.py``) and reserves it for an fp32
    accumulation of another dtype than the model's, though nothing in it depends on the
    dtype: buffers are made in the accumulation's. One method decides; on this optimizer, not
    on its class, it is replaced by one that always says yes.

    Raises:
        InvalidArgumentError: it cannot be done for this engine, or not now.
        UnsupportedDeepSpeedError: this DeepSpeed lacks the code.
    """
    optimizer = engine.optimizer
    if problem := _why_not_exact(engine, optimizer):
        raise InvalidArgumentError(f"compact_gradients cannot be used on this engine: {problem}.")
    missing = [name for name in _EXACT_MEANS if not callable(getattr(optimizer, name, None))]
    if missing:
        raise UnsupportedDeepSpeedError(
            f"this DeepSpeed's {type(optimizer).__name__} has no {missing[0]}, which "
            f"compact_gradients needs: install deepspeed {TESTED_VERSION}, which this release was "
            "tested with, or leave the call out."
        )
    if getattr(optimizer, _EXACT) is _always or _is_exact(optimizer):
        return
    if _holds_gradients(optimizer):
        raise InvalidArgumentError(
            "compact_gradients was called while the engine holds gradients: call it before the "
            "first backward, or after the engine.step() that ends a gradient accumulation."
        )
    setattr(optimizer, _EXACT, _always)


def _always(group_idx: int) -> bool:
    return True


def _is_exact(optimizer: Any) -> bool:
    """Does DeepSpeed itself keep exact partitions, in all groups?"""
    return all(getattr(optimizer, _EXACT)(index) for index in range(len(optimizer.bit16_groups)))


def _why_not_exact(engine: Any, optimizer: Any) -> str | None:
    """What keeps this engine from exact partitions, the same answer on every rank."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    name = type(optimizer).__name__
    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        reason = _OTHER_WRAPPERS.get(name, f"it steps with {name}, without ZeRO")
        return (
            f'{reason}. It is for "zero_optimization": {{"stage": 1 or 2}} with gradients that '
            'accumulate in the dtype of the model ("data_types": {"grad_accum_dtype": "bf16"})'
        )
    if optimizer.cpu_offload or optimizer.zenflow:
        return (
            "an offloaded optimizer (offload_optimizer, zenflow) keeps its gradients in CPU "
            "memory. Leave out the call, or the offload"
        )
    if engine.is_deepcompile_enabled():
        return "DeepCompile makes gradient buffers of its own. Leave out the call, or deepcompile"
    if _has_muon(optimizer):
        return (
            "Muon needs the whole gradient of each parameter that it steps. Leave out the call, or "
            "step all parameters with another optimizer"
        )
    return None


def _has_muon(optimizer: Any) -> bool:
    """As in DeepSpeed's ``_is_muon_group``, but for all parameters and not the rank's first."""
    members = (param for group in optimizer.bit16_groups for param in group)
    muon = "muon" in type(optimizer.optimizer).__name__.lower()
    return muon and any(getattr(param, "use_muon", False) for param in members)


def _holds_gradients(optimizer: Any) -> bool:
    """Gradients of a backward pass that no step has used yet, wherever DeepSpeed puts them."""
    kept = (*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values())
    params = (param for group in optimizer.bit16_groups for param in group)
    return any(one is not None for one in kept) or any(
        param.grad is not None or param.grad_accum is not None for param in params
    )
