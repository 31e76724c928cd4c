"""Values and checks of arguments that several functions share."""

import importlib
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from moe_groups.errors import InvalidArgumentError, MissingPackageError


def need(package: str, extra: str, what: str) -> None:
    """Raise MissingPackageError unless ``package`` can be imported.

    Args:
        extra: the smallest extra that has it.
        what: the plural subject of the sentence "... need rich".
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"{what} need {package}, which cannot be imported ({error}): "
            f"pip install 'moe-groups[{extra}]'.",
            name=package,
        ) from error


SplitBy: TypeAlias = Literal["parallel_group", "module", "expert"]
LEVELS: tuple[SplitBy, ...] = get_args(SplitBy)
OptimizerKind: TypeAlias = Literal["for-loop", "foreach", "fused", "FusedAdam", "CPUAdam"]


def check_one_of(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        InvalidArgumentError: the message lists the known values.
    """
    if value not in known:
        raise InvalidArgumentError(
            f"{name}={value!r} is unknown: use one of {', '.join(map(repr, known))}."
        )
