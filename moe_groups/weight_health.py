"""Are the files sound that hold the model's weights and the engine's counters?"""

from collections.abc import Callable
from pathlib import Path

from moe_groups.checkpoint_files import CheckpointFiles
from moe_groups.checkpoint_report import Problem, unreadable
from moe_groups.checkpoint_scan import (
    FLOATS,
    PICKLE,
    Scan,
    Segment,
    changed_text,
    scan_file,
    sound_pickle,
)
from moe_groups.saved_weights import EngineState, parameters_in, read_engine_state
from moe_groups.torch_file import Record, read_records


def examine_engines(
    files: CheckpointFiles,
) -> tuple[dict[int, EngineState], list[Problem]]:
    """The engine's counters by model-parallel rank, and what is wrong with their files."""
    engines, problems = {}, []
    for model, path in files.models.items():
        try:
            pickle = [record for record in read_records(path) if record.name == PICKLE]
            if sound_pickle(path, pickle):
                engines[model] = read_engine_state(path)
            else:
                problems.append(Problem("checksum", path.name, changed_text(path.name, pickle[0])))
        except Exception as error:
            problems.append(unreadable(path, path.name, error))
    return engines, problems


def examine_file(
    path: Path, name: str, data: bool, progress: Callable[[int], None]
) -> tuple[list[Problem], int]:
    """Problems of a file of weights, and its number of records without a CRC."""
    try:
        records = read_records(path)
        scan = _scan_weights(path, records, progress) if data else Scan()
    except Exception as error:
        return [unreadable(path, name, error)], 0
    problems = [Problem("checksum", name, changed_text(name, record)) for record in scan.changed]
    problems += [
        Problem("not finite", name, f"{name}: {count:,} values of {param} are NaN or infinite.")
        for (_, param, _), count in scan.broken.items()
    ]
    return problems, scan.unstated


def _scan_weights(path: Path, records: list[Record], progress: Callable[[int], None]) -> Scan:
    found = parameters_in(path) if sound_pickle(path, records) else {}
    segments = [
        Segment(extent.start, extent.size, extent.dtype, (0, name, "weights"))
        for name, extent in found.items()
        if extent.dtype in FLOATS and extent.size
    ]
    return scan_file(path, records, segments, progress)
