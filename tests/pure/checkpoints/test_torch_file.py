"""Files of ``torch.save``: read as they are, compared with their CRC-32, refused when damaged."""

import argparse
import contextlib
import datetime
import random
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from hypothesis import given, settings, strategies as st

from moe_groups.checkpoints.torch_file import check_crcs, compare_crcs, read_torch_file, save
from moe_groups.errors import CheckpointError
from tests.support.checkpoints.checkpoint_damage import records_of

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64),
]

# ---- random contents ------------------------------------------------------------------


@st.composite
def base_tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    count = int(torch.tensor(shape).prod()) if shape else 1
    raw = torch.randint(0, 2, (count, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.flatten().view(dtype).reshape(shape)


@st.composite
def contents(draw: st.DrawFn) -> Any:
    """Nested containers of scalars and tensors; some tensors share storages or are views."""
    pool = draw(st.lists(base_tensors(), min_size=1, max_size=4))

    @st.composite
    def leaves(draw: st.DrawFn) -> Any:
        tensor = draw(st.sampled_from(pool))
        kind = draw(st.sampled_from(["same", "view", "parameter", "transposed", "scalar"]))
        if kind == "view" and tensor.dim() and tensor.shape[0] > 1:
            return tensor[1:]
        if kind == "parameter":
            return torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        if kind == "transposed" and tensor.dim() == 2:
            return tensor.t()
        return (
            draw(st.sampled_from([None, 3, 0.5, "text", b"bytes"])) if kind == "scalar" else tensor
        )

    keys = st.text(max_size=3) | st.integers(0, 9)

    def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(keys, inner, max_size=3)
            | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        )

    return draw(st.recursive(leaves(), nested, max_leaves=8))


def assert_same(found: Any, wanted: Any) -> None:
    """Equal in structure, layout and every bit."""
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.stride() == wanted.stride()
        assert as_bytes(found) == as_bytes(wanted)
    elif isinstance(wanted, dict):
        assert type(found) is type(wanted)
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_same(found[key], value)
    elif isinstance(wanted, list | tuple):
        assert (type(found), len(found)) == (type(wanted), len(wanted))
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch-files")


@given(contents())
@settings(max_examples=40, derandomize=True)
def test_there_and_back(folder: Path, content: Any) -> None:
    """What is read can be saved again without being loaded, and is sound."""
    source, target = folder / "source.pt", folder / "target.pt"
    torch.save(content, source)
    save(read_torch_file(source), target)
    assert_same(torch.load(target, weights_only=False), content)
    assert compare_crcs(target) == ([], 0)
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None


# ---- classes ---------------------------------------------------------------------------

RAN: list[str] = []


class Spy:
    """Runs code of its author when it is unpickled; ``torch.load`` would."""

    def __reduce__(self) -> Any:
        return _spy, ()


class Own(dict[str, int]):
    """A class that nobody but its author knows."""


DATA: dict[str, list[Any]] = {
    "options": [argparse.Namespace(lr=0.1, path=Path("/data"))],
    "numpy": [np.float32(0.5), np.arange(3), np.array(["a", "b"]), np.random.get_state()],
    "python": [random.getstate(), datetime.timedelta(1), frozenset({1}), {2}, slice(1), 1j, b"b"],
    "torch": [torch.get_rng_state(), torch.Size([2]), torch.bfloat16, torch.device("cpu")],
}


@pytest.mark.parametrize("kind", DATA)
def test_data_that_runs_save_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.pt"
    torch.save(DATA[kind], path)
    found = read_torch_file(path)
    assert repr(found) == repr(DATA[kind])
    assert [type(value) for value in found] == [type(value) for value in DATA[kind]]


@pytest.mark.parametrize("trust", [False, True])
def test_objects_of_deepspeed_are_read_as_stand_ins_and_written_as_its_own(
    trust: bool, tmp_path: Path
) -> None:
    scaler = DynamicLossScaler(1.0, 2.0, 3, 4.0, 5, True, False)
    given = [fragment_address(3, 4), scaler, LossScaler(2.0), *ZeroStageEnum]
    torch.save(given, tmp_path / "theirs.pt")
    read = read_torch_file(tmp_path / "theirs.pt", trust=trust)
    assert {type(one).__module__ for one in read} == {"moe_groups.checkpoints.saved_objects"}
    save(read, tmp_path / "ours.pt")
    written = torch.load(tmp_path / "ours.pt", weights_only=False)
    for found in (read, written):
        assert found[3:] == given[3:]
        for one, other in zip(found[:3], given[:3], strict=True):
            assert vars(one) == vars(other)
    assert [type(one) for one in written] == [type(one) for one in given]


@pytest.mark.parametrize("value", [Spy(), Own(a=1), print, defaultdict(int, a=1)])
def test_objects_of_unknown_classes_are_refused(value: Any, tmp_path: Path) -> None:
    """By name, and nothing is run; with ``trust`` they are read."""
    path = tmp_path / "foreign.pt"
    torch.save({"value": [value]}, path)
    RAN.clear()
    name = "_spy" if isinstance(value, Spy) else getattr(value, "__name__", type(value).__name__)
    with pytest.raises(CheckpointError, match=rf"foreign\.pt was not read.*{name}.*trust=True"):
        read_torch_file(path)
    assert not RAN
    read_torch_file(path, trust=True)
    assert ["code"] * isinstance(value, Spy) == RAN


def _spy() -> str:
    RAN.append("code")
    return "spy"


def test_threads_read_at_once(tmp_path: Path) -> None:
    """torch's list of classes belongs to the process; none of them takes it from another."""
    path = tmp_path / "data.pt"
    torch.save([fragment_address(n, n) for n in range(500)], path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_torch_file(path), range(40)))
    assert all(content == found[0] for content in found)
    assert fragment_address not in torch.serialization.get_safe_globals()


# ---- damage ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.pt"
    torch.save({"a": torch.arange(5.0), "b": [torch.empty(0), torch.ones(2)], "c": 3}, path)
    return path


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def flips(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """A bit of each byte."""
    randomness = random.Random(0)
    return ((at, randomness.randrange(8)) for at in range(first, stop))


def test_missing(tmp_path: Path) -> None:
    for read in (check_crcs, read_torch_file):
        with pytest.raises(CheckpointError, match=r"no\.pt is missing\."):
            read(tmp_path / "no.pt")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(tmp_path)


def test_old_format(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"old\.pt cannot be read \(.*cut off, or.*old format"
    ):
        read_torch_file(path)


def test_every_truncation(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        for read in (check_crcs, read_torch_file):
            with pytest.raises(CheckpointError, match="cannot be read"):
                read(saved)


def test_every_changed_byte(saved: Path) -> None:
    """In a record it is found; elsewhere it is found, or what is read is what was saved."""
    content, right = saved.read_bytes(), torch.load(saved)
    inside = {at: record.name for record in records_of(saved) for at in range(*record[1:])}
    errors = 0
    for at, bit in flips(0, len(content)):
        saved.write_bytes(flipped(content, at, bit))
        if at in inside:
            assert compare_crcs(saved).changed == [inside[at]]
            with pytest.raises(CheckpointError, match=rf"record {inside[at]} do not have the CRC"):
                check_crcs(saved)
            continue
        with contextlib.suppress(CheckpointError):
            check_crcs(saved)
            assert_same(read_torch_file(saved), right)
            errors -= 1
        errors += 1
    assert errors > 100


def test_a_changed_pickle_is_not_unpickled(saved: Path) -> None:
    """Changed bytes could make anything of it, and some take minutes and all memory."""
    content = saved.read_bytes()
    (pickle,) = (record for record in records_of(saved) if record.name == "data.pkl")
    for at, bit in flips(pickle.start, pickle.stop):
        saved.write_bytes(flipped(content, at, bit))
        with pytest.raises(CheckpointError, match="CRC"):
            read_torch_file(saved)


def test_files_without_crcs(saved: Path) -> None:
    """``torch.serialization.set_crc32_options(False)`` saves files that state none."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, saved)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch_file(saved)["a"].shape == (3,)
    with zipfile.ZipFile(saved) as archive:
        assert compare_crcs(saved) == ([], len(archive.infolist()))


def test_broken_pickle_in_a_sound_archive(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"no pickle")
        archive.writestr("a/version", b"3")
    with pytest.raises(CheckpointError, match="was not read"):
        read_torch_file(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_torch_file(path, trust=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1000))
    with pytest.raises(CheckpointError, match="a record is compressed"):
        read_torch_file(path)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        save(torch.ones(3), tmp_path / "no/such.pt")
    with pytest.raises(OSError, match="No space left"):
        save(torch.ones(3_000_000), Path("/dev/full"))
