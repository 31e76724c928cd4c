"""No offline reader runs code of a checkpoint, whichever of its files holds it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_groups import cli
from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.checkpoints.files import find_checkpoint, list_saved
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.checkpoints.manifest import FILE_NAME, Manifest, write_manifest
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.errors import CheckpointError
from tests.support.checkpoints.checkpoint_damage import save_again
from tests.support.checkpoints.made_checkpoints import make_checkpoint, random_state

TAG = "global_step7"
RAN: list[str] = []


def foreign_code() -> dict[str, int]:
    RAN.append("code")
    return {"ran": 1}


class Foreign:
    def __reduce__(self) -> Any:
        return foreign_code, ()


def two_groups(joined: bool) -> Layout:
    a, b = FlatParam("a", 9, 0), FlatParam("b", 5, 0)
    sets = [lay_out([a, b])] if joined else [(a,), (b,)]
    groups = [FlatGroup(f"dense.{i}", (0, 1), params) for i, params in enumerate(sets)]
    return merge_ranks([(Rank(0, rank), groups) for rank in (0, 1)])


FILES = {
    "shard": "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "model": "mp_rank_00_model_states.pt",
    "expert": "layer_0_expert_0_mp_rank_00_model_states.pt",
}


def make(root: Path, file: str, manifest: bool) -> Path:
    """A checkpoint with somebody's code in one of its files."""
    layout = two_groups(joined=False)
    make_checkpoint(root / "ck", layout, random_state(layout))
    folder = root / "ck" / TAG
    save_again(folder / FILES[file], lambda content: content.update(client=[Foreign()]))
    if manifest:
        made = Manifest(layout, "ZeRO-2", {"step": 7}, list_saved(folder))
        write_manifest(made, folder / FILE_NAME)
    RAN.clear()
    return root / "ck"


def look(directory: Path, **options: Any) -> str:
    return "\n".join(problem.text for problem in inspect_checkpoint(directory, **options).problems)


def convert(directory: Path, **options: Any) -> None:
    regroup_checkpoint(directory, directory.parent / "out", two_groups(joined=True), **options)


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("file", FILES)
def test_code_in_a_file_is_named_and_not_run(file: str, manifest: bool, tmp_path: Path) -> None:
    directory = make(tmp_path, file, manifest)
    name = re.escape(FILES[file])
    wanted = rf"{name} was not read: .*test_untrusted\.foreign_code.*trust=True"
    found = look(directory)
    assert re.search(wanted, found)
    assert found.count("foreign_code") == 1
    if file != "expert":  # of which a quick look reads no content
        assert re.search(wanted, look(directory, data=False))
    with pytest.raises(CheckpointError, match=wanted):
        convert(directory)
    assert not (tmp_path / "out").exists()
    if not manifest and file != "expert":
        with pytest.raises(CheckpointError, match=wanted):
            read_layout(find_checkpoint(directory))
    assert cli.main(["inspect-checkpoint", str(directory), "--json"]) == 1
    assert not RAN
    assert not look(directory, trust=True)
    convert(directory, trust=True)
    assert RAN


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    """Not even where its author is trusted: it is not the file that was saved."""
    readers: list[Callable[[Path], Any]] = [look, lambda d: look(d, data=False, trust=True)]
    for number, file in enumerate(FILES):
        directory = make(tmp_path / str(number), file, manifest=True)
        with open(directory / TAG / FILES[file], "ab") as end:
            end.write(b"x")
        for read in readers:
            text = read(directory)
            assert re.fullmatch(rf"{FILES[file]} has \S+ bytes; when it was saved it .*", text)
        with pytest.raises(CheckpointError, match=rf"{FILES[file]} has .* bytes, but had"):
            convert(directory, trust=True)
    assert not RAN
