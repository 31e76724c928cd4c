"""What is written beside a checkpoint, and when it cannot be."""

import errno
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from moe_groups import protect_checkpoints
from moe_groups.checkpoints.files import find_checkpoint
from moe_groups.checkpoints.layout import Layout, Rank
from moe_groups.checkpoints.manifest import FILE_NAME, read_manifest
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.errors import CheckpointWarning
from tests.support.checkpoints.guard_runs import (
    ALIGNED,
    EXPERTS,
    ROUND_ROBIN,
    TAG,
    WRAPPERS,
    Case,
    Odd,
    collected,
    error_of,
    falling,
    on_first_rank,
    refusal_of,
    saved,
    started,
)
from tests.support.models import TinyMoE
from tests.support.pairwise import pairwise
from tests.support.ranks import run_on_ranks
from tests.support.training import groups_by, train

# ---- what is written ------------------------------------------------------------------


def flat_buffers(optimizer: Any) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """The buffers of a wrapper's groups, and the partitions of each."""
    if hasattr(optimizer, "bit16_groups_flat"):
        return optimizer.bit16_groups_flat, optimizer.parallel_partitioned_bit16_groups
    return optimizer.bf16_groups_flat, optimizer.bf16_partitioned_groups


def what_differs(cases: list[Case], folder: Path) -> list[str]:
    """Between what the manifest says of this rank and where the engine's tensors are."""
    problems = []
    for number, case in enumerate(cases):
        engine = case.engine()
        protect_checkpoints(engine)
        engine.save_checkpoint(str(folder / str(number)), tag="here")
        manifest = read_manifest(folder / str(number) / "here" / FILE_NAME)
        try:
            compare(engine, manifest.layout.of(Rank(0, distributed.get_rank())))
        except AssertionError as error:
            problems.append(f"{case}: {error}")
        on_first_rank((folder / str(number) / "here" / FILE_NAME).unlink)
        if not same_layout(read_layout(find_checkpoint(folder / str(number))), manifest.layout):
            problems.append(f"{case}: DeepSpeed's files tell something else")
    return problems


def same_layout(one: Layout, other: Layout) -> bool:
    """In all but what DeepSpeed's files do not say."""
    ranks = [(one.of(rank), other.of(rank)) for rank in other.order]
    return one.fingerprint() == other.fingerprint() and all(
        (a.name, a.parallel_group, a.ep_rank, a.labels, a.options)
        == (b.name, b.parallel_group, b.ep_rank, b.labels, b.options)
        for own, same in ranks
        for a, b in zip(own, same, strict=True)
    )


def compare(engine: Any, groups: list[Any]) -> None:
    optimizer, named = engine.optimizer, dict(engine.module.named_parameters())
    shared = optimizer.real_dp_process_group
    listed_names: list[str] = []
    for index, (group, flat, parts) in enumerate(
        zip(groups, *flat_buffers(optimizer), strict=True)
    ):
        options = optimizer.param_groups[index]
        assert group.name == options["name"]
        assert group.labels.get("expert_group_name") == options.get("expert_group_name")
        assert (group.parallel_group is not None) == bool(options.get("moe"))
        assert list(group.ranks) == distributed.get_process_group_ranks(shared[index])
        assert flat.numel() == group.partition * len(group.ranks)
        for place, part in enumerate(parts):
            start = flat.data_ptr() + place * group.partition * flat.itemsize
            assert (part.data_ptr(), part.numel()) == (start, group.partition)
        for param in group.params:
            tensor = named[param.name]
            assert tensor.data_ptr() == flat.data_ptr() + param.offset * flat.itemsize
            assert (param.shape, param.numel) == (tuple(tensor.shape), tensor.numel())
            assert param.dtype == "bfloat16"
            local = re.search(rf"{EXPERTS}\.(\d+)\.", param.name)
            experts = 4 // int((group.parallel_group or "ep_size_1").split("_")[2])
            assert param.expert == (local and int(local[1]) + group.ep_rank * experts)
            listed_names.append(param.name)
    assert sorted(listed_names) == sorted(named)


ZEROS: dict[str, dict[str, Any]] = {
    "plain": {},
    "round robin": ROUND_ROBIN,
    "aligned": {**ALIGNED, "contiguous_gradients": True},
    "both": ROUND_ROBIN | ALIGNED,
}
ROWS = pairwise(
    {
        "world": [2, 4],
        "wrapper": [*WRAPPERS, "zero2_fp32_grads"],
        "split": ["stock", "parallel_group", "module", "expert"],
        "ep_size": [1, 2],
        "cap": [None, 300],
        "zero": list(ZEROS),
        "odd": [False, True],
    },
    lambda wrapper, zero, **_: wrapper != "bf16" or zero == "plain",
)


@pytest.mark.parametrize("world", [2, 4])
def test_manifest_says_where_the_wrapper_holds_each_parameter(world: int, tmp_path: Path) -> None:
    cases = [
        Case(
            row["wrapper"],
            row["split"],
            row["ep_size"],
            row["cap"],
            ZEROS[row["zero"]],
            Odd if row["odd"] else TinyMoE,
        )
        for row in ROWS
        if row["world"] == world
    ]
    assert run_on_ranks(world, what_differs, cases, tmp_path) == [[]] * world


def files_and_world(folder: Path) -> dict[str, Any]:
    saved("zero1", groups_by("module"), folder)
    content: dict[str, Any] = json.loads((folder / TAG / FILE_NAME).read_text())
    sizes = {
        str(path.relative_to(folder / TAG)): path.stat().st_size
        for path in (folder / TAG).rglob("*")
        if path.name != FILE_NAME
    }
    assert {name: size for name, (size, _) in content["files"].items()} == sizes
    assert len(sizes) == 2 + 8 + 1
    distributed.barrier()
    return content


def test_manifest_says_what_it_belongs_to(tmp_path: Path) -> None:
    content = run_on_ranks(2, files_and_world, tmp_path)[0]
    assert content["wrapper"] == "ZeRO-1"
    assert content["step"] == 2
    assert content["world"] == {"ranks": 2, "data_parallel": 2, "model_parallel": 1}
    assert set(content["versions"]) == {"moe_groups", "deepspeed", "torch"}


def rates_in_manifests(folder: Path) -> list[list[float]]:
    engine = started("zero1", groups_by("module"), lr_scheduler=falling)
    found = []
    for step in range(3):
        train(engine, 1, step)
        engine.save_checkpoint(str(folder))
        layout = read_manifest(folder / f"global_step{step + 1}" / FILE_NAME).layout
        rates = [group.options["lr"] for group in layout.groups]
        assert rates == [engine.optimizer.param_groups[0]["lr"]] * len(rates)
        found.append(rates)
    return found


def test_options_are_those_of_the_save(tmp_path: Path) -> None:
    found = run_on_ranks(2, rates_in_manifests, tmp_path)[0]
    assert len({rates[0] for rates in found}) == 3


# ---- saving -----------------------------------------------------------------------------


def save_twice(folder: Path) -> tuple[str | None, str | None]:
    """Other groups under one tag: which are refused afterwards."""
    for split in ("module", "expert"):
        engine = started("zero1", groups_by(split))
        train(engine, 1)
        engine.save_checkpoint(str(folder), tag="same")
        layout = read_manifest(folder / "same" / FILE_NAME).layout
        assert [g.name for g in layout.of(Rank(0, distributed.get_rank()))] == [
            group["name"] for group in engine.optimizer.param_groups
        ]
        distributed.barrier()
    first, second = (started("zero1", groups_by(split)) for split in ("module", "expert"))
    return refusal_of(first, folder), refusal_of(second, folder)


def test_saving_twice_under_one_tag(tmp_path: Path) -> None:
    for first, second in run_on_ranks(2, save_twice, tmp_path):
        assert first is not None
        assert second is None


def save_in_trouble(kind: str, folder: Path) -> tuple[list[tuple[str, str]], bool]:
    """The warnings, and whether what was saved is loaded right."""
    engine = started("zero1", groups_by("module"))
    train(engine, 2)
    optimizer, rank = engine.optimizer, distributed.get_rank()
    members = optimizer.round_robin_bit16_groups
    if kind == "option":
        optimizer.param_groups[0]["a", "b"] = "no key of JSON"
    elif kind == "value":
        engine.save_checkpoint(str(folder), tag="before")  # the layout is gathered once
        optimizer.param_groups[0]["lr_of_a_fake"] = torch.empty((), device="meta")
    elif rank == 1:  # "one rank" cannot say what its groups are
        optimizer.round_robin_bit16_groups = []
    with collected() as found:
        engine.save_checkpoint(str(folder))
    optimizer.round_robin_bit16_groups = members
    end = train(engine, 2, 2)
    engine = started("zero1", groups_by("module"))
    assert error_of(engine, folder) is None
    return found, train(engine, 2, 2) == end


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (
            "option",
            r"was saved, but moe_groups\.json could not be written \(TypeError: keys must be str",
        ),
        ("value", r"was saved, but moe_groups\.json could not be written \(.*meta tensors"),
        ("one rank", "is not written, as the groups of rank 1 cannot be described: IndexError"),
    ],
)
def test_manifest_that_cannot_be_written(kind: str, why: str, tmp_path: Path) -> None:
    """The checkpoint is there all the same, and a warning says what is missing."""
    answers = run_on_ranks(2, save_in_trouble, kind, tmp_path)
    assert [right for _, right in answers] == [True, True]
    assert [len(found) for found, _ in answers] == [1, 1 if kind == "one rank" else 0]
    for found, _ in answers:
        for text, file in found:
            assert re.search(why, text), text
            assert "can be loaded and converted as one of a run without moe-groups" in text
            assert file == __file__


def save_to_a_folder_that_cannot_be_listed(folder: Path) -> tuple[list[str], list[str]]:
    """The warnings, and what is there besides DeepSpeed's files."""
    engine = started("zero1", groups_by("module"))

    def list_files(directory: Path, tag: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(directory / tag))

    with pytest.MonkeyPatch.context() as patch, collected() as found:
        patch.setattr("moe_groups.checkpoints.guard.guard.list_files", list_files)
        engine.save_checkpoint(str(folder), tag="t")
    ours = [path for path in (folder / "latest", *folder.glob("t/moe_groups*")) if path.exists()]
    return [text for text, _ in found], sorted(path.name for path in ours)


def test_a_save_ends_on_all_ranks_where_the_folder_cannot_be_listed(tmp_path: Path) -> None:
    answers = run_on_ranks(2, save_to_a_folder_that_cannot_be_listed, tmp_path, timeout=30)
    assert [len(texts) for texts, _ in answers] == [1, 0]
    assert "was saved, but cannot be listed ([Errno 116] Stale file handle" in answers[0][0][0]
    assert [names for _, names in answers] == [["latest", "moe_groups.json"]] * 2


def save_with_warnings_as_errors(folder: Path) -> str | None:
    engine = started("zero1", groups_by("module"))
    engine.optimizer.param_groups[0]["a", "b"] = "no key of JSON"
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        try:
            engine.save_checkpoint(str(folder))
        except CheckpointWarning as error:
            return str(error)
    return None


def test_warnings_as_errors_do_not_hang(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, save_with_warnings_as_errors, tmp_path, timeout=60)
    assert first is not None
    assert second is None
