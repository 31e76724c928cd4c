"""The programs of docs/hf-trainer.md, docs/autoep.md and docs/peft.md, run as a user would."""

import re

import pytest

from tests.distributed.test_demo import run_example
from tests.support import ROOT

EXAMPLES = {
    "hf_trainer_moe.py": ("'loss': '", "ep_size_2_model.layers.1.mlp.expert.1.no_decay", 10),
    "accelerate_moe.py": (": loss ", "ep_size_2_moe.1.expert.1.no_decay", 10),
    "autoep_trainer.py": ("'loss': '", "ep_size_2_model.layers.1.mlp", 4),
    "autoep_accelerate.py": (": loss ", "ep_size_2_model.layers.1.mlp.override.0", 6),
    "trl_lora_zero3.py": ("'loss': '", "dense", 1),
    "peft_experts.py": (": loss ", "ep_size_2_moe.1.expert.1", 5),
}


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    before, group, groups = EXAMPLES[name]
    printed = run_example(name)
    losses = [float(text) for text in re.findall(rf"{before}([\d.]+)", printed)]
    assert len(losses) >= 3
    assert losses[-1] < losses[0]
    assert f"\n{group} " in printed
    assert re.search(rf"\ntotal +{groups} ", printed)


@pytest.mark.parametrize("name", [*EXAMPLES, "balanced_deepseek.py"])
def test_example_is_short(name: str) -> None:
    assert len((ROOT / "docs/examples" / name).read_text().splitlines()) <= 60


@pytest.mark.long
def test_loads_become_even() -> None:
    found = re.findall(r"imbalance ([\d.]+)", run_example("balanced_deepseek.py"))
    assert len(found) == 3
    assert float(found[-1]) < 3  # 4 is the maximum, which it reaches without the bias
