"""Checks of arguments that several functions take."""

from collections.abc import Sequence

from moe_groups.errors import InvalidArgumentError


def check_one_of(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        InvalidArgumentError: with the values that there are.
    """
    if value not in known:
        raise InvalidArgumentError(
            f"{name}={value!r} is unknown: use one of {', '.join(map(repr, known))}."
        )
