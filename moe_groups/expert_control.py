"""Give layers and experts other options, or freeze them, in the middle of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from moe_groups._deepspeed.around_step import check_steps_partitions
from moe_groups._deepspeed.contract import support_our_groups
from moe_groups.errors import InvalidArgumentError
from moe_groups.group_selection import select_groups
from moe_groups.step_options import Options, write_options

_KINDS: dict[str, tuple[type, ...]] = {
    "lr": (int, float),
    "lr_multiplier": (int, float),
    "weight_decay": (int, float),
    "frozen": (bool,),
}

Schedule: TypeAlias = Callable[[int], Options]
"""Number of optimizer steps done so far to the options of the next one."""


def set_group_options(engine: Any, pattern: str, **options: float | bool | None) -> None:
    """Set options of the groups that a pattern selects, from the next step on.

    All ranks call it together, between ``engine.step()`` and the next forward. The options
    stay until they are set again; those that are not given stay as they are, and None gives
    a group its own value back. They are saved and loaded with DeepSpeed's checkpoints. They
    hold inside of the optimizer's step only: a learning-rate scheduler does not see them, and
    goes on as without them.

    Args:
        engine: from ``deepspeed.initialize``.
        pattern: a glob pattern as in ``overrides`` of :func:`create_moe_param_groups`, with one
            difference: the number in ``<layer>.expert.<number>`` is the expert's number over
            *all* ranks. Ranks that hold other experts leave their groups as they are.
        **options: ``lr`` in place of the group's (and the scheduler's); ``lr_multiplier``, a
            factor of it; ``weight_decay``; ``frozen``: True leaves weights and optimizer state
            as they are, bit for bit, and takes the group out of the gradient norm.

    Raises:
        InvalidArgumentError: an unknown option or a value out of range, or an engine that
            does not step with ZeRO-1, ZeRO-2, BF16_Optimizer or without a wrapper.
        OverrideError: on all ranks, where the pattern selects nothing on any rank, or a part
            of a group on one of them. Nothing has been changed then.

    Example:
        >>> set_group_options(engine, "blocks.1.moe.expert.5", frozen=True)    # doctest: +SKIP
        >>> set_group_options(engine, "*.expert.*", lr_multiplier=0.1)         # doctest: +SKIP
    """
    _check_engine(engine, "set_group_options")
    _check_options(pattern, options)
    selected = select_groups(engine, [pattern])[0]
    write_options(engine, dict.fromkeys(selected, options))


class GroupSchedule:
    """Options that depend on the step; call :meth:`apply` before each forward.

    All ranks make one together. It says anew before each step what holds there, so that a run
    that was resumed has the options of its step.

    Args:
        engine: from ``deepspeed.initialize``.
        schedules: pairs of a pattern, as in :func:`set_group_options`, and a function that makes
            options of the number of optimizer steps done so far, the same on all ranks; an
            option that it gives once it gives at every step. Where two select the same group,
            the later one wins.

    Raises:
        InvalidArgumentError: as :func:`set_group_options`; :meth:`apply` too.
        OverrideError: as :func:`set_group_options`.

    Example:
        >>> schedule = GroupSchedule(engine, [                                 # doctest: +SKIP
        ...     ("*.expert.*", lambda step: {"frozen": step >= 1000}),
        ...     ("*.gate.*", lambda step: {"lr_multiplier": min(1.0, step / 100)}),
        ... ])
        >>> schedule.apply()  # in the training loop, first of all             # doctest: +SKIP
    """

    def __init__(self, engine: Any, schedules: Sequence[tuple[str, Schedule]]) -> None:
        _check_engine(engine, "GroupSchedule")
        self.engine, self.schedules = engine, list(schedules)
        self._selected = select_groups(engine, [pattern for pattern, _ in self.schedules])

    def apply(self) -> None:
        """Set the options of the next step; no communication."""
        wanted: dict[int, dict[str, float | bool | None]] = {}
        for (pattern, schedule), selected in zip(self.schedules, self._selected, strict=True):
            options = schedule(self.engine.global_steps)
            _check_options(pattern, options)
            for index in selected:
                wanted.setdefault(index, {}).update(options)
        write_options(self.engine, wanted)


def _check_engine(engine: Any, what: str) -> None:
    check_steps_partitions(engine, what)
    support_our_groups(moe=True)  # load_checkpoint takes the options up


def _check_options(pattern: str, options: Mapping[str, object]) -> None:
    for key, value in options.items():
        if key not in _KINDS:
            raise InvalidArgumentError(
                f"{pattern!r}: there is no option {key!r}; use {', '.join(_KINDS)}."
            )
        if value is None:
            continue
        boolean = key == "frozen"
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool) != boolean:
            wanted = "True, False or None" if boolean else "a number or None"
            raise InvalidArgumentError(f"{pattern!r}: {key}={value!r} must be {wanted}.")
        assert isinstance(value, int | float)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgumentError(
                f"{pattern!r}: {key}={value!r} must be finite and at least 0."
            )
