"""Each stage of a pipeline has groups and files of its own; all are compared and converted."""

from pathlib import Path

import pytest

from moe_groups import regroup_checkpoint
from moe_groups.checkpoints.manifest import read_manifest
from moe_groups.errors import CheckpointMismatchError
from tests.support.checkpoints.made_checkpoints import same, shard_contents
from tests.support.pipeline_runs import start_pipeline, train_pipeline
from tests.support.ranks import run_on_ranks

TAG = "global_step2"


def save(directory: Path, wrapper: str) -> list[float]:
    engine = start_pipeline(wrapper, "module", stages=2)
    train_pipeline(engine, 2)
    engine.save_checkpoint(str(directory))
    return train_pipeline(engine, 2, first=2)


def load(
    directory: Path, wrapper: str, split: str, ep_size: int = 2
) -> list[float] | CheckpointMismatchError:
    engine = start_pipeline(wrapper, split, stages=2, ep_size=ep_size)
    try:
        engine.load_checkpoint(str(directory))
    except CheckpointMismatchError as error:
        return error
    return train_pipeline(engine, 2, first=2)


@pytest.mark.parametrize("wrapper", ["zero1", "bf16"])
def test_stages_are_compared_and_converted(wrapper: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    losses = run_on_ranks(4, save, saved, wrapper)
    assert run_on_ranks(4, load, saved, wrapper, "module") == losses
    refusals = run_on_ranks(4, load, saved, wrapper, "expert")
    assert {type(refusal) for refusal in refusals} == {CheckpointMismatchError}
    assert len({str(refusal) for refusal in refusals}) == 1
    target = refusals[0].target
    layout = read_manifest(Path(target)).layout
    assert layout.model_ranks == [0, 1]
    names = {tuple(group.name for group in layout.of(rank)) for rank in layout.order}
    assert len(names) == 2  # each stage has blocks of its own
    regroup_checkpoint(saved, tmp_path / "made", target)
    regroup_checkpoint(saved, tmp_path / "named", "expert")
    assert read_manifest(tmp_path / "named" / TAG / "moe_groups.json").layout == layout
    assert same(shard_contents(tmp_path / "named"), shard_contents(tmp_path / "made"))
    assert run_on_ranks(4, load, tmp_path / "made", wrapper, "expert") == losses
    regroup_checkpoint(saved, tmp_path / "moved", "expert", ep_size=1)
    moved = run_on_ranks(4, load, tmp_path / "moved", wrapper, "expert", 1)
    for one, other in zip(losses, moved, strict=True):  # bf16 rounds tokens that go another way
        assert other == pytest.approx(one, rel=2**-8)
