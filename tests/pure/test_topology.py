"""Groups of ranks: each kind is a partition, of the right sizes; and what the command shows."""

import json
import struct
import sys
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, strategies as st

from moe_groups import Topology, cli
from moe_groups.cli.topology import show_ranks
from moe_groups.cli.topology_plot import letters
from moe_groups.errors import InvalidArgumentError
from moe_groups.topology import GroupKind

KINDS: tuple[GroupKind, ...] = get_args(GroupKind)
SIZES = st.sampled_from((1, 2, 3, 4))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    tp, pp, ep, more = (draw(SIZES) for _ in range(4))
    return Topology(
        world_size=tp * pp * ep * more,
        tp_size=tp,
        pp_size=pp,
        ep_size=ep,
        expert_tensor_parallelism=draw(st.booleans()),
        use_data_before_expert_parallel=draw(st.booleans()),
    )


def cut(topology: Topology) -> int:
    """Tensor-parallel slices of an expert."""
    return topology.tp_size if topology.expert_tensor_parallelism else 1


# ---- groups ---------------------------------------------------------------------------


@given(topologies())
def test_each_kind_has_every_rank_once(topology: Topology) -> None:
    for kind in KINDS:
        groups = topology.groups(kind)
        assert sorted(chain.from_iterable(groups)) == list(range(topology.world_size))
        assert groups == sorted(sorted(ranks) for ranks in groups)
        for ranks in groups:
            assert all(topology.group_of(kind, rank) == ranks for rank in ranks)


@given(topologies())
def test_groups_of_a_kind_have_one_size(topology: Topology) -> None:
    world, tp, pp, ep = (
        topology.world_size,
        topology.tp_size,
        topology.pp_size,
        topology.ep_size,
    )
    wanted: dict[GroupKind, int] = {
        "data": world // (tp * pp),
        "tensor": tp,
        "pipeline": pp,
        "expert": ep,
        "expert_data": world // (pp * ep * cut(topology)),
    }
    for kind, size in wanted.items():
        assert {len(ranks) for ranks in topology.groups(kind)} == {size}
    assert topology.data_parallel_size == wanted["data"]
    assert topology.expert_data_parallel_size == wanted["expert_data"]


@given(topologies())
def test_groups_stay_in_their_stage(topology: Topology) -> None:
    for kind in ("data", "tensor", "expert", "expert_data"):
        for ranks in topology.groups(kind):
            assert len({topology.stage(rank) for rank in ranks}) == 1
    for ranks in topology.groups("pipeline"):
        assert [topology.stage(rank) for rank in ranks] == list(range(topology.pp_size))


@given(topologies())
def test_an_expert_and_an_expert_data_group_meet_in_one_rank(topology: Topology) -> None:
    """In a stage, or where experts are cut among the stage's ranks of one tensor rank."""

    def line(ranks: list[int]) -> tuple[int, int]:
        slot = topology.tensor_rank(ranks[0]) if topology.expert_tensor_parallelism else 0
        return topology.stage(ranks[0]), slot

    for expert in topology.groups("expert"):
        for expert_data in topology.groups("expert_data"):
            common = set(expert) & set(expert_data)
            assert len(common) == (line(expert) == line(expert_data))


@given(topologies())
def test_ranks_that_share_experts_hold_the_same_part_of_them(topology: Topology) -> None:
    for ranks in topology.groups("expert"):
        assert [topology.expert_rank(rank) for rank in ranks] == list(range(topology.ep_size))
    for ranks in topology.groups("expert_data"):
        assert len({topology.expert_rank(rank) for rank in ranks}) == 1


@given(topologies())
def test_places_tell_ranks_apart(topology: Topology) -> None:
    places = {
        (topology.stage(rank), topology.data_rank(rank), topology.tensor_rank(rank))
        for rank in range(topology.world_size)
    }
    assert len(places) == topology.world_size
    for ranks in topology.groups("data"):
        assert [topology.data_rank(rank) for rank in ranks] == list(range(len(ranks)))
    for ranks in topology.groups("tensor"):
        assert [topology.tensor_rank(rank) for rank in ranks] == list(range(len(ranks)))


def test_known_groups() -> None:
    """Sixteen ranks: what DeepSpeed's own comments say of them."""
    topology = Topology(world_size=16, tp_size=2, ep_size=4, expert_tensor_parallelism=True)
    assert topology.group_of("expert", 10) == [8, 10, 12, 14]
    assert topology.group_of("expert_data", 10) == [2, 10]
    assert Topology(world_size=16, ep_size=2).groups("expert_data")[1] == list(range(1, 16, 2))


# ---- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"world_size": 12, "tp_size": 2, "pp_size": 4}, "12 ranks .* tp_size=2 .* pp_size=4.* 8"),
        ({"world_size": 8, "ep_size": 3}, "ep_size=3 .* the 8 ranks of a stage .*whole experts"),
        (
            {"world_size": 8, "tp_size": 4, "ep_size": 4, "expert_tensor_parallelism": True},
            "ep_size=4 .* the 2 data-parallel ranks .*tp_size=4.*a divisor of 2",
        ),
        ({"world_size": 0}, "world_size=0 must be"),
        ({"world_size": 4, "tp_size": True}, "tp_size=True must be"),
        ({"world_size": 4, "ep_size": 2.0}, "ep_size=2.0 must be"),
    ],
)
def test_sizes_that_do_not_divide_are_named(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        Topology(**sizes)


def test_unknown_ranks_and_kinds_are_refused() -> None:
    topology = Topology(world_size=4)
    with pytest.raises(InvalidArgumentError, match="kind='experts' must be 'data', "):
        topology.groups("experts")  # type: ignore[arg-type]
    for rank in (-1, 4, True):
        with pytest.raises(
            InvalidArgumentError, match=rf"rank={rank!r} (is none of the 4|must be an integer)"
        ):
            topology.group_of("data", rank)


# ---- the command ----------------------------------------------------------------------


def run(*args: object) -> int:
    return cli.main(["topology", *map(str, args)])


def test_json_has_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--world-size", 16, "--tp", 2, "--pp", 2, "--ep", 2, "--expert-tp", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    topology = Topology(
        world_size=16, tp_size=2, pp_size=2, ep_size=2, expert_tensor_parallelism=True
    )
    assert found["groups"] == {kind: topology.groups(kind) for kind in KINDS}
    assert found["ep_size"] == 2


def test_tables_have_a_row_for_each_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--world-size", 64, "--ep", 8, "--data-before-expert") == 0
    short = capsys.readouterr().out
    assert "40 more; --all" in short
    assert run("--world-size", 64, "--ep", 8, "--data-before-expert", "--all") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "64 ranks: DP 64, EP 8, TP 1, PP 1; data before expert"
    row = next(line for line in rows if line.split()[:1] == ["63"])
    assert " ".join(row.split()) == "63 0 63 0 0-63 7,15,23,31,39,47,55,63 8 of 8 56-63"
    assert max(map(len, rows)) <= 100


def test_ranks_in_few_words() -> None:
    shown = {"3": [3], "0,1": [0, 1], "4-7": [4, 5, 6, 7], "1,3": [1, 3]}
    for text, ranks in shown.items():
        assert show_ranks(ranks) == text
    assert show_ranks(list(range(2, 80, 4))) == "2,6,10,..,78"
    assert show_ranks([0, 1, 2, 3, 4, 5, 6, 7, 9]) == "0,1,2,3,4,5,6,7,9"


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (16, 2, 2, 2), (32, 1, 1, 4), (32, 4, 4, 1)], ids=str
)
def test_picture_is_drawn(
    sizes: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ranks.png"
    options = zip(("--world-size", "--tp", "--pp", "--ep"), sizes, strict=True)
    assert run(*(part for pair in options for part in pair), "--plot", path) == 0
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert 500 < width < 4000
    assert 200 < height < 4000


def test_letters_go_on_after_z() -> None:
    assert [letters(number) for number in (0, 25, 26, 27, 52, 701, 702)] == [
        "A", "Z", "AA", "AB", "BA", "ZZ", "AAA",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--world-size", 8, "--tp", 3), "8 ranks cannot be cut into --tp 3 times --pp 1"),
        (
            ("--world-size", 8, "--ep", 3),
            "--ep 3 does not divide the 8 ranks of a stage (--world-size 8,",
        ),
        (("--world-size", 8, "--plot", "ranks.html"), "must end in .png"),
        (("--world-size", 8, "--plot", "/no/such/ranks.png"), "there is no directory"),
        (("--world-size", 256, "--plot", "ranks.png"), "up to 128 ranks, not 256"),
    ],
)
def test_bad_input_gives_one_line(
    args: tuple[Any, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*args) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("package", "args"), [("rich", ()), ("matplotlib", ("--json", "--plot", "ranks.png"))]
)
def test_optional_packages_are_named_where_they_are_missing(
    package: str,
    args: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run("--world-size", 4, *args) == 2
    assert f"need {package}" in capsys.readouterr().err
    assert run("--world-size", 4, "--json") == 0
