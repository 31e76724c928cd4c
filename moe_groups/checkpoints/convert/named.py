"""The groups that a name stands for: made from what the manifest says, as a run makes its own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from moe_groups._common.arguments import SplitBy, check_one_of
from moe_groups.checkpoints.convert.ep_size import with_ep_size
from moe_groups.checkpoints.layout import (
    FlatGroup,
    Layout,
    Rank,
    lay_out,
    merge_ranks,
    params_by_name,
)
from moe_groups.errors import CheckpointError
from moe_groups.groups.grouping import (
    DEEPSPEED_MAX_GROUP_SIZE,
    Caps,
    make_plan,
    split_like_deepspeed,
)
from moe_groups.groups.keys import Key, Table
from moe_groups.groups.names import GroupNames
from moe_groups.groups.origin import Origin

TargetName: TypeAlias = Literal["stock", "parallel_group", "module", "expert"]
TARGETS: tuple[TargetName, ...] = get_args(TargetName)

_WAY_OUT = (
    "Give a file that says what the new groups are (a refused load_checkpoint writes one, and so "
    "does save_checkpoint: moe_groups.json) in place of a name, or load with "
    'protect_checkpoints(engine, regroup="auto").'
)


class _Made(NamedTuple):
    """A new group: name, labels and rows."""

    name: str
    labels: Mapping[str, Any]
    rows: Any


def named_target(
    source: Layout,
    to: TargetName,
    max_group_size: int | float | None = None,
    ep_size: int | None = None,
    data_before_experts: bool = False,
) -> Layout:
    """The groups that another way to split makes for the run that saved a checkpoint.

    They are those of ``create_moe_param_groups(..., split_by=to)`` for the same model, the same
    groups of the caller and the same rules; with "stock" those of DeepSpeed's own split, of which
    each of the caller's groups is one for each set of rules that applies.

    Args:
        source: of the checkpoint.
        to: "stock", or a ``split_by``.
        max_group_size: most elements of a group. None: no cap, for "stock" DeepSpeed's default.
        ep_size: of all MoE layers; None for that of the checkpoint.
        data_before_experts: ``use_data_before_expert_parallelism``, for another ``ep_size``.

    Raises:
        InvalidArgumentError: an argument is out of range.
        CheckpointError: the manifest does not say what is needed.
    """
    check_one_of("to", to, TARGETS)
    cap = Caps(max_group_size, None, None)
    if to == "stock" and max_group_size is None:
        cap.size = DEEPSPEED_MAX_GROUP_SIZE
    if source.origins.keys() < source.order.keys():
        raise CheckpointError(
            "nothing says what the groups of the checkpoint were made from: it has no "
            "moe_groups.json, or one of an earlier release, or of groups that "
            "create_moe_param_groups did not make or that were changed afterwards. "
            f"{_WAY_OUT}"
        )
    for rank in {own: rank for rank, own in source.order.items()}.values():
        _check_order(source.of(rank), [row.name for row in source.origins[rank].rows])
    if ep_size is not None:
        source = with_ep_size(source, ep_size, data_before_experts)
    made: dict[tuple[int, ...], list[FlatGroup]] = {}
    for rank in sorted(source.order):
        own = source.order[rank]
        if own not in made:
            made[own] = list(_regroup(source.of(rank), source.origins[rank], to, cap))
    columns = [(rank, made[source.order[rank]]) for rank in sorted(source.order)]
    return merge_ranks(columns, source.origins)


def name_of_groups(source: Layout, max_group_size: int | None) -> TargetName:
    """The name that stands for the groups of a checkpoint.

    Raises:
        CheckpointError: none does, or the manifest does not say what they were made from.
    """
    for to in ("module", "expert", "parallel_group"):
        made = named_target(source, to, max_group_size)
        if all(_places(made, rank) == _places(source, rank) for rank in source.order):
            return to
    raise CheckpointError(
        "the groups of the checkpoint are none of module, expert and parallel_group with "
        f"max_group_size={max_group_size}: give the cap that they were made with, or say what the "
        "new groups are."
    )


def _places(layout: Layout, rank: Rank) -> list[Any]:
    return [(group.name, group.place()) for group in layout.of(rank)]


def _regroup(
    groups: list[FlatGroup], origin: Origin, to: TargetName, cap: Caps
) -> Iterator[FlatGroup]:
    """One rank's new groups."""
    homes = params_by_name(groups)
    names = [row.name for row in origin.rows]
    table = origin.table(
        "parallel_group" if to == "stock" else to,
        {name: param.numel for name, (_, param) in homes.items()},
    )
    made = _stock_groups(origin, table, cap) if to == "stock" else _groups(origin, table, to, cap)
    for name, labels, rows in made:
        home = homes[names[rows[0]]][0]
        params = lay_out([homes[names[row]][1] for row in rows])
        yield replace(home, name=name, params=params, labels=labels)


def _check_order(groups: list[FlatGroup], names: list[str]) -> None:
    """Refuse what ``round_robin_gradients`` and ``parameter_alignment`` make of groups.

    The new groups would have to be as these settings make them.
    """
    row_of = {name: row for row, name in enumerate(names)}
    for group in groups:
        plain = sorted(group.params, key=lambda param: row_of[param.name])
        if lay_out(plain) != group.params:
            raise CheckpointError(
                f"group {group.name!r} has its parameters in another order than they were given "
                "in, or gaps between them (round_robin_gradients, parameter_alignment), which the "
                f"groups of a name do not have. {_WAY_OUT}"
            )


def _groups(origin: Origin, table: Table, to: SplitBy, cap: Caps) -> Iterator[_Made]:
    for row in origin.rows:
        if row.parallel_group is not None and row.layer is None and to != "parallel_group":
            raise CheckpointError(
                f"{row.name} had no tag that says its layer when it was grouped, and {to!r} groups "
                f"need one. {_WAY_OUT}"
            )
    for name, key, number, rows in make_plan(table, cap.of, origin.sources):
        labels = {"expert_group_name": key.layer, "expert_number": number}
        yield _Made(name, labels if key.parallel_group else {}, rows)


def _stock_groups(origin: Origin, table: Table, cap: Caps) -> Iterator[_Made]:
    if len({row.parallel_group for row in origin.rows} - {None}) > 1:
        raise CheckpointError(
            "DeepSpeed's own split orders the groups of several expert-parallel sizes in another "
            f"way in every run. {_WAY_OUT}"
        )
    if origin.frozen_experts:
        raise CheckpointError(
            "DeepSpeed's own split counts frozen experts when it cuts groups by size, and "
            f"moe_groups.json does not list these. {_WAY_OUT}"
        )
    dtype = origin.rows[0].dtype  # all the same, as it mixes dtypes
    variants = sorted({row.variant for row in origin.rows})
    keys = {variant: Key(None, None, variant, dtype) for variant in variants}
    names = GroupNames(origin.names, keys.values())
    most = float("inf") if cap.size is None else cap.size
    for parallel_group, variant, rows in split_like_deepspeed(table, most):
        yield _Made(parallel_group or names.of(keys[variant], None), {}, rows)
