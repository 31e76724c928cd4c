"""How a wrapper lays out groups and names its files; the guards around saving and loading."""

import functools
import inspect
import itertools
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_groups._deepspeed.engines import (
    engine_data_parallel_group,
    is_pipeline,
    stepped_groups,
    wrapper_name,
)
from moe_groups._deepspeed.layers import biases, layer_parts
from moe_groups._deepspeed.ports import PORTS
from moe_groups._deepspeed.process_groups import expert_data_parallel_ranks
from moe_groups._deepspeed.releases import need
from moe_groups.errors import CheckpointError
from moe_groups.tags import is_expert_parameter, numel_of, parallel_group_of


class LaidOut(NamedTuple):
    """The layout of a group in this rank's wrapper.

    Attributes:
        options: the group's dict in the optimizer.
        members: ``(name, parameter, first element in the group's flat buffer)``.
        ranks: data-parallel ranks that share it, in the order of their partitions; ranks of
            other model-parallel ranks are the DP size plus their global rank.
    """

    options: dict[str, Any]
    members: list[tuple[str, torch.Tensor, int]]
    ranks: list[int]


def laid_out_groups(engine: Any) -> list[LaidOut]:
    """This rank's groups in order, with the names that DeepSpeed writes into checkpoints.

    ZeRO-1/2 may reorder a group (``round_robin_gradients``) and align parameters
    (``parameter_alignment``); the other wrappers lay parameters one after the other.
    """
    optimizer = engine.optimizer
    data_parallel = torch.distributed.get_process_group_ranks(_data_parallel_group(engine))
    position = {rank: index for index, rank in enumerate(data_parallel)}
    groups = []
    for index, (options, params) in enumerate(stepped_groups(engine)):
        if hasattr(optimizer, "round_robin_bit16_groups"):
            params = optimizer.round_robin_bit16_groups[index]
        if hasattr(optimizer, "round_robin_bit16_offsets"):  # DeepSpeed 0.19 may align them
            offsets = optimizer.round_robin_bit16_offsets[index]
        else:
            sizes = [numel_of(param) for param in params]
            offsets = [0, *itertools.accumulate(sizes)][: len(sizes)]
        shared = getattr(optimizer, "real_dp_process_group", None)
        if shared:
            ranks = torch.distributed.get_process_group_ranks(shared[index])
        else:
            shared_by = parallel_group_of(str(options.get("name", "")))
            ranks = expert_data_parallel_ranks(shared_by) if options.get("moe") else []
            ranks = ranks or data_parallel
        names = (engine.param_names.get(param, "?") for param in params)
        members = list(zip(names, params, offsets, strict=True))
        places = [position.get(rank, len(position) + rank) for rank in ranks]
        groups.append(LaidOut(options, members, places))
    return groups


def _data_parallel_group(engine: Any) -> Any:
    group = getattr(engine.optimizer, "dp_process_group", None)
    return engine_data_parallel_group(engine) if group is None else group


def checkpoint_rank(engine: Any) -> tuple[int, int]:
    """``(model-parallel rank, data-parallel rank)``; the names of this rank's files have them."""
    tensor_parallel = getattr(engine, "checkpoint_mp_rank", None)
    if tensor_parallel is None:  # DeepSpeed before 0.19
        tensor_parallel = 0 if engine.mpu is None else engine.mpu.get_model_parallel_rank()
    return int(tensor_parallel), torch.distributed.get_rank(_data_parallel_group(engine))


def experts_optimizer_file(engine: Any, load_dir: object, tag: str) -> Path | None:
    """Where a model with MoE layers has this rank's optimizer states without ZeRO; else None."""
    if engine.zero_optimization() or not engine.has_moe_layers:
        return None
    from deepspeed.utils import groups

    ep_rank = groups._get_expert_parallel_rank(groups._get_max_expert_size_name())
    return Path(engine._get_optimizer_ckpt_name(str(load_dir), tag, ep_rank))


def weights_alone(wrapper: str) -> str:
    """The argument with which ``load_checkpoint`` loads weights into fresh optimizer state.

    ZeRO-3 keeps the weights with the optimizer's partitions, and loads none if the module is to be
    loaded only, without an error (``runtime/engine.py``).
    """
    return "load_optimizer_states=False" if wrapper == "ZeRO-3" else "load_module_only=True"


def loads_weights_by_position(engine: Any) -> bool:
    """Does ``load_checkpoint`` always take the weights from the groups' partitions?

    Under ZeRO-3 it does so in a model with AutoEP's layers (``runtime/engine.py``).
    """
    return wrapper_name(engine) == "ZeRO-3" and bool(engine.has_moe_layers)


def model_states_file(engine: Any, load_dir: Path, tag: str) -> Path | None:
    """The file of a universal checkpoint in which this rank's module is; None where none is.

    With another tensor-parallel size DeepSpeed takes the file at the same place of all.
    """
    files = engine._get_all_ckpt_names(str(load_dir), tag)
    index = checkpoint_rank(engine)[0] * len(files) // engine.mp_world_size
    return Path(files[index]) if files else None


def stage_weights_file(engine: Any, load_dir: Path, tag: str) -> Path | None:
    """The file with the weights of this rank's stage; None without a pipeline, or where none is."""
    path = Path(engine._get_ckpt_name(str(load_dir), tag)) if is_pipeline(engine.module) else None
    return path if path is not None and path.is_file() else None


def separate_steps(engine: Any) -> None:
    """Give each sub-group of ZeRO-3 a step count of its own.

    After the load of a universal checkpoint all share one tensor, which each of them advances
    (``load_hp_checkpoint_state_from_checkpoint_dir_stage3``, ``runtime/zero/stage3.py``).
    """
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def writes_later(engine: Any) -> bool:
    """Does the checkpoint engine write files after ``save_checkpoint`` returned?"""
    checkpoint_engine = engine.checkpoint_engine
    # DeepSpeed has such engines since 0.17.3.
    return hasattr(checkpoint_engine, "is_decoupled") and bool(checkpoint_engine.is_decoupled())


def checkpoint_tag(engine: Any, tag: object) -> str:
    """The tag under which ``save_checkpoint`` saves."""
    return f"global_step{engine.global_steps}" if tag is None else str(tag)


def wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    """Write the manifest of the groups beside the checkpoint."""

    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        save = functools.partial(original, self)
        return PORTS.save_checkpoint(self, save, _arguments(save, args, kwargs))

    return save_checkpoint


def wrap_load(original: Callable[..., Any]) -> Callable[..., Any]:
    """Compare the groups with the manifest before loading; then apply the loaded group options."""

    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        load = functools.partial(original, self)
        given = _arguments(load, args, kwargs)
        _check_release(self, given)
        result = PORTS.load_checkpoint(self, load, given)
        PORTS.checkpoint_loaded(self)
        return result

    return load_checkpoint


def _arguments(call: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(call).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _check_release(engine: Any, given: Mapping[str, Any]) -> None:
    """Refuse, before anything is read, what this DeepSpeed fails at."""
    options = getattr(engine.optimizer, "param_groups", ())
    if not any("expert_group_name" in group for group in options):
        return  # DeepSpeed's own groups fail in its own words
    need("pickled files", "set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 if you trust the checkpoint")
    if given["load_module_only"] and wrapper_name(engine) == "BF16_Optimizer":
        need("BF16 masters", "use ZeRO-1 or ZeRO-2")
    states = given["load_optimizer_states"] and not given["load_module_only"]
    if states and not engine.zero_optimization():
        if engine.bfloat16_enabled():
            need("bf16 states", "train with ZeRO-1")
        elif not engine.fp16_enabled() and engine.has_moe_layers:
            need("fp32 states", "load with load_optimizer_states=False, or train with ZeRO-1")


def wrap_load_module(original: Callable[..., Any]) -> Callable[..., Any]:
    """Load what is frozen now, the frozen experts of this rank, and the biases of experts.

    Under ZeRO-2 DeepSpeed also saves the frozen parameters of rank 0, and loads them last: over
    the frozen experts of all ranks, and with a KeyError for what was not frozen yet.
    """

    def load_module_state_dict(self: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS

        fragments, own = checkpoint.get(FROZEN_PARAM_FRAGMENTS), checkpoint.get("module")
        if fragments is not None and own:
            for name, param in self.module.named_parameters():
                if name in own and (is_expert_parameter(param) or name not in fragments):
                    fragments[name] = own[name]
        if isinstance(own, dict) and kwargs.get("strict", True):
            _match_biases(self.module, own)
        return original(self, checkpoint, *args, **kwargs)

    return load_module_state_dict


def _match_biases(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Biases of ``balance_experts`` begin at 0 without saved ones; refuse to drop saved ones."""
    check_biases(model, saved)
    for name, bias in biases(model).items():
        if bias is not None and name not in saved:
            saved[name] = torch.zeros_like(bias, device="cpu")


def check_biases(model: nn.Module, saved: Container[str]) -> None:
    """Refuse biases that a checkpoint has and the layers of the model have not.

    Raises:
        CheckpointError: names the first.
    """
    for name, bias in biases(model).items():
        if bias is None and name in saved:
            raise CheckpointError(
                f"the checkpoint has {name}, a bias of a run with balance_experts, and without it "
                "the router chooses other experts. Nothing was loaded. Call "
                "balance_experts(engine) before load_checkpoint (and close() the balancer to keep "
                "the biases as they are), or pass load_module_strict=False to drop them."
            )


def wrap_save_16bit(original: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a file that is called the model, and has the experts of rank 0 alone."""

    def save_16bit_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        for path, module in self.module.named_modules():
            parts = layer_parts(module)
            if parts is not None and parts.ep_size > 1:
                raise CheckpointError(
                    "save_16bit_model writes the weights of rank 0, which has 1 of "
                    f"{parts.ep_size} parts of the experts of {path}. Nothing was saved. "
                    "save_experts(engine, directory, family=...) writes all of them, "
                    "gather_model(engine) gathers them, and save_checkpoint saves them too."
                )
        return original(self, *args, **kwargs)

    return save_16bit_model
