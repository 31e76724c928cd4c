"""Files of ``torch.save``: read without bytes, written without bytes, and filled later."""

import contextlib
import os
import random
import struct
import zipfile
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moe_groups.checkpoints.torch_file import (
    fake_like,
    read_records,
    read_skeleton,
    read_small,
    storage_of,
    storage_start,
    tensor_start,
    tensors_in,
    write_crcs,
    write_skeleton,
)
from moe_groups.errors import CheckpointError

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
    tensor = raw.view(torch.uint8).flatten().view(dtype).reshape(shape)
    assert tensor.dtype is dtype
    return tensor


@st.composite
def contents(draw: st.DrawFn) -> Any:
    """Nested containers of scalars and tensors; some tensors share storages or are views."""
    pool = draw(st.lists(base_tensors(), min_size=1, max_size=4))

    @st.composite
    def leaves(draw: st.DrawFn) -> Any:
        tensor = draw(st.sampled_from(pool))
        kind = draw(st.sampled_from(["same", "view", "parameter", "grad", "transposed", "scalar"]))
        floating = tensor.is_floating_point()
        if kind == "view" and tensor.dim() and tensor.shape[0] > 1:
            return tensor[1:]
        if kind == "parameter":
            return torch.nn.Parameter(tensor, requires_grad=floating and draw(st.booleans()))
        if kind == "grad" and floating:
            return tensor.detach().clone().requires_grad_()
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


def assert_same(found: Any, wanted: Any, data: bool) -> None:
    """Equal in structure and layout, and with ``data`` in every bit."""
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert (found.stride(), found.storage_offset()) == (
            wanted.stride(),
            wanted.storage_offset(),
        )
        assert found.requires_grad == wanted.requires_grad
        if data:
            assert type(found) is torch.Tensor  # also where it was a Parameter
            assert as_bytes(found) == as_bytes(wanted)
    elif isinstance(wanted, dict):
        assert type(found) is type(wanted)
        assert list(found) == list(wanted)
        for key, value in wanted.items():
            assert_same(found[key], value, data)
    elif isinstance(wanted, list | tuple):
        assert (type(found), len(found)) == (type(wanted), len(wanted))
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, data)
    else:
        assert found == wanted


def as_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def copy_bytes(skeleton: Any, source: Path, records: dict[int, Any], target: Path) -> None:
    """Fill what :func:`write_skeleton` wrote with the bytes of the file that was read."""
    crcs = {}
    with open(source, "rb") as read, open(target, "r+b") as write:
        for tensor in tensors_in(skeleton):
            record = records[storage_of(tensor)]
            data = os.pread(read.fileno(), record.size, storage_start(tensor))
            assert len(data) == record.size == tensor.untyped_storage().nbytes()
            os.pwrite(write.fileno(), data, record.start)
            crcs[record.start] = zlib.crc32(data)
    write_crcs(target, crcs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch-files")


@given(contents())
@settings(max_examples=40, derandomize=True)
def test_there_and_back(folder: Path, content: Any) -> None:
    source, target = folder / "source.pt", folder / "target.pt"
    torch.save(content, source)
    skeleton = read_skeleton(source)
    assert_same(skeleton, content, data=False)
    copy_bytes(skeleton, source, write_skeleton(skeleton, target), target)
    loaded = torch.load(target, weights_only=False)
    assert_same(loaded, content, data=True)
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None


@given(contents())
@settings(max_examples=40, derandomize=True)
def test_records_and_starts(folder: Path, content: Any) -> None:
    """Each says where zipfile and ``torch.load`` find the same bytes."""
    path = folder / "records.pt"
    torch.save(content, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        wanted = [
            (info.filename.split("/", 1)[1], archive.read(info), info.CRC)
            for info in archive.infolist()
        ]
    found = [(r.name, whole[r.start : r.start + r.size], r.crc) for r in read_records(path)]
    assert found == wanted
    loaded = torch.load(path, weights_only=False)
    for fake, real in zip(tensors_in(read_skeleton(path)), tensors_in(loaded), strict=True):
        if real.is_contiguous():
            start = tensor_start(fake)
            assert whole[start : start + real.nbytes] == as_bytes(real)
            again = read_small(path, fake)
            assert (again.dtype, again.shape) == (real.dtype, real.shape)
            assert as_bytes(again) == as_bytes(real)


def test_new_tensors_in_a_skeleton(tmp_path: Path) -> None:
    """Partitions of other sizes beside what was read."""
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save({"old": torch.arange(5), "step": torch.tensor(7.0)}, source)
    skeleton = read_skeleton(source)
    skeleton["old"] = fake_like(torch.bfloat16, 1000)
    records = write_skeleton(skeleton, target)
    record = records[storage_of(skeleton["old"])]
    step = records[storage_of(skeleton["step"])]
    data = torch.arange(1000).to(torch.bfloat16)
    assert (record.size, step.size) == (2000, 4)
    with open(target, "r+b") as file:
        os.pwrite(file.fileno(), as_bytes(data), record.start)
        os.pwrite(file.fileno(), struct.pack("<f", 7.0), step.start)
    crcs = {record.start: zlib.crc32(as_bytes(data)), step.start: zlib.crc32(struct.pack("<f", 7))}
    write_crcs(target, crcs)
    loaded = torch.load(target)
    assert torch.equal(loaded["old"], data)
    assert loaded["step"].item() == 7.0
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None


def test_other_records_keep_their_crcs(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save([torch.ones(3), torch.zeros(3)], path)
    before = read_records(path)
    first = next(record for record in before if record.name == "data/0")
    write_crcs(path, {first.start: 0x12345678})
    wanted = [r._replace(crc=0x12345678) if r is first else r for r in before]
    assert read_records(path) == wanted
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "a/data/0"


def test_crcs_of_records_without_a_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "plain.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data/0", b"before")
        archive.writestr("a/data/1", b"others")
    first, _ = read_records(path)
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"behind", first.start)
    write_crcs(path, {first.start: zlib.crc32(b"behind")})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    header = path.read_bytes()[: first.start]
    assert struct.unpack_from("<I", header, 14) == (zlib.crc32(b"behind"),)


# ---- what cannot be converted ---------------------------------------------------------


@dataclass
class Holder:
    held: Any


class Mark:
    """An object without tensors."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mark)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("hide", [Holder, lambda tensor: deque([tensor]), lambda tensor: {tensor}])
def test_hidden_tensors_are_refused(tmp_path: Path, hide: Any) -> None:
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    torch.save({"seen": torch.ones(3), "object": hide(torch.ones(2))}, source)
    with pytest.raises(CheckpointError, match=r"target\.pt holds tensors inside of objects"):
        write_skeleton(read_skeleton(source), target)


def test_objects_without_tensors_are_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "source.pt", tmp_path / "target.pt"
    content: dict[str, Any] = {"seen": torch.ones(3), "object": Holder([1, Mark()]), "mark": Mark()}
    torch.save(content, source)
    skeleton = read_skeleton(source)
    copy_bytes(skeleton, source, write_skeleton(skeleton, target), target)
    loaded = torch.load(target, weights_only=False)
    assert torch.equal(loaded.pop("seen"), content.pop("seen"))
    assert loaded == content


# ---- damage ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "saved.pt"
    torch.save({"a": torch.arange(5.0), "b": [torch.empty(0), torch.ones(2)], "c": 3}, path)
    return path


def test_missing(tmp_path: Path) -> None:
    for read in (read_records, read_skeleton):
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
        read_skeleton(path)


def test_every_truncation(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        for read in (read_records, read_skeleton):
            with pytest.raises(CheckpointError, match="cannot be read"):
                read(saved)


def flips(first: int, stop: int, bits: int) -> Iterator[tuple[int, int]]:
    """Some bits of each byte."""
    randomness = random.Random(0)
    for at in range(first, stop):
        yield from ((at, bit) for bit in randomness.sample(range(8), bits))


def assert_records_are_in_the_file(path: Path) -> None:
    size = path.stat().st_size
    for record in read_records(path):
        assert 0 <= record.start <= record.start + record.size < size


def test_flipped_bits_of_the_directory(saved: Path) -> None:
    content = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        start = archive.start_dir
    errors = 0
    for at, bit in flips(start, len(content), 1):
        saved.write_bytes(flipped(content, at, bit))
        for read in (assert_records_are_in_the_file, read_skeleton):
            with contextlib.suppress(CheckpointError):
                read(saved)
                errors -= 1
            errors += 1
    assert errors > 100


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def test_flipped_bits_of_the_pickle(saved: Path) -> None:
    """They could make anything of it, and some take minutes and all memory."""
    content = saved.read_bytes()
    pickle = next(record for record in read_records(saved) if record.name == "data.pkl")
    for at, bit in flips(pickle.start, pickle.start + pickle.size, 1):
        saved.write_bytes(flipped(content, at, bit))
        with pytest.raises(CheckpointError, match="CRC"):
            read_skeleton(saved)


def test_files_without_crcs(saved: Path) -> None:
    """``torch.serialization.set_crc32_options(False)`` saves files that state none."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, saved)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_skeleton(saved)["a"].shape == (3,)
    assert {record.crc for record in read_records(saved)} == {0}


def test_broken_pickle_in_a_sound_archive(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"no pickle")
        archive.writestr("a/version", b"3")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_skeleton(path)


# ---- more than 4 GiB ------------------------------------------------------------------

GIB = 1 << 30


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "sparse.pt"
    with open(path, "wb") as file:
        file.truncate(GIB)
    if path.stat().st_blocks * 512 > GIB // 2:
        pytest.skip("the file system has no sparse files")
    yield path
    path.unlink()


def test_more_than_4_gib(sparse: Path) -> None:
    large, small = fake_like(torch.float32, 5 * GIB // 4), fake_like(torch.bfloat16, 3)
    records = write_skeleton({"first": small, "large": large, "last": [small[1:]]}, sparse)
    assert sparse.stat().st_size > 5 * GIB
    assert sparse.stat().st_blocks * 512 < 1 << 20
    one, two = records[storage_of(small)], records[storage_of(large)]
    assert (one.size, two.size) == (6, 5 * GIB)
    end = b"end"
    with open(sparse, "r+b") as file:
        os.pwrite(file.fileno(), end, two.start + two.size - 3)
    write_crcs(sparse, {one.start: 0x11111111, two.start: 0x22222222})

    with zipfile.ZipFile(sparse) as archive:
        infos = {info.filename.split("/", 1)[1]: info for info in archive.infolist()}
    assert infos["data/0"].CRC == 0x11111111
    assert (infos["data/1"].CRC, infos["data/1"].file_size) == (0x22222222, 5 * GIB)
    for record, crc in ((one, 0x11111111), (two, 0x22222222)):
        with open(sparse, "rb") as file:  # the descriptor: signature, CRC, sizes
            wide = record is two
            descriptor = os.pread(file.fileno(), 24 if wide else 16, record.start + record.size)
        layout = "<4sIQQ" if wide else "<4sIII"
        assert struct.unpack(layout, descriptor) == (b"PK\x07\x08", crc, record.size, record.size)
    skeleton = read_skeleton(sparse)
    assert tensor_start(skeleton["large"]) == two.start
    assert tensor_start(skeleton["last"][0]) == one.start + 2
    loaded = torch.load(sparse, mmap=True)
    assert bytes(loaded["large"].view(torch.uint8)[-3:].tolist()) == end
