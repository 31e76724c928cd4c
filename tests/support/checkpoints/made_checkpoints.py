"""Checkpoints in DeepSpeed's format for any layout, made without DeepSpeed's engine.

:func:`make_checkpoint` writes what ZeRO-1/2 or BF16_Optimizer would have written for a layout
and given values of the parameters' state; :func:`state_of` reads it back with ``torch.load`` and
DeepSpeed's own mapping of names to partitions, and knows nothing of how the library reads.
The distributed tests hold both to what real engines write.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.tensor_fragment import fragment_address

from moe_groups.checkpoints.layout import FlatGroup, Layout, Rank

ParamKey = tuple[int, str | None, int | None, str]
"""Model-parallel rank, parallel group, place in the expert-parallel group, name."""

STATES = ("fp32", "exp_avg", "exp_avg_sq")


def key_of(group: FlatGroup, name: str) -> ParamKey:
    return group.model_rank, group.parallel_group, group.ep_rank, name


def random_state(layout: Layout, seed: int = 0) -> dict[ParamKey, dict[str, torch.Tensor]]:
    """Values of each parameter's master weights and moments."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key_of(group, param.name): {
            state: torch.randn(param.numel, generator=generator) for state in STATES
        }
        for group in layout.groups
        for param in group.params
    }


def make_checkpoint(
    directory: Path,
    layout: Layout,
    values: Mapping[ParamKey, Mapping[str, torch.Tensor]],
    kind: str = "zero",
    tag: str = "global_step7",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> None:
    """Write the files of all ranks.

    Args:
        kind: "zero" or "bf16" (BF16_Optimizer).
        options: hyperparameters of groups by name, beside lr.
    """
    folder = directory / tag
    folder.mkdir(parents=True)
    for rank in layout.order:
        content = {
            "optimizer_state_dict": _optimizer(layout, rank, values, kind, options or {}),
            "ds_config": {"train_batch_size": 4},
            "ds_version": "0.19.8",
        }
        name = f"bf16_zero_pp_rank_{rank.data}_mp_rank_{rank.model:02d}_optim_states.pt"
        torch.save(content, folder / name)
    for model in layout.model_ranks:
        _save_model(folder / f"mp_rank_{model:02d}_model_states.pt", layout, model, scheduler)
    torch.save({"w": torch.arange(5.0)}, folder / "layer_0_expert_0_mp_rank_00_model_states.pt")
    (directory / "latest").write_text(tag)


def _save_model(path: Path, layout: Layout, model: int, scheduler: dict[str, Any] | None) -> None:
    groups = layout.of(Rank(model, 0))
    shapes = [OrderedDict((p.name, torch.Size([p.numel])) for p in g.params) for g in groups]
    content = {
        "module": {"dense": torch.arange(100.0)},
        "optimizer": None,
        "param_shapes": shapes,
        "lr_scheduler": scheduler,
        "dp_world_size": layout.data_parallel_size,
        "global_steps": 7,
        "client": {"epoch": 3},
    }
    torch.save(content, path)


def _optimizer(
    layout: Layout,
    rank: Rank,
    values: Mapping[ParamKey, Mapping[str, torch.Tensor]],
    kind: str,
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    groups = layout.of(rank)
    states: dict[int, dict[str, Any]] = {}
    master, param_groups, slices, paddings = [], [], [], []
    for index, group in enumerate(groups):
        size = group.partition
        at = group.ranks.index(rank.data) * size
        flat = {state: _flat(group, values, state)[at : at + size].clone() for state in STATES}
        behind = max(0, min(size, at + size - group.numel))
        paddings.append(behind if kind == "zero" else _bf16_padding(group, rank))
        # ZeRO saves a slice of a longer storage
        master.append(flat["fp32"][: size - behind] if kind == "zero" else flat["fp32"])
        states[index] = {"step": torch.tensor(7.0)} | {s: flat[s] for s in STATES[1:]}
        names = {"name": group.name} | ({"moe": True} if group.parallel_group else {})
        own = {"lr": 0.1, **options.get(group.name, {})}
        param_groups.append({**names, **group.labels, **own, "params": [index]})
        slices.append(_slices(group, at, size))
    optimizer: dict[str, Any] = {
        "clip_grad": 1.0,
        "base_optimizer_state": {"state": states, "param_groups": param_groups},
        "single_partition_of_fp32_groups": master,
        "group_paddings": paddings,
        "partition_count": [len(group.ranks) for group in groups],
        "ds_version": "0.19.8",
        "param_slice_mappings": slices,
    }
    if kind == "zero":
        optimizer["param_alignment_paddings"] = [[0] * len(group.params) for group in groups]
        optimizer["zero_stage"] = 2
    return optimizer


def _flat(
    group: FlatGroup, values: Mapping[ParamKey, Mapping[str, torch.Tensor]], state: str
) -> torch.Tensor:
    flat = torch.zeros(group.partition * len(group.ranks))
    for param in group.params:
        flat[param.offset : param.end] = values[key_of(group, param.name)][state]
    return flat


def _bf16_padding(group: FlatGroup, rank: Rank) -> int:
    last = rank.data == group.ranks[-1]
    return group.partition * len(group.ranks) - group.numel if last else 0


def _slices(group: FlatGroup, at: int, size: int) -> OrderedDict[str, Any]:
    found: OrderedDict[str, Any] = OrderedDict()
    for param in group.params:
        start, stop = max(at, param.offset), min(at + size, param.end)
        if start < stop:
            found[param.name] = fragment_address(start=start - at, numel=stop - start)
    return found


def state_of(directory: Path, layout: Layout) -> dict[ParamKey, dict[str, torch.Tensor]]:
    """Each parameter's state in a checkpoint whose groups have this layout."""
    tag = (directory / "latest").read_text()
    parts: dict[ParamKey, dict[str, list[torch.Tensor]]] = {}
    done: set[tuple[int, ...]] = set()
    for rank in sorted(layout.order):
        name = f"*zero_pp_rank_{rank.data}_mp_rank_{rank.model:02d}_optim_states.pt"
        (path,) = (directory / tag).glob(name)
        saved = torch.load(path, weights_only=False)["optimizer_state_dict"]
        for index, group in enumerate(layout.of(rank)):
            if (rank.model, rank.data, id(group)) in done:
                continue
            done.add((rank.model, rank.data, id(group)))
            mapping = saved["param_slice_mappings"][index]
            state = saved["base_optimizer_state"]["state"].get(index, {})
            flat = {"fp32": saved["single_partition_of_fp32_groups"][index]}
            flat |= {k: v for k, v in state.items() if torch.is_tensor(v) and v.dim()}
            for name, at in mapping.items():
                own = parts.setdefault(key_of(group, name), {})
                for key, value in flat.items():
                    part = value.detach()[at.start : at.start + at.numel]
                    own.setdefault(key, []).append(part)
    return {
        key: {state: torch.cat(pieces) for state, pieces in found.items()}
        for key, found in parts.items()
    }


def state_by_expert(directory: Path, layout: Layout) -> dict[str, dict[str, torch.Tensor]]:
    """As :func:`state_of`, by the name that a parameter has where one rank has all experts."""
    state = state_of(directory, layout)
    found = {}
    for group in layout.groups:
        for param in group.params:
            numbered = re.sub(r"(?<=deepspeed_experts\.)\d+", str(param.expert), param.name)
            found[f"{group.model_rank}.{numbered}"] = state[key_of(group, param.name)]
    return found


def shard_contents(directory: Path) -> dict[str, Any]:
    """The optimizer states of all files, by file name."""
    return {
        path.name: torch.load(path, weights_only=False)
        for path in sorted(directory.glob("*/*optim_states.pt"))
    }


def same(one: Any, other: Any) -> bool:
    """Equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one).__name__ in ("fragment_address", "LossScaler", "DynamicLossScaler"):
        return type(one) is type(other) and same(vars(one), vars(other))
    return bool(one == other)
