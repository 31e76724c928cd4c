"""Names that a user or a file gives never lead a job out of its own folder."""

import os
import shutil
from pathlib import Path

import pytest

from moe_groups.errors import CheckpointError
from moe_groups.flat_layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.inspect_checkpoint import inspect_checkpoint
from moe_groups.manifest import FILE_NAME, Manifest, write_manifest
from moe_groups.regroup import regroup_checkpoint
from tests.made_checkpoints import make_checkpoint, random_state, same, state_of

Tree = dict[str, tuple[str, bytes]]


def tree(root: Path, *without: str) -> Tree:
    """Everything below a folder: what it is, and its bytes or where a link leads."""
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in without]
            files = [name for name in files if name not in without]
        for name in (*folders, *files):
            path = Path(folder, name)
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = "link", os.fsencode(os.readlink(path))
            elif path.is_dir():
                found[key] = "folder", b""
            else:
                found[key] = ("file", path.read_bytes()) if path.is_file() else ("other", b"")
    return found


def layout(*sizes: int) -> Layout:
    """A group for each size, which two ranks share."""
    groups = [
        FlatGroup(f"dense.{i}", (0, 1), lay_out([FlatParam(f"p{i}", size, 0)]))
        for i, size in enumerate(sizes)
    ]
    return merge_ranks([(Rank(0, rank), groups) for rank in (0, 1)])


TWO = layout(9, 5)
ONE = merge_ranks(
    [
        (
            Rank(0, rank),
            [FlatGroup("all", (0, 1), lay_out([FlatParam("p0", 9, 0), FlatParam("p1", 5, 0)]))],
        )
        for rank in (0, 1)
    ]
)


def make_tree(root: Path) -> None:
    """A checkpoint of three tags beside files of somebody else."""
    state = random_state(TWO)
    for tag in ("a/b", "u", "t"):
        make_checkpoint(root / "ck", TWO, state, tag=tag)
        files = {p.name: p.stat().st_size for p in (root / "ck" / tag).iterdir()}
        write_manifest(Manifest(TWO, "ZeRO-2", {"step": 7}, files), root / "ck" / tag / FILE_NAME)
    shutil.copytree(root / "ck/t", root / "precious/t")
    (root / "precious/mine.bin").write_bytes(b"precious")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_tree(tmp_path)
    return tmp_path


TAGS = ["{root}/ck/t", "../precious/t", "../../{name}/ck/t", "t/../u", "./t", "", ".", "t//", "t\0"]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("origin", ["argument", "latest"])
def test_a_tag_that_leaves_the_checkpoint_is_refused(root: Path, origin: str, tag: str) -> None:
    tag = tag.format(root=root, name=root.name)
    given: str | None = tag
    if origin == "latest":
        (root / "ck/latest").write_text(tag)
        given = None
    before = tree(root)
    for call in (
        lambda: regroup_checkpoint(root / "ck", root / "out", ONE, tag=given),
        lambda: inspect_checkpoint(root / "ck", given),
    ):
        with pytest.raises(CheckpointError, match=r"tag|latest is empty"):
            call()
    assert tree(root) == before


def test_a_tag_of_several_folders_is_converted(root: Path) -> None:
    regroup_checkpoint(root / "ck", root / "out", ONE, tag="a/b")
    assert (root / "out/latest").read_text() == "a/b"
    assert same(state_of(root / "out", ONE), random_state(TWO))
    assert inspect_checkpoint(root / "out").problems == ()
    regroup_checkpoint(root / "ck/a/b", root / "own", ONE)
    assert (root / "own/latest").read_text() == "b"


def test_a_huge_gap_in_the_new_groups_is_refused_before_anything_is_written(root: Path) -> None:
    far = FlatGroup("all", (0, 1), (FlatParam("p0", 9, 0), FlatParam("p1", 5, 10**15)))
    to = merge_ranks([(Rank(0, rank), [far]) for rank in (0, 1)])
    write_manifest(Manifest(to, "ZeRO-2"), root / "to.json")
    before = tree(root)
    with pytest.raises(CheckpointError, match="bytes, but only"):
        regroup_checkpoint(root / "ck", root / "out", root / "to.json")
    assert tree(root) == before


def stopped(root: Path) -> Path:
    """The folder of a conversion that was stopped when it had written something."""

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regroup_checkpoint(root / "ck", root / "out", ONE, workers=1, progress=stop)
    return root / "out.incomplete"


@pytest.mark.parametrize(
    "name",
    [".lock", ".job.json", "checkpoint", "checkpoint/t", "checkpoint/more", "checkpoint/t/more"],
)
@pytest.mark.parametrize("to", ["precious/t", "precious/mine.bin", "ck/t", "nowhere"])
def test_a_link_in_unfinished_work_is_not_followed(root: Path, name: str, to: str) -> None:
    place = stopped(root) / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(root / to)
    before = tree(root, "out", "out.incomplete")
    try:
        regroup_checkpoint(root / "ck", root / "out", ONE)
    except CheckpointError:
        assert not (root / "out").exists()
    else:
        assert same(state_of(root / "out", ONE), random_state(TWO))
        assert not any(kind == "link" for kind, _ in tree(root / "out").values())
    assert tree(root, "out", "out.incomplete") == before
