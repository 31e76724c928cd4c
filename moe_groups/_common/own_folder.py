"""What may be written and removed: files below a folder of one's own, under plain names."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from moe_groups.errors import CheckpointError

PART = ".part-"
"""Is behind the name of a file while it is written, and before some digits."""


def is_plain(name: str) -> bool:
    """Does a name that a user or a file gives lead to what is below a folder?

    It is one component or several with slashes between them, none of which is empty, "." or "..".
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return "\0" not in name and not {"", ".", ".."} & {*name.split("/")}


def own(folder: Path, path: Path) -> Path:
    """``path``, if it is below ``folder`` and no link on the way there leads elsewhere.

    Whoever writes or removes a file asks here first, wherever its name comes from.

    Raises:
        CheckpointError: it is not.
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
    """A path to write to; when that ends well, the file appears under its own name, on the disk.

    The path is nobody else's, so several processes may write the same file. A link under the
    file's name is replaced, not followed.

    Args:
        path: of the file.
        folder: of one's own, which the file is in.

    Raises:
        CheckpointError: the file is not in the folder.
    """
    own(folder, path)
    # torch calls an archive what the file is called up to the last dot: the same each time
    part = path.with_name(f"{path.name}{PART}{secrets.token_hex(4)}")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk may be what failed
            part.unlink(missing_ok=True)
        raise


def remove_others(folder: Path, wanted: set[Path]) -> None:
    """Remove from a folder of one's own what is neither a wanted file nor on the way to one.

    Links are removed, not followed.

    Raises:
        OSError: something cannot be removed.
    """
    on_the_way = {parent for path in wanted for parent in path.parents}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a directory before it
        own(folder, path)
        if path.is_dir() and not path.is_symlink():
            if path not in on_the_way:
                path.rmdir()
        elif path not in wanted or path.is_symlink() or not path.is_file():
            path.unlink()
