"""Hugging Face's Trainer on two ranks: trained, saved and resumed as through DeepSpeed alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from moe_groups import create_moe_param_groups, describe
from moe_groups._deepspeed.engines import wrapper_name
from moe_groups.checkpoints.manifest import FILE_NAME, read_manifest
from moe_groups.errors import (
    CheckpointMismatchError,
    InvalidArgumentError,
    ParameterInputError,
    VerificationError,
)
from moe_groups.integrations.hf_trainer import MoETrainer
from tests.support.hf_runs import LR, HFConfig, HFModel, by_expert, config, train_plainly, trainer
from tests.support.ranks import (
    forget_process_groups,
    run_in_fresh_processes,
    run_on_ranks,
    run_on_stock,
)
from tests.support.training import largest_difference, weights

EXPERTS: dict[str, Any] = {"group_options": {"split_by": "expert"}}
NAMES = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "bf16": "BF16_Optimizer"}
Both = tuple[float, float, list[str], list[str], list[float]]


def train_both_ways(folder: Path, wrapper: str, blocks: tuple[str, ...]) -> Both:
    run = trainer(folder, config(wrapper, blocks), **EXPERTS)
    untrained = {name: p.detach().float().clone() for name, p in run.model.named_parameters()}
    run.train()
    assert wrapper_name(run.deepspeed) == NAMES[wrapper]
    trained, names = weights(run.deepspeed), [row.name for row in describe(run.deepspeed).rows]
    rates = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    forget_process_groups()
    plain = train_plainly(wrapper, blocks, by_expert)
    plain_names = [row.name for row in describe(plain).rows]
    moved = largest_difference(trained, untrained)
    return moved, largest_difference(trained, weights(plain)), names, plain_names, rates


ALL_BLOCKS = [(), ("optimizer",), ("scheduler",), ("optimizer", "scheduler")]


@pytest.mark.parametrize(
    ("wrapper", "blocks"),
    [("zero2", blocks) for blocks in ALL_BLOCKS]
    + [
        (wrapper, blocks)
        for wrapper in ("zero1", "bf16")
        for blocks in (ALL_BLOCKS[0], ALL_BLOCKS[3])
    ],
)
def test_trains_as_through_deepspeed(wrapper: str, blocks: tuple[str, ...], tmp_path: Path) -> None:
    for found in run_on_ranks(2, train_both_ways, tmp_path, wrapper, blocks, timeout=400):
        moved, difference, names, plain_names, rates = found
        assert difference == 0.0 < moved
        assert names == plain_names
        assert len(set(names)) == len(names) == 10  # dense and four experts, with and without decay
        assert sorted(name for name in names if "expert" in name)[0].startswith("ep_size_2_body.")
        assert max(rates) == pytest.approx(LR)


# ---- checkpoints -----------------------------------------------------------------------


def resume(folder: Path) -> tuple[list[float], bool, str]:
    """Without clipping, which divides by a norm whose sum is ordered by groups."""
    whole = trainer(folder, config("zero2"), clip=0.0, **EXPERTS)
    whole.train()
    wanted = weights(whole.deepspeed)
    saved = folder / "checkpoint-2"
    found = []
    others: list[Any] = [{"max_group_size": 300}, {"split_by": "parallel_group"}]  # more, and fewer
    for options in [EXPERTS, *({"group_options": o, "regroup": "auto"} for o in others)]:
        forget_process_groups()
        run = trainer(folder / "other", config("zero2"), clip=0.0, **options)
        run.train(resume_from_checkpoint=str(saved))
        found.append(largest_difference(wanted, weights(run.deepspeed)))
    forget_process_groups()
    run = trainer(folder / "other", config("zero2"), group_options={"split_by": "module"})
    with pytest.raises(CheckpointMismatchError) as error:
        run.train(resume_from_checkpoint=str(saved))
    says_origins = bool(read_manifest(saved / "global_step2" / FILE_NAME).layout.origins)
    return found, says_origins, error.value.message


@pytest.mark.numeric
def test_resumes_from_trainers_checkpoint(tmp_path: Path) -> None:
    for differences, says_origins, message in run_on_ranks(2, resume, tmp_path, timeout=400):
        assert differences == [0.0] * 3
        assert says_origins
        assert "checkpoint-2 (global_step2) was saved with other groups" in message
        assert "regroup-checkpoint" in message


class SavesOnOneRank(MoETrainer):
    """As with older transformers (5.8), whose Trainer calls _save on rank 0 alone."""

    def _save(self, *args: Any, **options: Any) -> None:
        if self.args.should_save:
            super()._save(*args, **options)


def saved_models(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of this rank, with the numbers of its experts over all ranks."""
    run = trainer(folder, config("zero2"), kind=SavesOnOneRank, **EXPERTS)
    run.args.save_only_model = True
    run.train()
    run.save_model(str(folder / "saved"))
    first, named = 2 * torch.distributed.get_rank(), run.model.state_dict()
    return {
        re.sub(r"(deepspeed_experts)\.(\d)", lambda m: f"{m[1]}.{first + int(m[2])}", name): value
        for name, value in named.items()
    }


@pytest.mark.long
def test_a_saved_model_has_the_experts_of_all_ranks(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, saved_models, tmp_path, timeout=400)
    whole = first | second
    assert len(whole) > len(first)
    for file in (tmp_path / "saved", tmp_path / "checkpoint-4"):
        saved = load_file(file / "model.safetensors")
        assert saved.keys() == whole.keys()
        assert all(torch.equal(saved[name], whole[name]) for name in whole)
    model = HFModel.from_pretrained(tmp_path / "saved", config=HFConfig(), ep_size=1)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


def without_groups(folder: Path, blocks: tuple[str, ...]) -> str:
    run = trainer(folder, config("zero2", blocks), kind=Trainer)
    with pytest.raises((AssertionError, ParameterInputError)) as error:
        run.train()
    return str(error.value)


def test_trainer_alone_fails(tmp_path: Path) -> None:
    """What this is for: Trainer's own optimizer knows no experts."""
    for message in run_on_stock(2, without_groups, tmp_path, ()):
        assert "None of the param groups are marked as MoE" in message


def groups_and_then_none(folder: Path) -> str:
    create_moe_param_groups(nn.Linear(2, 2))  # the library is there from now on
    return without_groups(folder, ())


@pytest.mark.long
def test_trainer_alone_is_told_what_to_do(tmp_path: Path) -> None:
    for message in run_in_fresh_processes(2, groups_and_then_none, tmp_path):
        assert "Make groups with create_moe_param_groups" in message


# ---- what cannot be honoured -----------------------------------------------------------


def lost_rate(folder: Path) -> str:
    options = {"overrides": [("*.expert.0", {"lr": LR / 10})], "split_by": "expert"}
    run = trainer(folder, config("zero2", ("scheduler",)), group_options=options)
    with pytest.raises(VerificationError) as error:
        run.train()
    return str(error.value)


def test_a_rate_that_deepspeeds_scheduler_overwrites_is_told(tmp_path: Path) -> None:
    for message in run_on_ranks(2, lost_rate, tmp_path, timeout=400):
        assert "expert.0" in message
        assert f"lr={LR!r}; given" in message
        assert f"was lr={LR / 10!r}" in message


def muon(folder: Path) -> str:
    block: dict[str, Any] = {"type": "Muon", "params": {"lr": "auto"}}
    run = trainer(folder, config("zero2") | {"optimizer": block})
    with pytest.raises(InvalidArgumentError) as error:
        run.train()
    assert torch.distributed.is_initialized()
    return str(error.value)


def test_a_block_for_which_deepspeed_makes_groups_is_refused(tmp_path: Path) -> None:
    for message in run_on_ranks(2, muon, tmp_path, timeout=400):
        assert '"type": "Muon"' in message
        assert "take the block out" in message
