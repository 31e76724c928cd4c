"""Which MoE layer of a model is which one in a checkpoint."""

import re
from collections.abc import Iterable, Mapping

from moe_groups.errors import InvalidArgumentError


def match_layers(
    paths: list[str], prefixes: Iterable[str], given: Mapping[str, str] | None
) -> dict[str, str]:
    """Path of each layer in the model to its prefix in the checkpoint, where it has one.

    Without ``given``: the same path, or the only layer with the same number in its path.

    Raises:
        InvalidArgumentError: a key or a prefix of ``given`` is of no layer.
    """
    stored = list(prefixes)
    if given is not None:
        found = expand(paths, given)
        for path, prefix in found.items():
            if prefix not in stored:
                raise InvalidArgumentError(
                    f"layers says that {path!r} is {prefix!r} in the checkpoint, but its MoE "
                    f"layers are {stored}."
                )
        return found
    of_number, here = _by_number(stored), _by_number(paths)
    found = {path: path for path in paths if path in stored}
    for number, same in here.items():
        others = of_number.get(number, [])
        if len(same) == len(others) == 1 and same[0] not in found:
            found[same[0]] = others[0]
    return found


def expand(paths: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """The layers that ``given`` names, each with its own prefix; ``{}`` is a number in both.

    Raises:
        InvalidArgumentError: a key is of no layer, or two layers get one prefix.
    """
    found: dict[str, str] = {}
    for key, value in given.items():
        pattern = re.compile(re.escape(key).replace(r"\{\}", r"(\d+)"))
        matches = [match for match in map(pattern.fullmatch, paths) if match]
        if not matches:
            raise InvalidArgumentError(f"layers names {key!r}, but the MoE layers are {paths}.")
        if value.count("{}") > key.count("{}"):
            raise InvalidArgumentError(f"layers: {value!r} has more numbers than {key!r}.")
        for match in matches:
            numbers = iter(match.groups())
            found[match[0]] = re.sub(r"\{\}", lambda _: next(numbers), value)  # noqa: B023
    if twice := [path for path, prefix in found.items() if [*found.values()].count(prefix) > 1]:
        raise InvalidArgumentError(f"layers gives {twice} the same name {found[twice[0]]!r}.")
    return found


def layer_number(path: str) -> str | None:
    """The one number in a path; None where there is none, or more than one."""
    numbers = [part for part in path.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None


def _by_number(paths: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        number = layer_number(path)
        if number is not None:
            found.setdefault(number, []).append(path)
    return found
