"""The boundary: arguments of public functions are checked against their annotations, in one place.

``@checked`` is on every public function, and on every public class for its constructor and
methods. A value that its annotation does not allow is refused before the function begins. A rule
that no type expresses is an :class:`Is` in the annotation, such as :data:`Positive`.
"""

import errno
import functools
import importlib
import inspect
import math
import os
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args, get_origin

from moe_groups.errors import InvalidArgumentError, MissingPackageError

_Public = TypeVar("_Public", bound=Callable[..., Any])


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


class Is(NamedTuple):
    """In ``Annotated``: what is checked in place of the type, and how an error calls it."""

    test: Callable[[Any], bool]
    expected: str


def _is_int(value: Any) -> bool:
    is_int = isinstance(value, Integral) and not isinstance(value, bool)
    return is_int and -(1 << 63) <= value < 1 << 63  # what torch and numpy can hold


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_cap(value: Any) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and bool(value >= 1)


def _is_path(value: Any) -> bool:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        return False
    try:
        os.stat(value)
    except ValueError:  # a null byte, or characters that no file name has
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


_MOST = 1 << 20

Positive: TypeAlias = Annotated[
    int, Is(lambda v: _is_int(v) and v >= 1, "an integer of at least 1")
]
Count: TypeAlias = Annotated[
    int,
    Is(lambda v: _is_int(v) and 1 <= v <= _MOST, f"an integer from 1 to {_MOST:,}"),
]
NotNegative: TypeAlias = Annotated[
    float, Is(lambda v: _is_finite(v) and v >= 0, "a finite number of at least 0")
]
Cap: TypeAlias = Annotated[int | float, Is(_is_cap, "a number of at least 1")]
Bytes: TypeAlias = int | float | str
"""A number of bytes, or text such as "2GiB" (:func:`moe_groups._common.text.parse_bytes`)."""
FilePath: TypeAlias = Annotated[str | Path, Is(_is_path, "a path that the system allows")]

SplitBy: TypeAlias = Literal["parallel_group", "module", "expert"]
LEVELS: tuple[SplitBy, ...] = get_args(SplitBy)
TILE = "64MiB"
"""What a tile of ``lean_step`` takes by default."""
OptimizerKind: TypeAlias = Literal["for-loop", "foreach", "fused", "FusedAdam", "CPUAdam"]


def checked(public: _Public) -> _Public:
    """Decorator: refuse arguments that the annotations of a function, or of a class, do not allow.

    Raises:
        InvalidArgumentError: names the argument, what was given and what is expected.
    """
    if isinstance(public, type):
        for name, member in list(vars(public).items()):
            own = member.__func__ if isinstance(member, classmethod) else member
            if inspect.isfunction(own) and (name in ("__init__", "__call__") or name[0] != "_"):
                whole = checked(own)
                setattr(public, name, classmethod(whole) if own is not member else whole)
        return public
    parameters = inspect.signature(public).parameters
    of_kind = {one.kind: name for name, one in parameters.items()}
    options = of_kind.get(inspect.Parameter.VAR_KEYWORD, "")
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    by_position = [name for name, one in parameters.items() if one.kind in kinds]

    @functools.cache
    def hints() -> tuple[dict[str, Any], dict[str, type]]:
        """All, and those for which ``isinstance`` is the whole test, which is quick."""
        known = typing.get_type_hints(public, include_extras=True)
        return known, {name: hint for name, hint in known.items() if _is_class(hint)}

    @functools.wraps(public)
    def function(*args: Any, **kwargs: Any) -> Any:
        known, classes = hints()
        for name, value in zip(by_position, args, strict=False):
            if not isinstance(value, classes.get(name, ())):
                check(name, value, known.get(name, Any))
        for name, value in kwargs.items():
            check(name, value, known.get(name if name in parameters else options, Any))
        return public(*args, **kwargs)

    return typing.cast(_Public, function)


def check(name: str, value: object, hint: Any) -> None:
    """Refuse a value that is not what a type hint says.

    What can only be iterated over is not looked into, because that could use it up.

    Args:
        name: of the argument, or of what returned the value.

    Raises:
        InvalidArgumentError: names the argument, or the item of it, that is wrong.
    """
    problem = _problem(name, value, hint)
    if problem is not None:
        where, wrong, expected = problem
        raise InvalidArgumentError(f"{where}={shown(wrong)} must be {expected}.")


def check_one_of(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        InvalidArgumentError: the message lists the known values.
    """
    if value not in known:
        raise InvalidArgumentError(
            f"{name}={value!r} is unknown: use one of {', '.join(map(repr, known))}."
        )


_PLAIN = (str, bytes, int, float, complex, list, tuple, dict, set, Path, type(None))


class _Short(reprlib.Repr):
    def repr_instance(self, x: Any, level: int) -> str:
        return super().repr_instance(x, level) if isinstance(x, _PLAIN) else f"<{type(x).__name__}>"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value in an error: shortened, and as its class where its ``repr`` could be long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits
        return f"<{type(value).__name__}>"


_NAMES = {
    "bool": "True or False",
    "float": "a finite number",
    "int": "an integer of 64 bits",
    "str": "a string",
    "NoneType": "None",
    "Module": "a torch module",
    "Tensor": "a tensor",
    "device": "a torch.device",
    "dtype": "a torch.dtype",
}
_TESTS: dict[Any, Callable[[Any], bool]] = {
    int: _is_int,
    float: _is_finite,
    Path: lambda value: isinstance(value, os.PathLike),
}
_Problem: TypeAlias = tuple[str, object, str]
"""The argument or an item of it, its value, and what was expected."""


def _problem(name: str, value: Any, hint: Any) -> _Problem | None:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return None if inner[1].test(value) else (name, value, inner[1].expected)
    if origin in (typing.Union, types.UnionType):
        return _none_fits(name, value, inner)
    if origin is Literal:
        fits = any(type(value) is type(one) and value == one for one in inner)
        return None if fits else (name, value, _either([*map(repr, inner)]))
    if origin is Callable:
        return None if callable(value) else (name, value, "a function")
    if origin in (Sequence, list, tuple, Mapping, dict):
        return _wrong_item(name, value, origin, inner)
    if not isinstance(hint, type) or origin is not None or hint is Any:
        return None  # Any, or what is iterated over
    if not _TESTS.get(hint, lambda value: isinstance(value, hint))(value):
        known = f"a{'n' * (hint.__name__[0] in 'AEIOU')} {hint.__name__}"
        return name, value, _NAMES.get(hint.__name__, known)
    if hasattr(hint, "_fields"):  # a NamedTuple
        fields = typing.get_type_hints(hint, include_extras=True).items()
        found = (_problem(f"{name}.{key}", getattr(value, key), kind) for key, kind in fields)
        return next(filter(None, found), None)
    return None


def _is_class(hint: Any) -> bool:
    """Does any instance of it fit? See :func:`_problem`."""
    if not isinstance(hint, type) or get_origin(hint) is not None or hint is Any:
        return False
    return hint not in _TESTS and not hasattr(hint, "_fields")


def _none_fits(name: str, value: Any, hints: tuple[Any, ...]) -> _Problem | None:
    """Nothing if one of the types fits; else what is wrong in the one that comes nearest."""
    found = [_problem(name, value, hint) for hint in hints]
    wrong = [problem for problem in found if problem is not None]
    if len(wrong) < len(found):
        return None
    items = [problem for problem in wrong if problem[0] != name]
    return items[0] if items else (name, value, _either([problem[2] for problem in wrong]))


def _wrong_item(name: str, value: Any, kind: Any, inner: tuple[Any, ...]) -> _Problem | None:
    pairs: list[tuple[str, Any, Any]] = []
    if kind in (Mapping, dict):
        if not isinstance(value, Mapping):
            return name, value, "a dict"
        for key, item in value.items():
            pairs += [
                (f"a key of {name}", key, inner[0]),
                (f"{name}[{shown(key)}]", item, inner[1]),
            ]
    elif kind is tuple and inner[-1] is not Ellipsis:
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            wanted = [_problem("", ..., hint) or ("", ..., "anything") for hint in inner]
            return name, value, f"{len(inner)} values: {', '.join(one[2] for one in wanted)}"
        pairs = [(f"{name}[{i}]", *pair) for i, pair in enumerate(zip(value, inner, strict=True))]
    elif isinstance(value, list | tuple) or (kind is Sequence and _is_sequence(value)):
        pairs = [(f"{name}[{index}]", item, inner[0]) for index, item in enumerate(value)]
    else:
        return name, value, "a list"
    return next(filter(None, (_problem(*pair) for pair in pairs)), None)


def _is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _either(names: list[str]) -> str:
    *others, last = " or ".join(names).split(" or ")
    return f"{', '.join(others)} or {last}" if others else last
