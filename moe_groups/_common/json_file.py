"""JSON files of the user, whatever is in them."""

import json
from pathlib import Path
from typing import Any

from moe_groups.errors import MoEGroupsError

_DEEPEST = 64


def read_json(path: Path, error: type[MoEGroupsError], way_out: str = "") -> dict[str, Any]:
    """The object in a file. NaN and infinite numbers are read: configs of some models have them.

    Args:
        path: the file.
        error: raised where it cannot be read.
        way_out: what to do then, for the message.

    Raises:
        MoEGroupsError: ``error``, where there is no such file, or it holds no object of JSON in
            UTF-8, or one that is nested so deeply that no file of this kind is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would block
        raise error(f"{path} is no file. {way_out}".rstrip())
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
        _check_depth(content)
    except OSError as problem:
        text = f"{path} cannot be read: {problem.strerror}. {way_out}"
        raise error(text.rstrip()) from problem
    except RecursionError:
        text = f"{path} is damaged: it is nested more than {_DEEPEST} levels deep. {way_out}"
        raise error(text.rstrip()) from None
    except ValueError as problem:
        text = f"{path} is damaged, it is not JSON: {problem}. {way_out}"
        raise error(text.rstrip()) from problem
    if not isinstance(content, dict):
        raise error(f"{path} is damaged, it holds no JSON object. {way_out}".rstrip())
    return content


def _check_depth(content: Any) -> None:
    """Refuse content that is nested too deeply for functions that recurse into it."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, dict | list)
            for item in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise RecursionError
