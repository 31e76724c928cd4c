"""Check the groups of an initialized engine, across ranks."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from moe_groups._common.arguments import checked
from moe_groups._deepspeed.engines import (
    Engine,
    Given,
    SteppingEngine,
    engine_data_parallel_group,
    given_options,
    needs_marks,
    scheduled_peaks,
    stepped_groups,
)
from moe_groups._deepspeed.process_groups import resolves
from moe_groups._deepspeed.start import stale_problem, unmarked_problem
from moe_groups.errors import VerificationError
from moe_groups.experts.module_tree import named_parameters, walk
from moe_groups.groups.grouping import fingerprint
from moe_groups.tags import is_expert_parameter, numel_of, parallel_group_of, shape_of

_Stepped = list[tuple[dict[str, Any], list[torch.Tensor]]]
_Layout = tuple[Any, ...]


@checked
def verify(engine: SteppingEngine) -> None:
    """Check the optimizer groups of an initialized engine; all ranks call it together.

    Checks that exactly one group steps every trainable parameter, with the learning rate and
    weight decay that its optimizer had in ``deepspeed.initialize``; that names are unique and
    lead to process groups; that experts are in groups marked ``moe``; and that the groups are
    the same and in the same order on all ranks of the data-parallel group (one all-gather of
    24 bytes a rank; ranks exchange details only if something is wrong). With a learning-rate
    scheduler it checks ``initial_lr`` in place of ``lr`` (torch), or the final rate of a
    warm-up (DeepSpeed, whose ``WarmupLR`` sets one rate for all groups unless it has a list),
    or, if the scheduler has neither, that it does not give one rate to groups that were given
    several. Rates and weight decays must be finite and not negative.

    Args:
        engine: what ``deepspeed.initialize`` returned first.

    Raises:
        InvalidArgumentError: not an engine with an optimizer.
        VerificationError: on every rank of the data-parallel group if anything is wrong on
            any of them; names parameters, groups and ranks.

    Example:
        >>> engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        >>> verify(engine)                                                # doctest: +SKIP
    """
    layout: list[_Layout] = []
    try:
        stepped = stepped_groups(engine)
        model = list(named_parameters(walk(engine.module)))
        names = {id(param): name for name, param in model}
        layout += [_layout(group, params, names) for group, params in stepped]
        problems = [
            *_check_made_late(stepped, model, engine),
            *_check_coverage(stepped, model, names),
            *_check_names(stepped),
            *_check_marks(stepped, names, engine),
            *_check_given(stepped, names, engine),
            *_check_values(stepped),
            *_check_schedule(stepped, engine),
        ]
    except Exception as error:  # the other ranks wait in the all-gather
        problems = [f"checking failed: {type(error).__name__}: {error}"]
    _agree(engine, problems, layout)


def _check_made_late(
    stepped: _Stepped, model: list[tuple[str, torch.Tensor]], engine: Engine
) -> Iterator[str]:
    groups = [{**group, "params": params} for group, params in stepped]
    if problem := stale_problem(model, groups):
        yield problem
    elif needs_marks(engine) and not any(group.get("moe") for group in groups):
        yield from filter(None, [unmarked_problem(model, groups)])


def _check_coverage(
    stepped: _Stepped, model: list[tuple[str, torch.Tensor]], names: dict[int, str]
) -> Iterator[str]:
    groups_of: dict[int, list[str]] = {}
    for group, params in stepped:
        for param in params:
            groups_of.setdefault(id(param), []).append(_name(group))
            if id(param) not in names:
                yield (
                    f"group {_name(group)!r} steps a tensor of shape {tuple(param.shape)} that is "
                    "not in the model: its module was replaced after the groups were made"
                )
    for name, param in model:
        groups = groups_of.get(id(param), [])
        if len(groups) > 1:
            yield f"parameter {name} is stepped by {len(groups)} groups: {', '.join(groups)}"
        elif not groups and param.requires_grad and numel_of(param):
            yield f"parameter {name} is trainable, but no group steps it"


def _check_names(stepped: _Stepped) -> Iterator[str]:
    seen: set[str] = set()
    for index, (group, _) in enumerate(stepped):
        name = _name(group)
        if name in seen:
            yield (
                f"group {index} repeats the name {name!r}: learning-rate monitors refuse it. Group "
                "the whole model in one call of create_moe_param_groups"
            )
        seen.add(name)
        if group.get("moe") and not resolves(name):
            base = parallel_group_of(name)
            yield (
                f"group {name!r} is marked moe, but its name does not lead to the process groups "
                f"of {base!r}: make the groups with create_moe_param_groups, for a model with a "
                "layer of that expert-parallel size"
            )


def _check_marks(stepped: _Stepped, names: dict[int, str], engine: Engine) -> Iterator[str]:
    needed = needs_marks(engine) or any(group.get("moe") for group, _ in stepped)
    for group, params in stepped:
        base = parallel_group_of(_name(group))
        for param in params:
            name = names.get(id(param), str(tuple(param.shape)))
            if needed and is_expert_parameter(param) and not group.get("moe"):
                key = getattr(param, "group_name", None)
                yield (
                    f"expert parameter {name} of {key!r} is in group {_name(group)!r}, which is "
                    "not marked moe: DeepSpeed would average it over different experts"
                )
            elif group.get("moe") and getattr(param, "group_name", None) != base:
                yield (
                    f"parameter {name} of {getattr(param, 'group_name', None)!r} is in group "
                    f"{_name(group)!r} of {base!r}"
                )


def _check_given(stepped: _Stepped, names: dict[int, str], engine: Engine) -> Iterator[str]:
    given = given_options(engine)
    for index, (group, params) in enumerate(stepped):
        wrong: dict[tuple[str, float, float, str], list[str]] = {}
        for param in params:
            record = given.get(id(param))
            if record is None:
                continue
            for key, actual in _actual_options(engine, group, index, record).items():
                expected = record.options[key]
                if actual != expected:
                    found = wrong.setdefault((key, expected, actual, record.name), [])
                    found.append(names.get(id(param), str(tuple(param.shape))))
        for (key, expected, actual, given_in), members in wrong.items():
            yield (
                f"group {_name(group)!r} steps {members[0]}"
                + (f" and {len(members) - 1} more" if len(members) > 1 else "")
                + f" with {key}={actual!r}; given (in group {given_in!r}) was {key}={expected!r}"
            )


def _check_values(stepped: _Stepped) -> Iterator[str]:
    for group, _ in stepped:
        for key in ("lr", "weight_decay"):
            value = float(group.get(key, 0.0))
            if not (math.isfinite(value) and value >= 0):
                yield (
                    f"group {_name(group)!r} steps with {key}={value!r}: set it to a finite number "
                    "of at least 0"
                )


def _check_schedule(stepped: _Stepped, engine: Engine) -> Iterator[str]:
    """A scheduler that gives one rate to groups that were given several.

    A torch scheduler keeps ``initial_lr``, and the final rate of a warm-up is known: what they do
    is seen in :func:`_actual_options`.
    """
    if engine.lr_scheduler is None or scheduled_peaks(engine) is not None:
        return
    given, scheduler = given_options(engine), type(engine.lr_scheduler).__name__
    shared: dict[float, dict[float, str]] = {}
    for group, params in stepped:
        record = next((given[id(param)] for param in params if id(param) in given), None)
        if record is not None and "lr" in record.options and "initial_lr" not in group:
            shared.setdefault(float(group["lr"]), {})[record.options["lr"]] = record.name
    for rate, given_rates in shared.items():
        if rate and len(given_rates) > 1:
            rates = ", ".join(f"lr={lr:g} of group {name!r}" for lr, name in given_rates.items())
            yield (
                f"{scheduler} replaced {rates} by one lr={rate:g}: give the scheduler a list with "
                "a rate for each group, or use one of torch's, which scales each group's own rate"
            )


def _actual_options(
    engine: Engine, group: dict[str, Any], index: int, record: Given
) -> dict[str, float]:
    """The group's options now, with the learning rate from before a scheduler changed it."""
    actual = {key: float(group[key]) for key in record.options if key in group}
    peaks = scheduled_peaks(engine)
    if "initial_lr" in group:
        actual["lr"] = float(group["initial_lr"])
    elif peaks is not None and index < len(peaks) and record.own_lr:
        actual["lr"] = peaks[index]
    elif engine.lr_scheduler is not None:
        actual.pop("lr", None)
    return {key: value for key, value in actual.items() if key in record.options}


def _layout(group: dict[str, Any], params: list[torch.Tensor], names: dict[int, str]) -> _Layout:
    """The layout on which all ranks that share the group must agree."""
    members = [(names.get(id(p), "?"), tuple(shape_of(p)), str(p.dtype)) for p in params]
    options = (float(group.get("lr", 0.0)), float(group.get("weight_decay", 0.0)))
    return _name(group), bool(group.get("moe")), options, members


def _agree(engine: Engine, problems: list[str], layout: list[_Layout]) -> None:
    """Compare ``layout`` over the ranks; raise the same error everywhere."""
    group = engine_data_parallel_group(engine)
    ranks = torch.distributed.get_process_group_ranks(group)
    digest = fingerprint(layout) + len(problems).to_bytes(8, "big")
    mine = torch.tensor(list(digest), dtype=torch.uint8, device=engine.device)
    digests = [torch.empty_like(mine) for _ in ranks]
    torch.distributed.all_gather(digests, mine, group=group)
    clean = not any(bool(d[16:].any()) for d in digests)
    if clean and all(torch.equal(d, digests[0]) for d in digests):
        return
    details: list[Any] = [None] * len(ranks)
    torch.distributed.all_gather_object(details, (problems, layout), group=group)
    found = [
        f"rank {rank}: {problem}"
        for rank, (local, _) in zip(ranks, details, strict=True)
        for problem in local
    ]
    layouts = {rank: detail[1] for rank, detail in zip(ranks, details, strict=True)}
    raise VerificationError([*found, *_compare(layouts)])


def _compare(layouts: dict[int, list[_Layout]]) -> Iterator[str]:
    """The first group in which ranks differ, and the ranks on each side."""
    for index in range(max(map(len, layouts.values()))):
        sides: dict[str, list[int]] = {}
        for rank, layout in layouts.items():
            sides.setdefault(repr(layout[index : index + 1]), []).append(rank)
        if len(sides) < 2:
            continue
        shown = [
            f"ranks {ranks}: {_describe(layouts[ranks[0]][index : index + 1])}"
            for ranks in sides.values()
        ]
        yield f"group {index} is not the same on all ranks: " + "; ".join(shown)
        return


def _describe(layout: list[_Layout]) -> str:
    if not layout:
        return "no such group"
    name, _, (lr, weight_decay), members = layout[0]
    first = ", ".join(f"{member[0]} {list(member[1])}" for member in members[:3])
    more = f" and {len(members) - 3} more" if len(members) > 3 else ""
    return f"{name!r} (lr={lr:g}, weight_decay={weight_decay:g}) with {first}{more}"


def _name(group: dict[str, Any]) -> str:
    return str(group.get("name", ""))
