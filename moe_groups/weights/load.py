"""``load_experts``: each rank reads its own experts from a Hugging Face checkpoint."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import distributed, nn

from moe_groups._common.arguments import FilePath, checked
from moe_groups._common.ranks import on_all_ranks
from moe_groups._common.warn import warn
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups._deepspeed.engines import (
    InitializedEngine,
    check_refreshes,
    has_engine,
    is_pipeline,
    refresh_master_weights,
)
from moe_groups._deepspeed.parts import check_partitions, ready_to_gather
from moe_groups.errors import CheckpointError, CheckpointWarning, InvalidArgumentError
from moe_groups.topology import Topology
from moe_groups.weights.load_plan import LoadPlan, NamesGiven, plan_load
from moe_groups.weights.local_experts import find_local_experts, module_of, note_places
from moe_groups.weights.names import ROUTER
from moe_groups.weights.safetensors_files import SafetensorsFiles

_SHOWN = 20
_Prepared: TypeAlias = tuple[SafetensorsFiles, LoadPlan, list[str]]
"""Files, what is read from them, and what nobody reads."""


@dataclass(frozen=True)
class LoadedExperts:
    """What :func:`load_experts` did on this rank.

    Attributes:
        experts: path of each MoE layer to the global numbers of this rank's experts.
        filled: the model's parameters that were loaded; ``<layer>.experts.*.<name>`` for a
            matrix of all experts, ``<layer>.router.<name>`` for the router.
        not_filled: parameters for which the checkpoint has no tensor; they keep their values.
        unused: tensors of the checkpoint that no rank has read.
        bytes_read: bytes that this rank has read.
    """

    experts: dict[str, range]
    filled: list[str]
    not_filled: list[str]
    unused: list[str]
    bytes_read: int

    def __str__(self) -> str:
        lines = [f"{len(self.filled)} names filled, {self.bytes_read:,} bytes read"]
        for path, here in self.experts.items():
            lines.append(f"  {path}: experts {here.start} to {here.stop - 1}")
        for what, names in (("not filled", self.not_filled), ("not used", self.unused)):
            lines += [f"{what}: {', '.join(names)}"] if names else []
        return "\n".join(lines)


@checked
def load_experts(
    model: nn.Module | InitializedEngine,
    directory: FilePath,
    *,
    strict: bool = True,
    layers: Mapping[str, str] | None = None,
    matrices: Mapping[str, str] | None = None,
    router: str = ROUTER,
    topology: Topology | None = None,
    check_data: bool = False,
) -> LoadedExperts:
    """Load a dense checkpoint into a model; each rank reads only its own experts.

    Call it on all ranks, before ``deepspeed.initialize`` with the model, or after it with the
    engine, whose full-precision weights are then refreshed too. The layers are DeepSpeed's
    ``MoE`` (or :class:`moe_groups.MoE`), AutoEP's once the engine has made them, and the blocks of
    transformers 5 with one tensor for all experts. Their
    experts, each with ``w1``, ``w2``, ``w3`` or ``gate_proj``, ``down_proj``,
    ``up_proj``, and their routers are loaded from Mixtral, Qwen3-MoE and DeepSeek checkpoints
    and others with such names, with one tensor for each expert or one for all. Other parameters
    are loaded if a tensor of the checkpoint has the same name. Floating-point values are
    converted to the parameter's dtype.

    It checks everything in the files' headers first. It copies weights from mapped files, a
    matrix at a time, so it needs no memory besides the model's own. Of a parameter that ZeRO-3 has
    partitioned each rank reads its partition, and nothing is gathered.

    Args:
        model: the module, not wrapped by another one; or a DeepSpeed engine.
        directory: with ``model.safetensors``, or ``model.safetensors.index.json`` and its files.
        strict: refuse a checkpoint that lacks a parameter or saved buffer of the model, or has
            a tensor that the model lacks.
        layers: path of an MoE layer in the model to the prefix of its names in the checkpoint,
            where ``{}`` stands for a number: ``{"blocks.{}.moe": "model.layers.{}.mlp"}``.
            None: the layer of the same path, or with the same number.
        matrices: name of a parameter inside the model's expert to its name inside the
            checkpoint's, if these are not the known ones: ``{"up.weight": "up_proj.weight"}``.
        router: name of the router in the checkpoint, below the layer's.
        topology: the ranks, if not DeepSpeed's default: with tensor or pipeline parallelism, or
            ``use_data_before_expert_parallelism``. Not needed after ``deepspeed.initialize``,
            which refuses experts of another rank.
        check_data: first compare the bytes that each rank loads with the CRC-32 that
            :func:`save_experts` and :func:`export_checkpoint` write, so that one changed bit is
            refused on all ranks. Files of others state none, which a warning says.

    Returns:
        What was loaded, and what was not.

    Raises:
        CheckpointError: a file is missing, damaged or (``check_data``) changed; names, shapes,
            dtypes or numbers of experts do not fit. Nothing has been changed.
        InvalidArgumentError: an argument does not fit the model, the rank's experts are not
            known, ZeRO-3 has weights on NVMe or quantized, or the package ``safetensors`` is
            missing.
        UnsupportedDeepSpeedError: this DeepSpeed lacks a function that is needed.

    Example:
        >>> loaded = load_experts(model, "Mixtral-8x7B-v0.1")            # doctest: +SKIP
        >>> loaded.experts["model.layers.0.moe"]                          # doctest: +SKIP
        range(4, 8)
    """
    module = module_of(model)
    _check_module(module, model is module, layers)
    check_partitions(module)
    if model is not module:
        check_refreshes(model)
    local = find_local_experts(module, topology)
    given = NamesGiven(layers, matrices or {}, router)
    with contextlib.ExitStack() as stack:

        def prepare() -> _Prepared:
            files = stack.enter_context(SafetensorsFiles(directory))
            plan = plan_load(files, module, local, given)
            unused = sorted(set(files.tensors) - plan.used)
            _refuse(plan, unused, strict, files.directory)
            return files, plan, unused

        files, plan, unused = _checked(prepare) if check_data else prepare()
        if local and model is module:
            support_our_groups(moe=True)  # so that deepspeed.initialize checks the places
        with ready_to_gather(model) if model is not module else contextlib.nullcontext():
            read = _copy(plan, files)
    if model is module:
        note_places(module, local)
    else:
        refresh_master_weights(model)
    experts = {layer.path: layer.numbers for layer in local}
    return LoadedExperts(experts, plan.filled, plan.not_filled, unused, read)


def _check_module(module: nn.Module, alone: bool, layers: Mapping[str, str] | None) -> None:
    if alone and has_engine(module):
        raise InvalidArgumentError(
            "this model belongs to a DeepSpeed engine, which steps weights of its own: give "
            "load_experts the engine, or call it before deepspeed.initialize."
        )
    if is_pipeline(module) and layers is None:
        raise InvalidArgumentError(
            "a PipelineModule numbers its layers in its own way: say with layers={...} which "
            "is which in the checkpoint."
        )


def _refuse(plan: LoadPlan, unused: list[str], strict: bool, directory: Path) -> None:
    problems = list(plan.problems)
    if not plan.filled:
        problems.append("no name of the checkpoint is one of the model: say more with layers={...}")
    elif strict:
        problems += [f"{name}: the checkpoint has nothing for it" for name in plan.not_filled]
        problems += [f"{name}: the model has no place for it" for name in unused]
    if not problems:
        return
    advice = ""
    if strict and not plan.problems:
        advice = " Name what has another name in layers and matrices, or give strict=False."
    shown = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        shown.append(f"... and {len(problems) - _SHOWN} more")
    raise CheckpointError(
        f"{directory} does not fit the model; nothing has been loaded.{advice}\n  "
        + "\n  ".join(shown)
    )


def _checked(prepare: Callable[[], _Prepared]) -> _Prepared:
    """Compare the bytes too. All ranks raise if one has to, or the others would wait for it."""
    prepared: list[_Prepared] = []

    def check() -> int:
        files, plan, _ = found = prepare()
        prepared.append(found)
        return files.check_data(sorted({piece.tensor for _, piece in plan.copies}))

    ranks = distributed.is_initialized()
    unstated = on_all_ranks(check, "Nothing was loaded.") if ranks else [check()]
    files, *_ = prepared[0]
    if total := sum(unstated):
        warn(
            f"{total:,} tensors of {files.directory} state no CRC-32, because save_experts did not "
            "write them: they cannot be compared.",
            CheckpointWarning,
        )
    return prepared[0]


@torch.no_grad()
def _copy(plan: LoadPlan, files: SafetensorsFiles) -> int:
    read = 0
    for part, piece in plan.copies:
        read += part.fill(files.read(piece.tensor, piece.part))
    return read
