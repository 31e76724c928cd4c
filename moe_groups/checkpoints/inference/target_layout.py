"""The layout that a checkpoint is to be converted to, from a name and without a model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Literal, NamedTuple, TypeAlias

import torch

from moe_groups._common.arguments import LEVELS, SplitBy, check_one_of
from moe_groups.checkpoints.inference.grouping_input import WAY_OUT, GroupingInput, read_back
from moe_groups.checkpoints.inference.model_order import apart
from moe_groups.checkpoints.inference.rank_change import RankChange
from moe_groups.checkpoints.inference.saved_rows import UNTOLD, Cell, Row
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.errors import CheckpointError, InvalidArgumentError
from moe_groups.groups.caps import DEEPSPEED_MAX_GROUP_SIZE, Caps
from moe_groups.groups.grouping import lines, make_plan
from moe_groups.groups.keys import Key, Table
from moe_groups.groups.names import GroupNames
from moe_groups.tags import ExpertTag, set_expert_tag

TargetName: TypeAlias = Literal["stock", "parallel_group", "module", "expert"]
TARGETS: tuple[TargetName, ...] = ("stock", *LEVELS)


class _Made(NamedTuple):
    """A group of the target.

    Attributes:
        name: of the group.
        labels: its layer and expert.
        rows: its parameters.
        counts: experts on a rank, by layer.
    """

    name: str
    labels: Mapping[str, object]
    rows: list[Row]
    counts: Mapping[Cell, int]


def named_target(
    source: Layout,
    to: TargetName,
    *,
    max_group_size: int | float | None = None,
    data_parallel_size: int | None = None,
    alignment: int = 1,
) -> Layout:
    """The groups that another way to split makes for the run that saved a checkpoint.

    Every parameter has the place that it gets where the same model and the same groups of
    the caller are given to ``create_moe_param_groups(..., split_by=to)``, or with "stock" to
    DeepSpeed's own split. Order and layers come from the saved groups and from the
    parameters' names; what these do not tell is an error, never a guess. What no checkpoint
    tells, and a file of the new run does:

    * Layers are called by their module path where the saved groups have no label for them,
      and a caller's group without dense parameters has no name in DeepSpeed's split. Groups
      are then called differently; parameters are where they belong.
    * Frozen parameters, which DeepSpeed's split counts when it cuts groups by size.
    * Dtypes that parameters had before the engine cast them, beyond what names of groups say.
    * Experts of two of the caller's groups with equal hyperparameters are not told apart in
      DeepSpeed's split.

    The caller's groups have to list parameters in the model's order; saved groups that show
    another are refused, as are those of ``round_robin_gradients``.

    Args:
        source: of the checkpoint.
        to: "stock" for DeepSpeed's split, or a ``split_by``.
        max_group_size: most elements of a group. None: no cap; for "stock" DeepSpeed's
            default. ``float("inf")``: no cap at all.
        data_parallel_size: ranks of the new run; None: as many as saved it.
        alignment: elements to a multiple of which parameters are aligned: 16 bytes of them
            with ``"zero_optimization": {"parameter_alignment": true}``, else 1.

    Raises:
        InvalidArgumentError: an argument is out of range.
        CheckpointError: the checkpoint does not tell what is needed.

    Example:
        >>> layout = named_target(read_layout(find_checkpoint("checkpoints")), "expert",
        ...                       max_group_size=50_000_000)              # doctest: +SKIP
    """
    check_one_of("to", to, TARGETS)
    if type(alignment) is not int or alignment < 1:
        raise InvalidArgumentError(f"alignment={alignment!r} must be an integer of at least 1.")
    caps = Caps(max_group_size, None, data_parallel_size)
    if to == "stock" and max_group_size is None:
        caps.size = DEEPSPEED_MAX_GROUP_SIZE
    columns = _Columns(source, to, caps, alignment)
    if data_parallel_size is None:
        return merge_ranks([(rank, columns.of(rank)) for rank in sorted(source.order)])
    change = RankChange(source, data_parallel_size)
    return merge_ranks(
        [(rank, list(map(change.shared, columns.of(saved)))) for rank, saved in change.ranks()]
    )


class _Columns:
    """Each rank's groups; those of ranks that are alike are found out once."""

    def __init__(self, source: Layout, to: TargetName, caps: Caps, alignment: int) -> None:
        self.source, self.to, self.caps, self.alignment = source, to, caps, alignment
        self._made: dict[object, list[_Made]] = {}
        self._columns: dict[tuple[int, ...], list[FlatGroup]] = {}

    def of(self, rank: Rank) -> list[FlatGroup]:
        same = self.source.order[rank]
        if same not in self._columns:
            groups = [group for group in self.source.of(rank) if group.params]
            key = tuple(map(_alike, groups))
            if key not in self._made:
                self._made[key] = list(_make(read_back(groups), self.to, self.caps))
            made = self._made[key]
            self._columns[same] = [_laid_out(one, groups, self.alignment) for one in made]
        return self._columns[same]


def _alike(group: FlatGroup) -> tuple[object, ...]:
    """Ranks that differ in nothing of this have the same groups, of other experts."""
    params = tuple((param.name, param.numel, param.shape, param.dtype) for param in group.params)
    return group.name, group.parallel_group, str(group.labels), str(group.options), params


def _make(found: GroupingInput, to: TargetName, caps: Caps) -> Iterator[_Made]:
    if to == "stock":
        yield from _split_like_deepspeed(found, caps)
        return
    _check_told(found, to)
    table, counts = found.table(to), found.local_experts()
    _check_neighbours(found, table)
    for _, _, members in lines(table.families):
        _check_order(found, [found.rows[index] for index in members])
    for name, key, number, members in make_plan(table, caps.of, found.sources):
        labels = {"expert_group_name": key.layer, "expert_number": number}
        rows = [found.rows[index] for index in members]
        yield _Made(name, labels if key.parallel_group else {}, rows, counts)


def _check_told(found: GroupingInput, to: SplitBy) -> None:
    """Refuse a finer level than groups and names tell."""
    for row in found.rows if to != "parallel_group" else ():
        what = "layer" if row.layer is None else "expert"
        untold = row.layer is None or (to == "expert" and not row.numbered)
        if row.parallel_group is not None and untold:
            raise CheckpointError(
                f"nothing in the checkpoint tells of which {what} {row.param.name} is, which "
                f"{to!r} groups need. {WAY_OUT}"
            )


def _check_neighbours(found: GroupingInput, table: Table) -> None:
    """Refuse where groups of one layer or expert come together whose order is not known."""
    callers: dict[object, list[int]] = {}
    dtypes: dict[object, list[torch.dtype]] = {}
    for key, number, _ in lines(table.families):
        callers.setdefault((key[:2], number), []).append(key.variant.source)
        dtypes.setdefault((key[:3], number), []).append(key.dtype)
    for what, tells in (
        ("groups of the caller", map(found.callers.tells, callers.values())),
        ("dtypes", map(found.dtypes.tells, dtypes.values())),
    ):
        if not all(tells):
            raise CheckpointError(
                f"parameters of several {what} would come together that were saved in groups of "
                f"different layers, and nothing tells in which order. {WAY_OUT}"
            )


def _check_order(found: GroupingInput, rows: Sequence[Row]) -> None:
    """Refuse what was split more finely, unless its parts follow each other in the model."""
    runs = [list(run) for _, run in groupby(rows, key=lambda row: row.line)]
    for one, other in pairwise(runs):
        if _follows(found, one, other):
            continue
        raise CheckpointError(
            f"{one[-1].param.name} and {other[0].param.name} would be in one group, and as they "
            f"were saved in groups of their own nothing tells in which order. {WAY_OUT}"
        )


def _follows(found: GroupingInput, one: list[Row], other: list[Row]) -> bool:
    names, others = ([row.param.name for row in run] for run in (one, other))
    same_layer = one[0].parallel_group is not None and one[0].cell == other[0].cell
    ordered = same_layer or one[0].variant.source not in found.cells.unknown
    not_before = found.model.before(names[-1], others[0]) is False
    return ordered and not not_before and apart(names, others)


def _split_like_deepspeed(found: GroupingInput, caps: Caps) -> Iterator[_Made]:
    """What DeepSpeed's function makes of parameters that stand for those of the checkpoint."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    if len({row.parallel_group for row in found.rows} - {None}) > 1:
        raise CheckpointError(
            "DeepSpeed's own split orders the groups of several expert-parallel sizes in another "
            f"way in every run. {WAY_OUT}"
        )
    dense = [
        Key(None, None, variant, UNTOLD) for variant in sorted({r.variant for r in found.rows})
    ]
    _check_neighbours(found, found.table("parallel_group"))
    names = GroupNames(found.names, dense)
    row_of: dict[int, Row] = {}
    callers = []
    for key in dense:
        rows = [row for row in found.rows if row.variant == key.variant]
        for _, family in groupby(rows, key=lambda row: row.parallel_group):
            _check_order(found, list(family))
        params = list(map(_stand_in, rows))
        row_of.update((id(param), row) for param, row in zip(params, rows, strict=True))
        callers.append({"name": names.of(key, None), "params": params})
    counts = found.local_experts()
    cap = float("inf") if caps.size is None else caps.size
    for group in split_params_into_different_moe_groups_for_optimizer(callers, cap):
        if group["params"]:
            rows = [row_of[id(param)] for param in group["params"]]
            yield _Made(group["name"], {}, rows, counts)


def _stand_in(row: Row) -> torch.Tensor:
    param = torch.empty(row.param.numel, device="meta")
    if row.parallel_group is not None:
        set_expert_tag(param, ExpertTag(row.parallel_group))
    return param


def _laid_out(made: _Made, groups: Sequence[FlatGroup], alignment: int) -> FlatGroup:
    """The group on a rank that has these saved groups."""
    home = groups[made.rows[0].group]
    params = [_numbered(row, groups[row.group], made.counts) for row in made.rows]
    return replace(
        home, name=made.name, params=lay_out(params, alignment), labels=dict(made.labels)
    )


def _numbered(row: Row, group: FlatGroup, counts: Mapping[Cell, int]) -> FlatParam:
    """The parameter with its expert's number over all ranks, where that can be known."""
    param = group.params[row.place]
    if param.expert is not None or group.ep_rank is None or row.number is None:
        return param
    count = counts.get(row.cell)
    return param if count is None else param._replace(expert=group.ep_rank * count + row.number)
