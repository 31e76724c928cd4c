"""Write and remove files only below a given folder, under plain names."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from moe_groups.errors import CheckpointError

PART = ".part-"
"""Follows the name of a file while it is written; some digits come after it."""


def is_plain(name: str) -> bool:
    """Does a name from a user or a file lead to a path below a folder?

    It has one or more components, separated by slashes; none of them is empty, "." or "..".
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return "\0" not in name and not {"", ".", ".."} & {*name.split("/")}


def own(folder: Path, path: Path) -> Path:
    """``path``, if it is below ``folder`` and no directory on the way is a link.

    All code that writes or removes a file calls this first, wherever its name comes from.

    Raises:
        CheckpointError: the path leads out of the folder.
    """
    below = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    way = [folder.joinpath(*below[:count]) for count in range(1, len(below))]
    if not below or ".." in below or any(step.is_symlink() for step in way):
        raise CheckpointError(
            f"{path} leads out of {folder}, and nothing is written or removed elsewhere: remove "
            "the link, or choose another name."
        )
    return path


@contextlib.contextmanager
def finished_file(path: Path, folder: Path) -> Iterator[Path]:
    """Yield a path to write to; after success the file is synced and gets its own name.

    The path is unique, so several processes may write the same file. A link under the file's
    name is replaced, not followed.

    Args:
        path: the file.
        folder: the folder below which the file has to be.

    Raises:
        CheckpointError: the file is not in the folder.
    """
    own(folder, path)
    # torch names an archive like the file up to the last dot, so it has the same name each time
    part = path.with_name(f"{path.name}{PART}{secrets.token_hex(4)}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk may have failed
            part.unlink(missing_ok=True)
        raise


def remove_others(folder: Path, wanted: set[Path]) -> None:
    """Remove everything from a folder but the wanted files and the directories on the way to them.

    Links are removed, not followed.

    Raises:
        OSError: a file or directory cannot be removed.
    """
    on_the_way = {parent for path in wanted for parent in path.parents}
    for path in sorted(folder.rglob("*"), reverse=True):  # files before their directory
        own(folder, path)
        if path.is_dir() and not path.is_symlink():
            if path not in on_the_way:
                path.rmdir()
        elif path not in wanted or path.is_symlink() or not path.is_file():
            path.unlink()
