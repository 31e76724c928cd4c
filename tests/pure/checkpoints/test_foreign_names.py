"""Names that a user or a file gives never lead a job out of its own folder.

Whatever they are, every byte outside of the destination and of its ``.incomplete`` folder stays
as it was.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

from moe_groups.checkpoints.convert.convert import regroup_checkpoint
from moe_groups.checkpoints.files import list_saved
from moe_groups.checkpoints.guard.saving import announce, mark_unfinished
from moe_groups.checkpoints.inspect.inspect import inspect_checkpoint
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.checkpoints.manifest import (
    FILE_NAME,
    UNFINISHED,
    Manifest,
    SavedFile,
    write_manifest,
)
from moe_groups.cli import main
from moe_groups.errors import CheckpointError, MoEGroupsError
from moe_groups.weights.safetensors_files import INDEX, SINGLE, SafetensorsFiles
from tests.support.checkpoints.made_checkpoints import make_checkpoint, random_state, same, state_of

Tree = dict[str, tuple[str, bytes]]
WORK = ("out", "out.incomplete")


def tree(root: Path, without: tuple[str, ...] = WORK) -> Tree:
    """Everything below a folder: what it is, and its bytes or where a link leads."""
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            key = str(path.relative_to(root))
            if key in without:
                folders[:] = [other for other in folders if other != name]
            elif path.is_symlink():
                found[key] = "link", os.fsencode(os.readlink(path))
            elif path.is_file():
                found[key] = "file", path.read_bytes()
            else:
                found[key] = "folder" if path.is_dir() else "other", b""
    return found


P0, P1 = FlatParam("p0", 9, 0), FlatParam("p1", 5, 0)


def on_two_ranks(*groups: tuple[FlatParam, ...]) -> Layout:
    """Groups of these parameters, which two ranks share."""
    made = [FlatGroup(f"dense.{i}", (0, 1), params) for i, params in enumerate(groups)]
    return merge_ranks([(Rank(0, rank), made) for rank in (0, 1)])


TWO, ONE = on_two_ranks((P0,), (P1,)), on_two_ranks(lay_out([P0, P1]))


def list_files(folder: Path, *more: str) -> None:
    """Write the manifest of a checkpoint, with more names in it than there are files."""
    saved = list_saved(folder) | dict.fromkeys(more, SavedFile(1))
    made = Manifest(TWO, "ZeRO-2", {"step": 7}, saved)
    write_manifest(made, folder / FILE_NAME)


def make_tree(root: Path) -> None:
    """A checkpoint of three tags beside files of somebody else."""
    for tag in ("a/b", "u", "t"):
        make_checkpoint(root / "ck", TWO, random_state(TWO), tag=tag)
        list_files(root / "ck" / tag)
    shutil.copytree(root / "ck/t", root / "precious/t")
    (root / "precious/mine.bin").write_bytes(b"precious")
    write_manifest(Manifest(ONE, "ZeRO-2"), root / "to.json")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_tree(tmp_path)
    return tmp_path


def convert(root: Path, **more: Any) -> None:
    regroup_checkpoint(root / "ck", root / "out", ONE, **more)


def is_right(root: Path) -> bool:
    """Is the result what was in the tag, without links?"""
    kinds = {kind for kind, _ in tree(root / "out", ()).values()}
    return kinds == {"file", "folder"} and same(state_of(root / "out", ONE), random_state(TWO))


# ---- tags -----------------------------------------------------------------------------

TAGS = ["{root}/ck/t", "../precious/t", "../{name}/ck/t", "t/../u", "./t", ".", "t//", "t\0"]


@pytest.mark.parametrize("tag", [*TAGS, "\udc80"])
def test_a_tag_that_leads_elsewhere_is_refused(root: Path, tag: str) -> None:
    """As an argument, and as what ``latest`` says."""
    tag = tag.format(root=root, name=root.name)
    before = tree(root)
    for call in (lambda: convert(root, tag=tag), lambda: inspect_checkpoint(root / "ck", tag)):
        with pytest.raises(CheckpointError, match="is not the name of a folder in"):
            call()
    assert tree(root, ()) == before
    (root / "ck/latest").write_bytes(os.fsencode(tag))
    before = tree(root)
    for call in (lambda: convert(root), lambda: inspect_checkpoint(root / "ck")):
        with pytest.raises(CheckpointError, match="latest"):
            call()
    assert tree(root, ()) == before
    (problem,) = inspect_checkpoint(root / "ck", "t").problems
    assert problem.kind == "latest"


def test_an_empty_tag_is_refused(root: Path) -> None:
    for call in (lambda: convert(root, tag=""), lambda: inspect_checkpoint(root / "ck", "")):
        with pytest.raises(CheckpointError, match="is not the name of a folder in"):
            call()


def test_a_tag_of_several_folders_is_converted(root: Path) -> None:
    convert(root, tag="a/b")
    assert (root / "out/latest").read_text() == "a/b"
    assert is_right(root)
    assert inspect_checkpoint(root / "out").problems == ()
    regroup_checkpoint(root / "ck/a/b", root / "own", ONE)
    assert (root / "own/latest").read_text() == "b"


def test_a_tag_may_be_called_like_the_file_that_names_tags(root: Path) -> None:
    (root / "ck/latest").unlink()
    (root / "ck/t").rename(root / "ck/latest")
    convert(root, tag="latest")
    assert inspect_checkpoint(root / "out", "latest").problems == ()


def test_links_in_the_source_are_read(root: Path) -> None:
    (root / "ck/t").rename(root / "elsewhere")
    (root / "ck/t").symlink_to(root / "elsewhere")
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (root / "elsewhere" / name).rename(root / name)
    (root / "elsewhere" / name).symlink_to(root / name)
    before = tree(root)
    convert(root)
    assert is_right(root)
    assert tree(root) == before
    with pytest.raises(CheckpointError, match="inside of the source"):
        regroup_checkpoint(root / "ck", root / "elsewhere/out", ONE)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_counts_as_missing(root: Path, make: Callable[[Path], None]) -> None:
    """Nobody waits for what may come out of a pipe."""
    path = root / "ck/t/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.unlink()
    make(path)
    with pytest.raises(CheckpointError, match="is missing"):
        convert(root)
    (problem,) = inspect_checkpoint(root / "ck").problems
    assert (problem.kind, problem.file) == ("missing", path.name)


def test_two_files_of_one_rank_become_one(root: Path) -> None:
    """The copy of one has the name that the converted other gets."""
    for path in sorted((root / "ck/t").glob("*optim*")):
        shutil.copy(path, path.with_name(path.name.replace("mp_rank_00", "mp_rank_0")))
        path.write_bytes(b"an older one")
    (root / "ck/t" / FILE_NAME).unlink()
    before = tree(root)
    convert(root)
    assert is_right(root)
    assert tree(root) == before


# ---- names in files -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/x_states.pt", "../u/x_states.pt", "t/../x", "", "x\0"])
def test_a_manifest_lists_files_of_its_folder(root: Path, name: str) -> None:
    list_files(root / "ck/t", name)
    with pytest.raises(CheckpointError, match=f"{FILE_NAME} is damaged.*is no file of the check"):
        convert(root)
    assert "manifest" in {problem.kind for problem in inspect_checkpoint(root / "ck").problems}


@pytest.mark.parametrize("file", ["{root}/a", "../a", "..", ".", "", "b/../a", "b/a", "a\0", 1])
def test_an_index_names_files_of_its_folder(tmp_path: Path, file: str | int) -> None:
    named = file.format(root=tmp_path) if isinstance(file, str) else file
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": named}}))
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged"):
        SafetensorsFiles(tmp_path)


def test_weights_are_not_read_from_a_pipe(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": SINGLE}}))
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=f"{SINGLE} is missing"):
        SafetensorsFiles(tmp_path)


def test_a_huge_gap_in_the_new_groups_is_refused_before_anything_is_written(root: Path) -> None:
    """The room that is checked for is that of the new groups."""
    far = on_two_ranks((P0, P1._replace(offset=10**15)))
    write_manifest(Manifest(far, "ZeRO-2"), root / "to.json")
    before = tree(root)
    with pytest.raises(CheckpointError, match=r"needs [\d,]{19,} bytes, but only"):
        regroup_checkpoint(root / "ck", root / "out", root / "to.json")
    assert tree(root, ()) == before


@pytest.mark.parametrize(
    "to",
    [
        on_two_ranks((P0, P1)),  # in one place
        on_two_ranks((P0._replace(offset=-1), P1._replace(offset=9))),
        on_two_ranks((P0, P1._replace(offset=9, numel=-5))),
        Layout(ONE.groups, {Rank(0, 1): (0,)}),  # a rank is missing
        Layout(ONE.groups, {Rank(0, rank): (0,) for rank in range(3)}),
        *(
            Layout((FlatGroup("g", ranks, ONE.groups[0].params),), ONE.order)
            for ranks in ((), (0, 0, 1), (-1, 0, 1))
        ),
    ],
)
def test_groups_that_no_run_has_are_refused(root: Path, to: Layout) -> None:
    before = tree(root)
    with pytest.raises(CheckpointError, match="no run has such groups"):
        regroup_checkpoint(root / "ck", root / "out", to)
    assert tree(root, ()) == before


# ---- destinations ---------------------------------------------------------------------


def stop(root: Path) -> Path:
    """Stop a conversion when it has written something; the folder of its work."""

    def raises(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(root, workers=1, progress=raises)
    return root / "out.incomplete"


WHERE = [".lock", ".job.json", "checkpoint", "checkpoint/t", "checkpoint/more", "checkpoint/t/more"]


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("to", ["precious/t", "precious/mine.bin", "nowhere"])
def test_a_link_in_unfinished_work_is_not_followed(root: Path, name: str, to: str) -> None:
    place = stop(root) / name
    remove(place)
    place.symlink_to(root / to)
    before = tree(root)
    if name in (".lock", ".job.json"):  # nobody tells any more whose work that is
        with pytest.raises(CheckpointError, match=r"out\.incomplete"):
            convert(root)
    else:
        convert(root)
        assert is_right(root)
    assert tree(root) == before


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("to", ["precious", "nowhere"])
def test_a_link_in_place_of_the_destination_is_refused(root: Path, to: str) -> None:
    for name in WORK:
        (root / name).symlink_to(root / to)
        before = tree(root, ())
        with pytest.raises(CheckpointError, match="choose another destination"):
            convert(root)
        assert tree(root, ()) == before
        (root / name).unlink()


def test_a_folder_that_is_of_no_conversion_is_left_alone(root: Path) -> None:
    """It may be called like that of a conversion, and what is in it too."""
    (root / "out.incomplete/checkpoint").mkdir(parents=True)
    (root / "out.incomplete/checkpoint/mine.bin").write_bytes(b"precious")
    before = tree(root, ())
    with pytest.raises(CheckpointError, match="holds checkpoint, which no conversion made"):
        convert(root)
    assert tree(root, ()) == before


def test_a_source_in_the_folder_of_the_work_is_refused(root: Path) -> None:
    (root / "ck").rename(root / "out.incomplete")
    before = tree(root, ())
    for source in (root / "out.incomplete", root / "out.incomplete/t"):
        with pytest.raises(CheckpointError, match=r"is inside of .*out\.incomplete"):
            regroup_checkpoint(source, root / "out", ONE)
    (root / "out.incomplete/t").rename(root / "out.incomplete/v.incomplete")
    with pytest.raises(CheckpointError, match=r"is inside of .*v\.incomplete"):
        regroup_checkpoint(
            root / "out.incomplete", root / "out.incomplete/v", ONE, tag="v.incomplete"
        )
    (root / "out.incomplete/v.incomplete").rename(root / "out.incomplete/t")
    assert tree(root, ()) == before


# ---- saving ---------------------------------------------------------------------------


def test_a_marker_is_not_written_through_a_link(root: Path) -> None:
    for name in (UNFINISHED, FILE_NAME):
        remove(root / "ck/t" / name)
        (root / "ck/t" / name).symlink_to(root / "precious/mine.bin")
        mark_unfinished(root / "ck/t")
        assert (root / "precious/mine.bin").read_bytes() == b"precious"
        assert (root / "ck/t" / UNFINISHED).read_bytes() == b""


def test_two_jobs_may_announce_in_one_folder(tmp_path: Path) -> None:
    """Both succeed, and whoever reads sees a tag."""
    problems: list[str] = []
    done = threading.Event()

    def announces(job: int) -> None:
        try:
            for step in range(100):
                announce(tmp_path, f"job{job}_step{step}")
        except CheckpointError as error:
            problems.append(str(error))

    def reads() -> None:
        while not done.is_set():
            text = (tmp_path / "latest").read_text()
            if not text.startswith("job"):
                problems.append(f"latest holds {text!r}")

    announce(tmp_path, "job_first")
    jobs = [threading.Thread(target=announces, args=(job,)) for job in (0, 1)]
    reader = threading.Thread(target=reads)
    for thread in (reader, *jobs):
        thread.start()
    for job in jobs:
        job.join()
    done.set()
    reader.join()
    assert problems == []
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


# ---- anything -------------------------------------------------------------------------

PARTS = st.sampled_from(
    [
        *("..", "..", ".", "", "t", "u", "a", "b", "ck", "precious", "mine.bin", *WORK, "latest"),
        *(FILE_NAME, "checkpoint", "nowhere", "~", "\0", "\n", "é", "x" * 300),
    ]
)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)
TEMPTING = ["ROOT/ck/t", "ROOT/precious/t", "../precious/t", "../ck/t", "t/../u", "ROOT/precious"]
ANYWHERE = st.sampled_from(TEMPTING) | NAMES | NAMES.map("ROOT/{}".format)  # ROOT is replaced
NUMBERS = st.sampled_from([0, 1, 5, 9, 14, -3, 10**6, 10**15, 10**30])
RANKS = st.sampled_from([(0, 1), (1, 0), (0,), (0, 0), (0, 1, 2), ()])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Groups as somebody could write them into a file who wants no good."""
    params = lay_out([P0, P1])
    if draw(st.booleans()):
        params = tuple(p._replace(offset=draw(NUMBERS)) for p in params)
    if draw(st.booleans()):
        params = tuple(p._replace(numel=draw(NUMBERS)) for p in params)
    group = FlatGroup("g", draw(st.just((0, 1)) | RANKS), params)
    last = draw(st.sampled_from([1, -1, 10**30]))
    return Layout((group,), {Rank(0, rank): (0,) for rank in (0, last)})


class Trial(NamedTuple):
    """What is asked for, and what is in the way.

    Attributes:
        tag: the argument.
        latest: what the file says.
        listed: one more name in the manifest of the tag.
        to: a layout in a file, or what is given as it is.
        destination: of the conversion.
        changed: a path, and what is there: a link to a path, a pipe or a folder.
        begun: is there unfinished work?
    """

    tag: str | None = None
    latest: str = "t"
    listed: str | None = None
    to: Layout | str = "ROOT/to.json"
    destination: str = "ROOT/out"
    changed: tuple[str, str] | None = None
    begun: bool = True


SOURCES = ["ck/t", "ck/t/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", f"ck/t/{FILE_NAME}"]
PLACES = [*SOURCES, "ck/latest", *WORK, *(f"out.incomplete/{name}" for name in WHERE)]
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "tag": st.just("a/b") | ANYWHERE,
    "latest": ANYWHERE,
    "listed": ANYWHERE,
    "to": layouts() | st.sampled_from(["stock", "module"]) | ANYWHERE,
    "destination": NAMES.map("ROOT/{}".format),
    "changed": st.tuples(st.sampled_from(PLACES), st.sampled_from(["pipe", "folder"]) | ANYWHERE),
}


@st.composite
def trials(draw: st.DrawFn) -> Trial:
    """One or two things are not as they should be."""
    fields = draw(st.sets(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=2))
    drawn = {field: draw(FIELDS[field]) for field in sorted(fields)}
    return Trial(**drawn, begun="changed" in fields or draw(st.booleans()))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with unfinished work beside it, and the same again to go back to."""
    root, again = (tmp_path_factory.mktemp(name) for name in ("root", "again"))
    make_tree(root)
    stop(root)
    again.rmdir()
    shutil.copytree(root, again)
    return root, again


@settings(max_examples=50, derandomize=True)
@given(trial=trials())
def test_nothing_outside_of_the_destination_changes(made: tuple[Path, Path], trial: Trial) -> None:
    root, again = made
    shutil.rmtree(root)
    shutil.copytree(again, root)

    def real(name: str) -> str:
        return name.replace("ROOT", str(root))

    if not trial.begun:
        shutil.rmtree(root / "out.incomplete")
    (root / "ck/latest").write_bytes(os.fsencode(real(trial.latest)))
    if trial.listed is not None:
        list_files(root / "ck/t", real(trial.listed))
    to = trial.to if isinstance(trial.to, Layout) else real(trial.to)
    if isinstance(to, Layout) and to.groups[0].ranks:
        write_manifest(Manifest(to, "ZeRO-2"), root / "to.json")
        to = str(root / "to.json")
    if trial.changed is not None:
        put(root / trial.changed[0], real(trial.changed[1]))
    tag = None if trial.tag is None else real(trial.tag)
    destination, below = real(trial.destination), os.path.relpath(real(trial.destination), root)
    if below.startswith(".."):  # the test has no business there
        destination, below = str(root / "out"), "out"
    before = outside(root, below)
    for call in (
        lambda: inspect_checkpoint(root / "ck", tag, workers=1),
        lambda: regroup_checkpoint(root / "ck", destination, to, tag=tag, workers=1),
    ):
        with contextlib.suppress(MoEGroupsError):
            call()
    options = [] if tag is None else [f"--tag={tag}"]
    if isinstance(to, str) and "\0" not in f"{tag}{to}{destination}":
        assert main(["inspect-checkpoint", str(root / "ck"), "--quick", *options]) in (0, 1, 2)
        given = ["regroup-checkpoint", str(root / "ck"), destination, f"--to={to}", *options]
        assert main(given) in (0, 2)
    assert outside(root, below) == before


def outside(root: Path, destination: str) -> Tree:
    """All but the destination, the folder of its work, and the folders that it is made in."""
    found = tree(root, (destination, f"{destination}.incomplete"))
    for parent in Path(destination).parents:
        found.pop(str(parent), None)
    return found


def put(path: Path, what: str) -> None:
    """Something else in place of what is there."""
    remove(path)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what and "\0" not in what:
        try:
            path.symlink_to(what)
        except OSError:  # too long
            path.mkdir()
