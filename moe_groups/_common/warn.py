"""Warnings that point at the line of the user, from any depth of calls."""

import sys
import warnings

_SKIPPED = {"moe_groups", "deepspeed", "contextlib"}


def warn(message: str, category: type[Warning]) -> None:
    """``warnings.warn`` for the nearest caller outside of this package and DeepSpeed."""
    level = 1
    while True:
        try:
            frame = sys._getframe(level)
        except ValueError:  # there are no further frames
            break
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in _SKIPPED:
            break
        level += 1
    warnings.warn(message, category, stacklevel=level + 1)
