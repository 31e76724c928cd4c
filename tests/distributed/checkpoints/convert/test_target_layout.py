"""The layout from a name is the one that a real engine has."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_groups import MoE, protect_checkpoints
from moe_groups.checkpoints.files import find_checkpoint
from moe_groups.checkpoints.guard.engine_layout import gather_layout
from moe_groups.checkpoints.inference.target_layout import named_target
from moe_groups.checkpoints.layout import FlatGroup, Rank
from moe_groups.checkpoints.read_layout import read_layout
from moe_groups.errors import CheckpointError
from tests.support.checkpoints.made_layouts import columns
from tests.support.models import FFN, HIDDEN, TinyMoE
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import groups_by, start, train

SPLITS: dict[str, tuple[Any, int | None]] = {
    "stock": ("stock", None),
    "parallel_group": ("parallel_group", None),
    "module": ("module", None),
    "expert": ("expert", None),
    "capped": ("parallel_group", 300),
    "capped experts": ("expert", 100),
    "capped stock": ("stock", 200),
}
ALIGNED = {"stage": 2, "contiguous_gradients": True, "parameter_alignment": True}
Columns = dict[Rank, list[FlatGroup]]


class OddMoE(TinyMoE):
    """Parameters with odd numbers of elements, so that aligned ones have gaps."""

    def __init__(self) -> None:
        super().__init__(MoE)
        for block in self.blocks:
            expert = FFN(inner=5)
            block.moe = MoE(HIDDEN, expert, num_experts=4, ep_size=2, min_capacity=0, use_rts=False)
        self.out = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(3))


def save(
    directory: Path, wrapper: str, changes: Mapping[str, Any]
) -> list[tuple[str, Columns | None]]:
    """Save under each split; the layouts of the engines."""
    found = []
    for split in SPLITS:
        forget_process_groups()
        engine = start(wrapper, groups_by(*SPLITS[split]), OddMoE(), **changes)
        protect_checkpoints(engine)  # writes the manifest, also for DeepSpeed's own groups
        train(engine, 1)
        engine.save_checkpoint(str(directory / split))
        layout = gather_layout(engine)
        found.append((split, None if layout is None else columns(layout)))
        engine.destroy()
    return found


def as_files_tell(groups: Columns) -> Columns:
    """DeepSpeed's files have no dtypes."""
    return {
        rank: [
            replace(group, params=tuple(param._replace(dtype=None) for param in group.params))
            for group in own
        ]
        for rank, own in groups.items()
    }


@pytest.mark.parametrize(
    ("wrapper", "changes", "alignment"),
    [
        ("zero2", {}, 1),
        ("bf16", {}, 1),
        ("zero2", {"zero_optimization": ALIGNED}, 8),
    ],
    ids=["ZeRO-2", "BF16_Optimizer", "ZeRO-2, aligned"],
)
def test_equals_the_layout_of_a_real_engine(
    wrapper: str, changes: dict[str, Any], alignment: int, tmp_path: Path
) -> None:
    engines = dict(run_on_ranks(2, save, tmp_path, wrapper, changes, timeout=300)[0])
    aligned = any(
        later.offset > earlier.end
        for groups in engines["stock"].values()
        for group in groups
        for earlier, later in itertools.pairwise(group.params)
    )
    assert aligned == (alignment > 1)
    for saved in SPLITS:
        files = find_checkpoint(tmp_path / saved)
        by_manifest = read_layout(files)
        files.manifest.unlink()
        by_files = read_layout(files)
        assert columns(by_manifest) == engines[saved]
        for wanted, (to, cap) in SPLITS.items():
            options: dict[str, Any] = {"max_group_size": cap, "alignment": alignment}
            assert columns(named_target(by_manifest, to, **options)) == engines[wanted]
            found = named_target(by_files, to, **options)
            assert columns(found) == as_files_tell(engines[wanted]), (saved, wanted)


def save_round_robin(directory: Path) -> None:
    zero = {"stage": 2, "contiguous_gradients": True, "round_robin_gradients": True}
    engine = start("zero2", groups_by("module"), OddMoE(), zero_optimization=zero)
    engine.save_checkpoint(str(directory))


def test_another_order_than_the_models_is_refused(tmp_path: Path) -> None:
    run_on_ranks(2, save_round_robin, tmp_path)
    source = read_layout(find_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match="round_robin_gradients"):
        named_target(source, "expert")
