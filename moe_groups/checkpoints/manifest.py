"""``moe_groups.json``: what the groups of a checkpoint were, beside DeepSpeed's files."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from moe_groups._common.json_file import read_json
from moe_groups._common.own_folder import finished_file, is_plain
from moe_groups.checkpoints.kept_state import Kept
from moe_groups.checkpoints.layout import FlatGroup, FlatParam, Layout, Rank
from moe_groups.errors import CheckpointError
from moe_groups.groups.grouping import fingerprint
from moe_groups.groups.origin import Origin, OriginRow
from moe_groups.groups.rules import Variant

FILE_NAME = "moe_groups.json"
UNFINISHED = FILE_NAME + ".unfinished"
"""Is beside it while a checkpoint is saved."""
SCHEMA = 3
"""1 does not say what the groups were made from, 2 has no digests and not the optimizer."""
_FORMAT = "moe-groups manifest"
_END = "\n}\n"
_KNOWN = (
    *("format", "schema", "fingerprint", "checksum", "wrapper"),
    *("optimizer", "params", "ranks", "groups", "origin_params", "origins", "files"),
)
_COLUMNS = ("name", "shape", "dtype", "expert", "offset", "numel")
_ORIGIN_COLUMNS = (
    *("name", "key", "expert_group_name", "expert_number"),
    *("source", "no_decay", "overrides", "dtype"),
)
_WITHOUT = (
    "Without the file, or under another name, the groups are read from DeepSpeed's own files."
)

_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}

T = TypeVar("T")


class SavedFile(NamedTuple):
    """A file as it was when the save ended.

    Attributes:
        size: bytes.
        digest: see :func:`moe_groups.checkpoints.torch_file.digest_of`.
    """

    size: int
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The groups of a run, and what else a reader of its checkpoint wants to know.

    Attributes:
        layout: of all ranks.
        wrapper: who steps: "ZeRO-1", "ZeRO-2", "BF16_Optimizer" or the name of a class.
        about: versions, world sizes and step, for the reader.
        files: each file of the checkpoint by name; empty for a manifest that describes a run and
            no checkpoint.
        optimizer: who kept what of each parameter; None where it is not known.
    """

    layout: Layout
    wrapper: str
    about: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, SavedFile] = field(default_factory=dict)
    optimizer: Kept | None = None


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write the file in one piece: under ``path`` is the old content or all of the new.

    Raises:
        OSError: it cannot be written.
    """
    text = _text(manifest)
    with finished_file(path, path.parent) as part:
        part.write_text(text)


def read_manifest(path: Path) -> Manifest:
    """Read what :func:`write_manifest` wrote.

    Raises:
        CheckpointError: no such file, damaged, or written by a later release.
    """
    content = read_json(path, CheckpointError, _WITHOUT)
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no manifest of moe-groups.")
    _check_schema(path, content)
    try:
        manifest = _parse(content)
        same = manifest.layout.fingerprint() == _as(str, content["fingerprint"])
        same &= _checksum(content) == _as(str, content["checksum"])
        if same:
            _check_origins(manifest.layout)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__} {error}. {_WITHOUT}"
        ) from error
    if not same:
        raise CheckpointError(
            f"{path} was changed after it was written: its checksum does not match. {_WITHOUT}"
        )
    return manifest


def _check_schema(path: Path, content: Mapping[str, Any]) -> None:
    schema, versions = content.get("schema"), content.get("versions")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        writer = versions.get("moe_groups") if isinstance(versions, dict) else None
        raise CheckpointError(
            f"{path} has schema {schema!r}; this release reads up to {SCHEMA}. Install the release "
            f"of moe-groups that wrote it ({writer or 'a later one'})."
        )


def _text(manifest: Manifest) -> str:
    text = "".join(_lines(manifest))
    checksum = _checksum(json.loads(text))
    return f'{text.removesuffix(_END)},\n "checksum": {json.dumps(checksum)}{_END}'


def _checksum(content: Mapping[str, Any]) -> str:
    """Of all values, however they are spaced."""
    values = {key: value for key, value in content.items() if key != "checksum"}
    return fingerprint([json.dumps(values, sort_keys=True)]).hex()


def _lines(manifest: Manifest) -> Iterator[str]:
    """JSON with one parameter, one rank or one file a line, so that it can be read and compared."""
    layout = manifest.layout
    head = {
        "format": _FORMAT,
        "schema": SCHEMA,
        "fingerprint": layout.fingerprint(),
        "wrapper": manifest.wrapper,
        **manifest.about,
        "optimizer": manifest.optimizer and manifest.optimizer._asdict(),
        "params": _COLUMNS,
    }
    yield "{\n"
    for key, value in head.items():
        yield f" {json.dumps(key)}: {json.dumps(value)},\n"
    origins = {id(origin): origin for origin in layout.origins.values()}
    yield ' "ranks": ' + _list(map(json.dumps, _rank_rows(layout, [*origins]))) + ",\n"
    yield ' "groups": [\n'
    for index, group in enumerate(layout.groups):
        yield "  {" + ", ".join(
            f"{json.dumps(key)}: {json.dumps(value)}" for key, value in _group_row(group).items()
        )
        yield ',\n   "params": ' + _list((json.dumps(_param_row(p)) for p in group.params), 4)
        yield "}" + (",\n" if index + 1 < len(layout.groups) else "\n")
    yield f' ],\n "origin_params": {json.dumps(_ORIGIN_COLUMNS)},\n "origins": '
    yield _list(map(_origin_text, origins.values())) + ',\n "files": {'
    files = (f"\n  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(manifest.files.items()))
    yield ",".join(files) + "}" + _END


def _list(rows: Iterator[str], indent: int = 2) -> str:
    lead = "\n" + " " * indent
    return "[" + ",".join(lead + row for row in rows) + "]"


def _rank_rows(layout: Layout, origins: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Ranks with the same groups in the same order share a row. ``origins`` are ids of objects."""
    same: dict[tuple[int, tuple[int, ...], int], list[int]] = {}
    for rank in sorted(layout.order):
        key = rank.model, layout.order[rank], id(layout.origins.get(rank))
        same.setdefault(key, []).append(rank.data)
    for (model, groups, origin), data in same.items():
        row = {"model_parallel_rank": model, "data_parallel_ranks": data, "groups": groups}
        yield row | ({"origin": origins.index(origin)} if origin in origins else {})


def _origin_text(origin: Origin) -> str:
    """One parameter a line; the caller's groups first, of which each parameter has an index."""
    rows = (
        json.dumps([*row[:4], *row.variant, str(row.dtype).removeprefix("torch.")])
        for row in origin.rows
    )
    head = json.dumps({"sources": origin.names, "frozen_experts": origin.frozen_experts})
    return f'{head.removesuffix("}")},\n   "params": {_list(rows, 4)}}}'


def _group_row(group: FlatGroup) -> dict[str, Any]:
    row = {
        "name": group.name,
        "key": group.parallel_group,
        **group.labels,
        "ep_rank": group.ep_rank,
        "model_parallel_rank": group.model_rank,
        "data_parallel_ranks": group.ranks,
        "numel": group.numel,
        "partition": group.partition,
        "options": group.options,
    }
    return {k: value for k, value in row.items() if value is not None or k in group.labels}


def _param_row(param: FlatParam) -> list[Any]:
    return [param.name, param.shape, param.dtype, param.expert, param.offset, param.numel]


_NOT_LABELS = (
    *("name", "key", "ep_rank", "model_parallel_rank", "data_parallel_ranks", "numel"),
    *("partition", "options", "params"),
)


def _parse(content: Mapping[str, Any]) -> Manifest:
    groups = tuple(map(_parse_group, content["groups"]))
    order = {
        Rank(_as(int, row["model_parallel_rank"]), data): _integers(row["groups"])
        for row in content["ranks"]
        for data in _integers(row["data_parallel_ranks"])
    }
    if unknown := {index for own in order.values() for index in own} - {*range(len(groups))}:
        raise IndexError(f"there is no group {min(unknown)}")
    origins = list(map(_parse_origin, content["origins"])) if content["schema"] > 1 else []
    made_from = {
        Rank(row["model_parallel_rank"], data): origins[_as(int, row["origin"])]
        for row in content["ranks"]
        for data in (row["data_parallel_ranks"] if "origin" in row else ())
    }
    about = {key: value for key, value in content.items() if key not in _KNOWN}
    files = {name: _parse_file(row) for name, row in _as(dict, content["files"]).items()}
    if foreign := [name for name in files if not is_plain(name)]:
        raise ValueError(f"{foreign[0]!r} is no file of the checkpoint")
    layout, wrapper = Layout(groups, order, made_from), _as(str, content["wrapper"])
    return Manifest(layout, wrapper, about, files, _parse_kept(content.get("optimizer")))


def _parse_file(row: Any) -> SavedFile:
    size, digest = row if isinstance(row, list) else (row, None)  # before schema 3 the size alone
    return SavedFile(_as(int, size), _maybe(str, digest))


def _parse_kept(row: Any) -> Kept | None:
    if row is None:
        return None
    keys = _maybe(list, _as(dict, row)["keys"])
    return Kept(_maybe(str, row["by"]), None if keys is None else tuple(_as(str, k) for k in keys))


def _parse_group(row: Mapping[str, Any]) -> FlatGroup:
    return FlatGroup(
        name=_as(str, row["name"]),
        ranks=_integers(row["data_parallel_ranks"]),
        params=tuple(map(_parse_param, row["params"])),
        model_rank=_as(int, row["model_parallel_rank"]),
        parallel_group=_maybe(str, row.get("key")),
        ep_rank=_maybe(int, row.get("ep_rank")),
        labels={key: value for key, value in row.items() if key not in _NOT_LABELS},
        options=_as(dict, row["options"]),
    )


def _parse_param(row: Iterable[Any]) -> FlatParam:
    name, shape, dtype, expert, offset, numel = row
    return FlatParam(
        _as(str, name),
        _as(int, numel),
        _as(int, offset),
        None if shape is None else _integers(shape),
        _maybe(str, dtype),
        _maybe(int, expert),
    )


def _parse_origin(content: Mapping[str, Any]) -> Origin:
    names = tuple(_maybe(str, name) for name in _as(list, content["sources"]))
    rows = tuple(map(_parse_origin_row, content["params"]))
    if not {row.variant.source for row in rows} <= {*range(len(names))}:
        raise IndexError("a parameter is of a group that the caller did not give")
    return Origin(rows, names, _as(bool, content["frozen_experts"]))


def _parse_origin_row(row: Iterable[Any]) -> OriginRow:
    name, parallel_group, layer, number, source, no_decay, overrides, dtype = row
    return OriginRow(
        _as(str, name),
        _maybe(str, parallel_group),
        _maybe(str, layer),
        _maybe(int, number),
        Variant(_as(int, source), _as(bool, no_decay), _integers(overrides)),
        _DTYPES[_as(str, dtype)],
    )


def _check_origins(layout: Layout) -> None:
    """What groups were made from are the parameters that they hold, each once."""
    seen = {(layout.order[rank], id(origin)): origin for rank, origin in layout.origins.items()}
    for (own, _), origin in seen.items():
        held = sorted(
            (param.name, layout.groups[index].parallel_group or "")
            for index in own
            for param in layout.groups[index].params
        )
        made_from = sorted((row.name, row.parallel_group or "") for row in origin.rows)
        if held != made_from or len(dict(held)) < len(held):
            raise ValueError("the groups hold other parameters than they were made from")


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(_as(int, value) for value in _as(list, values))


def _maybe(kind: type[T], value: Any) -> T | None:
    return None if value is None else _as(kind, value)


def _as(kind: type[T], value: Any) -> T:
    if type(value) is not kind:  # isinstance takes True for an int
        raise TypeError(f"{value!r} is no {kind.__name__}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError("a number has more than 64 bits")
    return value
