"""``moe_groups.json``: what is written is read again, and nothing else is taken for it."""

import contextlib
import json
import math
import os
import resource
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moe_groups._common.own_folder import is_plain
from moe_groups.checkpoints.kept_state import Kept
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank, lay_out, merge_ranks
from moe_groups.checkpoints.manifest import (
    SCHEMA,
    Manifest,
    SavedFile,
    read_manifest,
    write_manifest,
)
from moe_groups.errors import CheckpointError
from moe_groups.groups.origin import Origin, OriginRow
from moe_groups.groups.rules import Variant

NAMES = st.text(min_size=1, max_size=8)
OPTIONS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Ranks in a grid, groups that some of them share."""
    world = draw(st.integers(1, 4))
    models = draw(st.integers(1, 2))
    columns: dict[Rank, list[FlatGroup]] = {
        Rank(model, data): [] for model in range(models) for data in range(world)
    }
    for _ in range(draw(st.integers(0, 4))):
        model = draw(st.integers(0, models - 1))
        ranks = draw(st.lists(st.integers(0, world - 1), min_size=1, unique=True))
        for rank in ranks:
            columns[Rank(model, rank)].append(group := draw(groups(tuple(ranks), model)))
        for rank in ranks:  # what ranks share is one group
            columns[Rank(model, rank)][-1] = group
    return merge_ranks(list(columns.items()))


@st.composite
def origins(draw: st.DrawFn, layout: Layout) -> dict[Rank, Origin]:
    """What the groups of some ranks were made from."""
    found = {}
    for rank in layout.order:
        rows = [
            OriginRow(
                param.name,
                group.parallel_group,
                draw(st.none() | NAMES),
                draw(st.none() | st.integers(0, 9)),
                Variant(0, draw(st.booleans()), tuple(draw(st.lists(st.integers(0, 3))))),
                draw(st.sampled_from((torch.float32, torch.bfloat16))),
            )
            for group in layout.of(rank)
            for param in group.params
        ]
        if len({row.name for row in rows}) == len(rows) and draw(st.booleans()):
            names = (draw(st.none() | NAMES), None)
            found[rank] = Origin(tuple(draw(st.permutations(rows))), names, draw(st.booleans()))
    return found


@st.composite
def groups(draw: st.DrawFn, ranks: tuple[int, ...], model: int) -> FlatGroup:
    shapes = st.none() | st.lists(st.integers(0, 9), max_size=3).map(tuple)
    params = []
    for name in draw(st.lists(NAMES, max_size=3, unique=True)):
        shape = draw(shapes)
        numel = draw(st.integers(0, 99)) if shape is None else math.prod(shape)
        dtype, expert = draw(st.none() | NAMES), draw(st.none() | st.integers(0, 255))
        params.append(FlatParam(name, numel, 0, shape, dtype, expert))
    labels: dict[str, Any] = {}
    if draw(st.booleans()):
        number = draw(st.none() | st.integers(0, 9))
        labels = {"expert_group_name": draw(NAMES), "expert_number": number}
    return FlatGroup(
        name=draw(NAMES),
        ranks=ranks,
        params=lay_out(params, draw(st.sampled_from([1, 8]))),
        model_rank=model,
        parallel_group=draw(st.none() | st.just("ep_size_2")),
        ep_rank=draw(st.none() | st.integers(0, 3)),
        labels=labels,
        options=draw(st.dictionaries(NAMES, OPTIONS | st.lists(OPTIONS, max_size=2), max_size=3)),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    saved = st.builds(SavedFile, st.integers(0, 2**60), st.none() | NAMES)
    files = draw(st.dictionaries(NAMES.filter(is_plain), saved, max_size=3))
    about = {"step": draw(st.integers(0)), "versions": {"moe_groups": "9.9"}}
    layout = draw(layouts())
    kept = draw(st.none() | st.builds(Kept, st.none() | NAMES, st.none() | st.just(("a", "b"))))
    layout = replace(layout, origins=draw(origins(layout)))
    return Manifest(layout, draw(NAMES), about, files, kept)


def small() -> Manifest:
    """Two ranks that share a dense group and have one expert group each."""
    dense = FlatGroup("dense", (0, 1), lay_out([FlatParam("a", 6, 0, (2, 3), "bfloat16")]))
    columns = []
    for rank in (0, 1):
        expert = FlatParam("b", 4, 0, (4,), "bfloat16", rank)
        own = FlatGroup("ep_size_2_l", (rank,), (expert,), 0, "ep_size_2", rank)
        columns.append((Rank(0, rank), [dense, own]))
    rows = (
        OriginRow("a", None, None, None, Variant(0, True, (1,)), torch.float32),
        OriginRow("b", "ep_size_2", "l", 0, Variant(1), torch.bfloat16),
    )
    origins = dict.fromkeys((rank for rank, _ in columns), Origin(rows, ("mine", None)))
    return Manifest(
        merge_ranks(columns, origins), "ZeRO-1", {"step": 3}, {"a.pt": SavedFile(17, "0a")}
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "moe_groups.json"


# ---- what is written ------------------------------------------------------------------


@given(manifests())
@settings(max_examples=50)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    write_manifest(manifest, path)
    assert read_manifest(path) == manifest


def test_one_parameter_one_rank_and_one_file_a_line(path: Path) -> None:
    params = lay_out([FlatParam(f"p{n}", n, 0, (n,), "float32") for n in range(5)])
    columns = [
        (Rank(0, 0), [FlatGroup("g", (0,), params[:3]), FlatGroup("h", (0,), params[3:])]),
        (Rank(0, 1), []),
    ]
    write_manifest(
        Manifest(merge_ranks(columns), "x", {}, {"a": SavedFile(1), "b": SavedFile(2)}), path
    )
    lines = path.read_text().splitlines()
    for name in (*(f'"p{n}"' for n in range(5)), '"data_parallel_ranks": [1]', '"a"', '"b"'):
        (line,) = (line for line in lines if name in line)
        assert sum(f'"{other}"' in line for other in ("p0", "p1", "p2", "p3", "p4", "a", "b")) <= 1
    assert sum('"name": "' in line for line in lines) == 2


def test_ranks_with_the_same_groups_share_a_line(path: Path) -> None:
    group = FlatGroup("g", tuple(range(64)), (FlatParam("a", 64, 0),))
    columns = [(Rank(0, data), [group]) for data in range(64)]
    write_manifest(Manifest(merge_ranks(columns), "ZeRO-1"), path)
    assert json.loads(path.read_text())["ranks"] == [
        {"model_parallel_rank": 0, "data_parallel_ranks": list(range(64)), "groups": [0]}
    ]


def test_permissions_are_those_of_any_file(path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_manifest(small(), path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# ---- a failing write ------------------------------------------------------------------


@pytest.fixture
def written(path: Path) -> Iterator[Path]:
    """A manifest that a failing write must leave as it is, alone in its directory."""
    write_manifest(small(), path)
    before = path.read_bytes()
    yield path
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@contextlib.contextmanager
def little_space(limit: int) -> Iterator[None]:
    """No file can grow over ``limit`` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("limit", [0, 100])
def test_no_space(written: Path, limit: int) -> None:
    with little_space(limit), pytest.raises(OSError, match="File too large"):
        write_manifest(replace(small(), about={"step": 4}), written)


def test_content_that_json_cannot_hold(written: Path) -> None:
    with pytest.raises(TypeError):
        write_manifest(replace(small(), about={"step": {1, 2}}), written)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_manifest(small(), tmp_path / "missing" / "moe_groups.json")
    assert list(tmp_path.iterdir()) == []


# ---- what is not taken ----------------------------------------------------------------


def test_every_truncation_is_found(path: Path) -> None:
    write_manifest(small(), path)
    content = path.read_bytes()
    for length in range(len(content) - 1):  # the last byte is a line's end
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is damaged, it is not JSON"):
            read_manifest(path)


@given(st.data())
@settings(max_examples=200)
def test_changed_bytes_give_the_same_manifest_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.json"
    write_manifest(small(), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789"[]{}-.e')))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert read_manifest(path) == small()


def test_missing(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"moe_groups\.json cannot be read: No such file"):
        read_manifest(path)
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_manifest(path.parent)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"format": "other"}', '"moe-groups"'])
def test_not_ours(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"is no manifest of moe-groups|holds no JSON object"):
        read_manifest(path)


def test_nested_without_end(path: Path) -> None:
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(path)


def edit(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    """Replace (or with ``...`` remove) what the keys lead to."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("versions", [{"moe_groups": "7.5"}, {}, [], None, "7.5"])
def test_later_schema(path: Path, versions: Any) -> None:
    write_manifest(small(), path)
    edit(path, ("schema",), SCHEMA + 1)
    edit(path, ("versions",), versions)
    wanted = "7.5" if versions == {"moe_groups": "7.5"} else "a later one"
    with pytest.raises(CheckpointError, match=rf"has schema 4; .* up to 3\. .*\({wanted}\)"):
        read_manifest(path)


SCHEMA_1 = Path(__file__).with_name("moe_groups.schema-1.json")
"""Written by the release before schema 2."""


def test_an_earlier_schema_is_read(path: Path) -> None:
    """It has the groups, and does not say what they were made from."""
    found = read_manifest(SCHEMA_1)
    layout = replace(small().layout, origins={})
    assert found == replace(small(), layout=layout, files={"a.pt": SavedFile(17)})
    write_manifest(found, path)
    assert read_manifest(path) == found


def test_groups_hold_what_they_were_made_from(path: Path) -> None:
    layout = small().layout
    (origin,) = {*layout.origins.values()}
    dense, expert = origin.rows
    for rows in (
        (dense,),
        (dense, expert._replace(name="c")),
        (dense, expert._replace(parallel_group=None)),
        (dense, expert, expert),
    ):
        origins = dict.fromkeys(layout.order, replace(origin, rows=rows))
        write_manifest(replace(small(), layout=replace(layout, origins=origins)), path)
        with pytest.raises(CheckpointError, match="other parameters than they were made from"):
            read_manifest(path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ((0, "params", 1, 4), 2),
        ((0, "params", 0, 7), "float31"),
        ((0, "params", 0, 5), 1),
        ((0, "sources", 0), 1),
    ],
)
def test_what_groups_cannot_be_made_from(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    write_manifest(small(), path)
    edit(path, ("origins", *keys), value)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(path)


@pytest.mark.parametrize("schema", [None, "1", 1.5, [], 0, -1, True, ...])
def test_no_schema(path: Path, schema: Any) -> None:
    write_manifest(small(), path)
    edit(path, ("schema",), schema)
    with pytest.raises(CheckpointError, match="schema"):
        read_manifest(path)


FIRST = ("groups", 0, "params", 0)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ((*FIRST, 0), "other"),
        ((*FIRST, 4), 1),
        ((*FIRST, 5), 5),
        (("groups", 0, "data_parallel_ranks"), [1, 0]),
        (("groups", 1, "model_parallel_rank"), 1),
        (("ranks", 0, "groups"), [0, 2]),
        (("ranks", 0, "data_parallel_ranks"), [0, 2]),
        (("fingerprint",), "00"),
    ],
)
def test_edited(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    write_manifest(small(), path)
    edit(path, keys, value)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        read_manifest(path)


WRONG: list[Any] = [None, True, -1, 1.5, "x", "", [], [[]], {}, {"x": 1}, [None], ["x"], [-1], ...]


def all_keys(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items: Any = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    for key, value in items:
        yield (*before, key)
        yield from all_keys(value, (*before, key))


def test_wrong_types_everywhere(path: Path) -> None:
    """Every value of the file replaced by every kind of other one, or left out."""
    write_manifest(small(), path)
    original = path.read_text()
    before = json.loads(original)
    for keys in all_keys(before):
        for value in WRONG:
            path.write_text(original)
            edit(path, keys, value)
            with contextlib.suppress(CheckpointError):
                found = read_manifest(path)
                check_types(found)
                assert found.layout.fingerprint() == small().layout.fingerprint(), (keys, value)


def check_types(manifest: Manifest) -> None:
    """What was read can be used and written as what it says it is."""
    assert isinstance(manifest.wrapper, str)
    for name, file in manifest.files.items():
        assert (type(name), type(file.size)) == (str, int)
        assert file.digest is None or type(file.digest) is str
    for group in manifest.layout.groups:
        assert type(group.name) is str
        assert isinstance(group.options, dict)
        assert group.parallel_group is None or type(group.parallel_group) is str
        assert group.ep_rank is None or type(group.ep_rank) is int
        assert {type(rank) for rank in (*group.ranks, group.model_rank)} == {int}
        for param in group.params:
            assert type(param.name) is str
            assert (type(param.numel), type(param.offset)) == (int, int)
            assert param.shape is None or {type(size) for size in param.shape} <= {int}
            assert param.dtype is None or type(param.dtype) is str
            assert param.expert is None or type(param.expert) is int
    for rank, places in manifest.layout.order.items():
        assert {type(number) for number in (*rank, *places)} == {int}
    for origin in manifest.layout.origins.values():
        assert {type(name) for name in origin.names} <= {str, type(None)}
        assert type(origin.frozen_experts) is bool
        for row in origin.rows:
            assert type(row.name) is str
            assert row.number is None or type(row.number) is int
            assert isinstance(row.dtype, torch.dtype)
            assert {type(number) for number in (row.variant.source, *row.variant.overrides)} == {
                int
            }
