"""The layout of a running engine: of this rank, and gathered from all."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from moe_groups._deepspeed.checkpoints import LaidOut, checkpoint_rank, laid_out_groups
from moe_groups._deepspeed.engines import Engine, stepped_groups, wrapper_name
from moe_groups._deepspeed.patching import deepspeed_version
from moe_groups._deepspeed.process_groups import expert_parallel_rank
from moe_groups._version import __version__
from moe_groups.checkpoints.kept_state import kept_by
from moe_groups.checkpoints.layout import (
    FlatGroup,
    FlatParam,
    Layout,
    Rank,
    merge_ranks,
    readable_options,
)
from moe_groups.checkpoints.manifest import Manifest
from moe_groups.errors import CheckpointError
from moe_groups.groups.grouping import fingerprint
from moe_groups.groups.origin import Origin, origin_of
from moe_groups.tags import LABELS, get_expert_tag, parallel_group_of, shape_of


def own_groups(engine: Engine) -> tuple[Rank, list[FlatGroup]]:
    """This rank and its groups, in the order of the optimizer; no communication."""
    rank = Rank(*checkpoint_rank(engine))
    return rank, [_flat_group(laid_out, rank) for laid_out in laid_out_groups(engine)]


def _flat_group(laid_out: LaidOut, rank: Rank) -> FlatGroup:
    options = laid_out.options
    parallel_group = parallel_group_of(str(options["name"])) if options.get("moe") else None
    ep_rank = None if parallel_group is None else expert_parallel_rank(parallel_group)
    return FlatGroup(
        name=str(options.get("name", "")),
        ranks=tuple(laid_out.ranks),
        params=tuple(_flat_param(*member, ep_rank) for member in laid_out.members),
        model_rank=rank.model,
        parallel_group=parallel_group,
        ep_rank=ep_rank,
        labels={key: options[key] for key in LABELS if key in options},
        options=readable_options(options),
    )


def _flat_param(name: str, param: torch.Tensor, offset: int, ep_rank: int | None) -> FlatParam:
    tag = get_expert_tag(param, name)
    expert = None if tag is None or ep_rank is None else tag.global_number(ep_rank)
    shape = tuple(shape_of(param))
    dtype = str(param.dtype).removeprefix("torch.")
    return FlatParam(name, math.prod(shape), offset, shape, dtype, expert)


def gather_layout(engine: Engine) -> Layout | None:
    """The layout of all ranks, on the first one; None elsewhere. All ranks call it together.

    A group is sent by one of the ranks that share it, so what the first rank receives grows
    with the model and not with the number of ranks.

    Raises:
        CheckpointError: on all ranks, where one of them cannot say what its groups are.
    """
    rank, groups, origin, problem = _own_groups_or_problem(engine)
    keys = [fingerprint((group.name, group.place())) for group in groups]
    origin_key = fingerprint([origin])
    world = distributed.get_world_size()
    heads: list[Any] = [None] * world
    distributed.all_gather_object(heads, (rank, keys, origin_key, problem))
    for index, (*_, problem) in enumerate(heads):
        if problem is not None:
            raise CheckpointError(f"the groups of rank {index} cannot be described: {problem}.")
    sender: dict[bytes, int] = {}
    for index, (_, named, made_from, _) in enumerate(heads):
        for key in (*named, made_from):
            sender.setdefault(key, index)
    me = distributed.get_rank()
    parts = zip((*keys, origin_key), (*groups, origin), strict=True)
    mine = {key: part for key, part in parts if sender[key] == me}
    sent: list[Any] | None = [None] * world if me == 0 else None
    distributed.gather_object(mine, sent)
    if sent is None:
        return None
    known = {key: part for some in sent for key, part in some.items()}
    return merge_ranks(
        [(head, [known[key] for key in named]) for head, named, *_ in heads],
        {head: known[key] for head, _, key, _ in heads if known[key] is not None},
    )


def own_origin(engine: Engine) -> Origin | None:
    """What this rank's groups were made from; None where it is not known."""
    groups = [(str(options.get("name", "")), own) for options, own in stepped_groups(engine)]
    return origin_of(groups, lambda param: engine.param_names.get(param, "?"))


def _own_groups_or_problem(
    engine: Engine,
) -> tuple[Rank | None, list[FlatGroup], Origin | None, str | None]:
    """This rank's groups, or what is wrong with them: the other ranks wait in a collective."""
    try:
        return *own_groups(engine), own_origin(engine), None
    except Exception as error:  # the model's and its parameters' own code may raise anything
        return None, [], None, f"{type(error).__name__}: {error}"


def with_options_of(engine: Engine, layout: Layout) -> Layout:
    """The layout with the hyperparameters that the engine's groups have now.

    A group stands at the same place on all ranks, so this rank's options are those of all.
    """
    now = {
        (place, str(group.get("name", ""))): readable_options(group)
        for place, group in enumerate(engine.optimizer.param_groups)
    }
    groups = list(layout.groups)
    orders = set(layout.order.values())
    for place, index in {pair for own in orders for pair in enumerate(own)}:
        if options := now.get((place, groups[index].name)):
            groups[index] = replace(groups[index], options=options)
    return replace(layout, groups=tuple(groups))


def describe_run(engine: Engine, layout: Layout) -> Manifest:
    """The manifest of a running engine, without files."""
    about = {
        "step": engine.global_steps,
        "world": {
            "ranks": distributed.get_world_size(),
            "data_parallel": layout.data_parallel_size,
            "model_parallel": len(layout.model_ranks),
        },
        "versions": {
            "moe_groups": __version__,
            "deepspeed": deepspeed_version(),
            "torch": str(torch.__version__),
        },
    }
    kept = kept_by(engine.basic_optimizer)
    return Manifest(layout, wrapper_name(engine), about, optimizer=kept)
