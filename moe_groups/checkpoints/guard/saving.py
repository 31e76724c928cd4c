"""Marks by which a finished save of all ranks differs from one that was stopped.

DeepSpeed writes every rank's files in place, and ``latest`` while other ranks may still be
writing. So a marker is there from before the first file is replaced until all are written;
and ``latest`` names a checkpoint when nothing of it is missing.
"""

import contextlib
import os
from pathlib import Path

from moe_groups._common.own_folder import finished_file
from moe_groups.checkpoints.files import LATEST
from moe_groups.checkpoints.manifest import FILE_NAME, UNFINISHED
from moe_groups.errors import CheckpointError


def mark_unfinished(folder: Path) -> None:
    """From now on, files in the folder may be of two saves, or cut off.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # at no moment there is neither of them
            os.replace(folder / FILE_NAME, folder / UNFINISHED)
        marker = folder / UNFINISHED
        if marker.is_symlink():  # leads to a file of somebody else
            marker.unlink()
        open(marker, "wb").close()  # room for the next manifest
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}. Nothing was saved, and no old file "
            "was changed."
        ) from error


def mark_finished(folder: Path) -> None:
    """All files are written.

    Raises:
        CheckpointError: the mark of the unfinished save cannot be removed.
    """
    marker = folder / UNFINISHED
    try:
        marker.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} was saved, but {marker.name}, the mark of an unfinished save, cannot be "
            f"removed from it ({error.strerror}): remove it."
        ) from error


def announce(save_dir: Path, tag: str) -> None:
    """Let ``latest`` name the checkpoint: at every moment it names the one before or this.

    Raises:
        CheckpointError: it cannot be written.
    """
    latest = save_dir / LATEST
    try:
        if latest.is_file() and latest.read_bytes() == tag.encode():
            return
        with finished_file(latest, save_dir) as part:
            part.write_text(tag)
    except OSError as error:
        raise CheckpointError(
            f"{save_dir / tag} was saved, but {latest} cannot be written ({error.strerror}): give "
            "the tag when you load, or make room and write it into that file."
        ) from error
