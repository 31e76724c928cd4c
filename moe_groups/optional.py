"""Packages that an installation may do without."""

import importlib

from moe_groups.errors import InvalidArgumentError


def need(package: str, extra: str, what: str) -> None:
    """Raise InvalidArgumentError unless ``package`` of the optional ``extra`` is there.

    Args:
        what: a plural that the sentence "... need rich" starts with.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InvalidArgumentError(
            f"{what} need {package}, which cannot be imported: pip install 'moe-groups[{extra}]'."
        ) from error
