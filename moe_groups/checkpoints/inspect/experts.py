"""Which layer and which expert each parameter of a checkpoint belongs to."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from moe_groups.checkpoints.expert_names import ExpertPlaces
from moe_groups.checkpoints.inspect.report import MASTER_NAME, SavedExpert
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout
from moe_groups.topology import ep_size_of


class Place(NamedTuple):
    """Where parameters belong that are reported in one line.

    Attributes:
        model_rank: model-parallel rank.
        layer: None for dense parameters.
        expert: number over all ranks, where known.
        ep_rank: place in the expert-parallel group, where known.
    """

    model_rank: int
    layer: str | None = None
    expert: int | None = None
    ep_rank: int | None = None


ParamKey: TypeAlias = tuple[int, str]
"""Index of a group in its layout, and name of a parameter."""


def find_places(layout: Layout) -> dict[ParamKey, Place]:
    """The place of each parameter, by group and name.

    Where the layout has no number of an expert, as without a manifest, it follows from the
    number on the rank: all ranks hold equally many experts of a layer.
    """
    local = _on_the_rank(layout)
    sizes: dict[tuple[int, str | None, str], int] = defaultdict(int)
    for (index, _), (layer, number) in local.items():
        key = (*_home(layout.groups[index]), layer)
        sizes[key] = max(sizes[key], 0 if number is None else number + 1)
    places = {}
    for index, group, param in _parameters(layout):
        if group.parallel_group is None:
            places[index, param.name] = Place(group.model_rank)
            continue
        layer, number = local[index, param.name]
        ep_rank = 0 if ep_size_of(group.parallel_group) == 1 else group.ep_rank
        expert = param.expert
        if expert is None and number is not None and ep_rank is not None:
            expert = ep_rank * sizes[(*_home(group), layer)] + number
        places[index, param.name] = Place(group.model_rank, layer, expert, ep_rank)
    return places


def _on_the_rank(layout: Layout) -> dict[ParamKey, tuple[str, int | None]]:
    """Layer of each expert parameter, and number among the rank's experts of the layer."""
    names = {model: _names(layout, model) for model in layout.model_ranks}
    found = {}
    for index, group, param in _parameters(layout):
        if group.parallel_group is not None:
            told = names[group.model_rank].of(param.name)
            layer = group.labels.get("expert_group_name") or (told and told.layer)
            number = group.labels.get("expert_number")
            number = told.number if number is None and told else number
            found[index, param.name] = str(layer or group.parallel_group), number
    return found


def _names(layout: Layout, model: int) -> ExpertPlaces:
    mine = [group for group in layout.groups if group.model_rank == model]
    dense, experts = (
        [param for group in mine if bool(group.parallel_group) is moe for param in group.params]
        for moe in (False, True)
    )
    return ExpertPlaces(dense, experts)


def _home(group: FlatGroup) -> tuple[int, str | None]:
    return group.model_rank, group.parallel_group


def _parameters(layout: Layout) -> Iterator[tuple[int, FlatGroup, FlatParam]]:
    for index, group in enumerate(layout.groups):
        for param in group.params:
            yield index, group, param


def expert_rows(
    layout: Layout,
    places: Mapping[ParamKey, Place],
    squares: Mapping[ParamKey, Mapping[str, float]],
) -> tuple[SavedExpert, ...]:
    """A row for each place: dense parameters first, then layer by layer.

    Args:
        squares: sums of the squares of each state of a parameter.
    """
    members: dict[Place, list[tuple[int, FlatParam]]] = {}
    for index, _, param in _parameters(layout):
        members.setdefault(places[index, param.name], []).append((index, param))
    layers = {layer: order for order, layer in enumerate({place.layer: 0 for place in members})}

    def order(place: Place) -> tuple[int, ...]:
        numbers = (-1 if number is None else number for number in (place.expert, place.ep_rank))
        return int(place.layer is not None), place.model_rank, layers[place.layer], *numbers

    return tuple(_row(place, members[place], squares) for place in sorted(members, key=order))


def _row(
    place: Place,
    members: list[tuple[int, FlatParam]],
    squares: Mapping[ParamKey, Mapping[str, float]],
) -> SavedExpert:
    sums: dict[str, float] = {}
    for index, param in members:
        for state, square in squares.get((index, param.name), {}).items():
            sums[state] = sums.get(state, 0.0) + square
    return SavedExpert(
        layer=place.layer,
        expert=place.expert,
        ep_rank=place.ep_rank,
        model_rank=place.model_rank,
        parameters=len(members),
        elements=sum(param.numel for _, param in members),
        norms={state: sums[state] ** 0.5 for state in sorted(sums, key=_master_first)},
    )


def _master_first(state: str) -> tuple[bool, str]:
    return state != MASTER_NAME, state
