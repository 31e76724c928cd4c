"""Changes of ``deepspeed.initialize`` for our groups, on one rank."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from moe_groups._common.warn import warn
from moe_groups._deepspeed.autoep.early_groups import keep_model_order
from moe_groups._deepspeed.engines import remember
from moe_groups._deepspeed.layers import gather_listed_experts
from moe_groups._deepspeed.ports import PORTS
from moe_groups._deepspeed.process_groups import register_names
from moe_groups._deepspeed.releases import need
from moe_groups.errors import InvalidArgumentError, ParameterInputError, UnmarkedExpertsWarning
from moe_groups.tags import is_expert_parameter, parallel_group_of

MANY_GROUPS = 8
WHOLE = "ep_size_1"
"""Parallel group of experts that every rank has."""
MAKE_LATER = (
    "make groups after the modules were replaced (AutoEP does that inside of "
    "deepspeed.initialize): deepspeed.initialize(optimizer=lambda params: "
    "torch.optim.AdamW(create_moe_param_groups(model)), ...)"
)


def wrap_broadcast(original: Callable[..., None]) -> Callable[..., None]:
    """Check the process groups of our experts before the engine first needs them."""

    def _broadcast_model(self: Any) -> None:
        from deepspeed.utils import groups

        _make_groups_of_whole_experts(self)
        for name, param in self.module.named_parameters():
            known = getattr(param, "group_name", None) in groups._EXPERT_DATA_PARALLEL_GROUP
            if hasattr(param, "expert_group_name") and is_expert_parameter(param) and not known:
                raise ParameterInputError(
                    f"{name} is an expert parameter of {param.group_name!r}, but no layer of the "
                    "model makes these process groups. DeepSpeed knows deepspeed.moe.layer.MoE (or "
                    "moe_groups.MoE) and AutoEP's layers: build one with this ep_size, or set "
                    "param.allreduce = True to train the parameter as a dense one. Experts of "
                    "ep_size=1 need no such layer under ZeRO-3."
                )
        PORTS.process_groups_made(self.module)
        original(self)

    return _broadcast_model


def _steps_whole_experts(engine: Any) -> bool:
    """Does the engine step experts of ``ep_size`` 1 without a layer of DeepSpeed's?

    ZeRO-3 partitions and averages each parameter over its ``ds_process_group``, all ranks but for
    AutoEP's experts, and reads no mark of experts (``runtime/zero/stage3.py``).
    """
    return not engine.has_moe_layers and engine.zero_optimization_stage() == 3


def _make_groups_of_whole_experts(engine: Any) -> None:
    """Make their process groups, which no layer makes: names of groups lead to them.

    The engine first needs them for its broadcast, which it leaves out if ZeRO-3 has partitioned
    the model before.
    """
    from deepspeed.utils import groups

    params = engine.module.parameters()
    if (
        _steps_whole_experts(engine)
        and WHOLE not in groups._EXPERT_DATA_PARALLEL_GROUP
        and any(
            is_expert_parameter(it) and getattr(it, "group_name", None) == WHOLE for it in params
        )
    ):
        groups._create_expert_and_data_parallel(1)


def wrap_sanity_check(original: Callable[..., Any]) -> Callable[..., Any]:
    """Check and register the groups after the process groups exist, before the wrapper is made."""

    def _do_optimizer_sanity_check(self: Any, basic_optimizer: Any) -> Any:
        from deepspeed.runtime.constants import BFLOAT16

        wrapper = original(self, basic_optimizer)
        _make_groups_of_whole_experts(self)
        moe = [g for g in basic_optimizer.param_groups if g.get("moe")]
        ours = [g["name"] for g in moe if "expert_group_name" in g]
        whole = _steps_whole_experts(self) and {*map(parallel_group_of, ours)} == {WHOLE}
        if ours and not self.has_moe_layers and not whole:
            raise ParameterInputError(
                f"group {ours[0]!r} holds experts, but the model has no MoE layer that DeepSpeed "
                "knows (deepspeed.moe.layer.MoE, moe_groups.MoE or AutoEP's), and without one it "
                "reduces all parameters as dense ones. Build a layer with one of these, enable "
                'AutoEP ("expert_parallel") in the config, or set param.allreduce = True to train '
                "the experts as dense parameters. ZeRO-3 needs no such layer for experts of "
                "ep_size=1."
            )
        if ours and wrapper == BFLOAT16:
            need("BF16_Optimizer", 'set "data_types": {"grad_accum_dtype": "bf16"} for ZeRO-1')
        if self.has_moe_layers:
            _check_experts(self, basic_optimizer, wrapper)
        if self.zero_optimization_stage() == 3:
            gather_listed_experts(self.module)
        keep_model_order(self, basic_optimizer)
        settle_muon(self, basic_optimizer)
        register_names(str(g.get("name")) for g in moe)
        remember(self, basic_optimizer)
        return wrapper

    return _do_optimizer_sanity_check


def _check_experts(engine: Any, optimizer: Any, wrapper: Any) -> None:
    """Raise for experts that would not be trained, or not as experts."""
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime.constants import BFLOAT16

    named, groups = list(engine.module.named_parameters()), optimizer.param_groups
    if problem := stale_problem(named, groups):
        raise ParameterInputError(problem)
    problem = unmarked_problem(named, groups)
    if problem is None or any(group.get("moe") for group in groups):
        return
    if wrapper == BFLOAT16 or engine.zero_optimization_stage() in (1, 2):
        raise ParameterInputError(problem)
    if wrapper is not None and isinstance(optimizer, FusedAdam):  # in the fp16 optimizer
        warn(
            f"{problem} DeepSpeed's fp16 optimizer trains them, but each rank's norm has its own "
            "experts only: ranks clip by different norms, and may skip different steps.",
            UnmarkedExpertsWarning,
        )


def wrap_moe_settings(original: Callable[..., None]) -> Callable[..., None]:
    """Step a model whose experts are all frozen as a dense one; DeepSpeed demands a moe group.

    That no expert is trainable is known: :func:`wrap_sanity_check` runs before.
    """

    def _configure_moe_settings(self: Any) -> None:
        if any(group.get("moe") for group in self.optimizer.param_groups):
            original(self)
        else:
            self.has_moe_layers = False  # the wrapper's: the engine still saves the experts

    return _configure_moe_settings


def settle_muon(engine: Any, optimizer: Any) -> None:
    """Set ``use_muon`` of the parameters, which the wrappers read, to that of their group.

    DeepSpeed sets it on all parameters again if the config names Muon, and copies of a model
    lose it. A group with ``use_muon=True`` whose parameters lack it would be stepped with plain
    gradients, without an error.
    """
    # torch has it since 2.9.
    if isinstance(optimizer, getattr(torch.optim, "Muon", ())) and engine.zero_optimization():
        raise InvalidArgumentError(
            "torch.optim.Muon cannot step under ZeRO: it takes matrices, and ZeRO gives it flat "
            "partitions. Use DeepSpeed's, deepspeed.runtime.zero.muon.muon_optimizer."
            "MuonWithAuxAdam, over the same groups, or train without ZeRO (or with FSDP2)."
        )
    for group in optimizer.param_groups:
        if "use_muon" in group:
            for param in group["params"]:
                param.use_muon = bool(group["use_muon"])


def wrap_basic(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse our groups with the config's Muon, for which DeepSpeed makes groups of its own."""

    def _configure_basic_optimizer(self: Any, model_parameters: Any) -> Any:
        given = model_parameters if isinstance(model_parameters, list) else []
        groups = [group for group in given if isinstance(group, dict)]
        ours = any("use_muon" in group or "expert_group_name" in group for group in groups)
        if ours and self.optimizer_name() == "muon":
            raise InvalidArgumentError(
                'the config\'s "optimizer": {"type": "Muon"} makes groups of its own, by the '
                "shapes of the parameters, and drops the names and labels of your groups. "
                "Take it out of the config and pass optimizer=MuonWithAuxAdam(groups) "
                "(deepspeed.runtime.zero.muon.muon_optimizer), with the groups of split_for_muon."
            )
        return original(self, model_parameters)

    return _configure_basic_optimizer


_quiet = False
"""Is a BF16_Optimizer with many groups being set up now?"""


def wrap_setup(original: Callable[..., None]) -> Callable[..., None]:
    """Skip the memory report (and garbage collection) for each group if there are many."""

    def _setup_for_real_optimizer(self: Any) -> None:
        global _quiet
        _quiet = len(self.optimizer.param_groups) > MANY_GROUPS
        try:
            original(self)
        finally:
            _quiet = False

    return _setup_for_real_optimizer


def wrap_report(original: Callable[..., None]) -> Callable[..., None]:
    """Print a memory report of ``BF16_Optimizer`` unless :data:`_quiet`."""

    def see_memory_usage(message: str, force: bool = False) -> None:
        if not _quiet:
            original(message, force)

    return see_memory_usage


def stale_problem(
    model: Iterable[tuple[str, torch.Tensor]], groups: Sequence[Mapping[str, Any]]
) -> str | None:
    """Why experts of ``model`` will not be trained; None if they will.

    If DeepSpeed replaces a parameter of the model, it also replaces it in the groups of an
    optimizer, but not in groups that a callable made.
    """
    named, stepped = list(model), {id(param) for group in groups for param in group["params"]}
    lost = [name for name, param in _trainable_experts(named) if id(param) not in stepped]
    dead = stepped - {id(param) for _, param in named}
    if lost and dead:
        return (
            f"expert parameter {lost[0]} and {len(lost) - 1} more are in no group, so nothing "
            f"would train them, and {len(dead)} tensors of the groups are not in the model: "
            f"{MAKE_LATER}."
        )
    return None


def unmarked_problem(
    model: Iterable[tuple[str, torch.Tensor]], groups: Sequence[Mapping[str, Any]]
) -> str | None:
    """Why ZeRO-1/2 and BF16_Optimizer cannot step experts of ``model``; None if they can."""
    marked = {id(param) for group in groups if group.get("moe") for param in group["params"]}
    unmarked = [name for name, param in _trainable_experts(model) if id(param) not in marked]
    if not unmarked:
        return None
    return (
        f"expert parameter {unmarked[0]} and {len(unmarked) - 1} more are in no group of the "
        "optimizer that is marked moe. Make groups with create_moe_param_groups, for one optimizer "
        f"of the whole model; if you did, {MAKE_LATER}."
    )


def _trainable_experts(
    model: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    return ((n, p) for n, p in model if p.requires_grad and is_expert_parameter(p))
