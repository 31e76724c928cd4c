"""JSON files of the user: whatever is in one, the error names it and says what is wrong."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_groups._common.json_file import read_json
from moe_groups.checkpoints.manifest import FILE_NAME, read_manifest
from moe_groups.errors import CheckpointError, InvalidArgumentError, MoEGroupsError
from moe_groups.meta_models.source import load_model
from moe_groups.weights.safetensors_files import INDEX, SafetensorsFiles

DEEP = b"[" * 200_000
BAD = {
    "empty": b"",
    "brackets": DEEP,
    "closed brackets": DEEP + b"]" * 200_000,
    "objects": b'{"a":' * 200_000,
    "deep": b'{"weight_map":' + b"[" * 80 + b"]" * 80 + b"}",
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[1]",
    "a number": b"NaN",
    "two values": b"{} {}",
}

READERS: dict[str, tuple[str, type[MoEGroupsError], Callable[[Path], Any]]] = {
    "manifest": (FILE_NAME, CheckpointError, read_manifest),
    "index": (INDEX, CheckpointError, lambda path: SafetensorsFiles(path.parent)),
    "config": ("config.json", InvalidArgumentError, lambda path: load_model(str(path))),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("content", BAD)
def test_bad_files_are_named(reader: str, content: str, tmp_path: Path) -> None:
    name, kind, read = READERS[reader]
    (tmp_path / name).write_bytes(BAD[content])
    with pytest.raises(kind, match=name) as caught:
        read(tmp_path / name)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_good_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in ({}, {"a": [float("inf"), -(10**30), "ä", None, True]}):
        path.write_text(json.dumps(value), encoding="utf-8-sig")
        assert read_json(path, CheckpointError) == value
    os.mkfifo(tmp_path / "pipe.json")
    for missing, text in ((tmp_path / "pipe.json", "is no file"), (tmp_path / "b", "No such file")):
        with pytest.raises(CheckpointError, match=f"{text}.*Try again"):
            read_json(missing, CheckpointError, "Try again.")
