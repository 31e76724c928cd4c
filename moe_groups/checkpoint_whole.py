"""Is a checkpoint what was saved: saved to its end, and with all files since?"""

from moe_groups.checkpoint_files import CheckpointFiles
from moe_groups.errors import CheckpointError
from moe_groups.manifest import FILE_NAME, UNFINISHED, read_manifest

STATES = "_states.pt"
"""How names of DeepSpeed's files end."""


def check_saved(files: CheckpointFiles) -> None:
    """Was the save that began last finished? Files of an earlier one may be among the rest.

    Raises:
        CheckpointError: it was not.
    """
    marker = files.folder / UNFINISHED
    if marker.exists() and not files.manifest.is_file():  # which comes last
        raise CheckpointError(
            f"{files.folder} was not saved to its end: its files may be of different steps, or cut "
            f"off. Load another tag. If you know that it is whole, remove {marker.name} from it."
        )


def check_whole(files: CheckpointFiles) -> None:
    """Are all files there that the manifest lists, with their sizes?

    Raises:
        CheckpointError: names a file that is not, or the save was not finished.
    """
    check_saved(files)
    if not files.manifest.is_file():
        return
    for name, size in read_manifest(files.manifest).files.items():
        path = files.folder / name
        if not name.endswith(STATES):
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: {files.manifest.name} lists it.")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes, but had {size:,} when it was saved: it "
                f"is cut off, or of another save. Without {FILE_NAME}, sizes are not compared."
            )
