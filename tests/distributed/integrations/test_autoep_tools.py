"""AutoEP under Trainer, TRL, Accelerate and Lightning, with groups that are made before."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    TrainerCallback,
)
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe_groups import (
    create_moe_param_groups,
    describe,
    is_norm_or_bias,
    set_group_options,
    tag_experts,
    verify,
)
from moe_groups._deepspeed.step.lean_step import tile_of
from moe_groups.checkpoints.guard.engine_layout import own_groups, own_origin
from moe_groups.errors import (
    CheckpointMismatchError,
    InvalidArgumentError,
    OverrideError,
    UnmarkedExpertsWarning,
)
from moe_groups.integrations.autoep import autoep_optimizer, tag_autoep_experts
from moe_groups.tags import STEP_OPTIONS
from tests.support.autoep_models import make_model
from tests.support.autoep_runs import (
    Tokens,
    deepspeed_config,
    engine_through,
    full_weights,
    local_difference,
    make_trainer,
    one_process,
    torch_optimizer,
)
from tests.support.hf_runs import start_accelerate
from tests.support.pairwise import Row, label, pairwise
from tests.support.ranks import (
    RankError,
    forget_process_groups,
    run_in_fresh_processes,
    run_on_ranks,
)
from tests.support.training import initialize, largest_difference

pytest.importorskip("deepspeed.module_inject.auto_ep_layer", reason="AutoEP came with 0.19.2")
pytest.importorskip(
    "transformers.utils.output_capturing", reason="the presets of AutoEP need transformers 5"
)

ROWS = pairwise(
    {
        "tool": ["trainer", "trl", "accelerate", "lightning"],
        "wrapper": ["zero1", "zero2", "zero3"],
        "ep_size": [1, 2],
        "block": [False, True],
        "kind": ["mixtral", "qwen3", "deepseek"],
    }
)
CASES = [
    pytest.param(row, marks=[] if row["ep_size"] == 2 else pytest.mark.long, id=label(row))
    for row in ROWS
]


def train_and_compare(row: Row, folder: Path) -> dict[str, Any]:
    engine, losses = engine_through(**row, folder=folder)
    verify(engine)
    wanted, all_losses = one_process(row["kind"], "AdamW" if row["block"] else "SGD")
    mean = row["tool"] in ("trainer", "trl")  # Trainer logs that of all ranks
    rank = distributed.get_rank()
    expected = [sum(both) / 2 if mean else both[rank] for both in all_losses]
    found = {
        "names": [entry.name for entry in describe(engine).rows],
        "loss": max(abs(one - other) for one, other in zip(losses, expected, strict=True)),
        "difference": local_difference(engine, wanted)[0],
        "still": [
            name
            for name, moved in local_difference(engine, make_model(row["kind"]))[1].items()
            if "experts" in name and moved == 0
        ],
    }
    forget_process_groups()
    return found


@pytest.mark.parametrize("row", CASES)
def test_groups_by_layer_train_as_one_process(row: Row, tmp_path: Path) -> None:
    if row["tool"] == "trl":
        pytest.importorskip("trl")
    prefix = "model." if row["tool"] == "lightning" else ""
    layers = [1] if row["kind"] == "deepseek" else [0, 1]
    wanted = [f"ep_size_{row['ep_size']}_{prefix}model.layers.{layer}.mlp" for layer in layers]
    dense = ["dense", "dense.no_decay"] if row["tool"] in ("trainer", "trl") else ["dense"]
    for found in run_on_ranks(2, train_and_compare, row, tmp_path, timeout=60):
        assert found["names"] == dense + wanted
        assert found["still"] == []
        assert found["difference"] <= 1e-6
        assert found["loss"] <= 1e-4 if row["tool"] in ("trainer", "trl") else 1e-6  # 4 digits


LAYER = "*layers.1.mlp*"
GROUPINGS: list[dict[str, Any]] = [
    {"weight_decay": 0.1, "no_decay": is_norm_or_bias},
    {"split_by": "parallel_group"},
    {"overrides": [(LAYER, {"lr": 0.5})]},
    {"overrides": [("*.mlp*", {})], "max_group_size": 9216},  # a rank's part of a layer
]


def early_and_late(grouping: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """``(groups, origin)`` of groups that were made before AutoEP, and of those made afterwards."""
    cfg = deepspeed_config("zero2", 2)
    for early in (True, False):
        model = make_model("mixtral")
        if early:
            tags = tag_autoep_experts(model, cfg)
            assert {tag.place for tag in tags.values()} == {
                ("ep_size_2", f"model.layers.{layer}.mlp", None) for layer in (0, 1)
            }
            optimizer = torch_optimizer("AdamW", create_moe_param_groups(model, **grouping))
        else:
            make = partial(torch_optimizer, "AdamW")
            optimizer = autoep_optimizer(model, make, **grouping)
        engine = initialize(model, optimizer, cfg)
        verify(engine)
        if "overrides" in grouping:
            set_group_options(engine, LAYER, lr=0.25)
            groups = engine.optimizer.param_groups
            changed = [group["name"] for group in groups if group.get(STEP_OPTIONS)]
            assert changed == [
                "dense.model.layers.1.mlp.override.0",  # the router
                "ep_size_2_model.layers.1.mlp.override.0",
            ]
        yield own_groups(engine), own_origin(engine)
        forget_process_groups()


def compare_groups(grouping: dict[str, Any]) -> None:
    (groups, origin), (later, later_origin) = early_and_late(grouping)
    assert groups == later
    assert origin == later_origin
    assert origin


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: "-".join(grouping))
def test_groups_of_before_are_those_of_afterwards(grouping: dict[str, Any]) -> None:
    run_on_ranks(2, compare_groups, grouping, timeout=60)


class Killed(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends the process after two steps, when the checkpoint of the first is there."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}


def train(folder: Path, wrapper: str, kind: str, **options: Any) -> Any:
    """The engine after three steps of MoETrainer; ``killed`` after two, or ``resumed``."""
    resumed = options.pop("resumed", False)
    if options.pop("killed", False):
        options["callbacks"] = [Killed()]
    trainer = make_trainer(
        folder, deepspeed_config(wrapper, 2, "AdamW"), make_model(kind), **options
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resumed else None)
    return trainer.deepspeed


def train_for_weights(*args: Any, **options: Any) -> Any:
    return full_weights(train(*args, **options))


@pytest.mark.long
@pytest.mark.parametrize(("wrapper", "kind"), [("zero2", "mixtral"), ("zero3", "qwen3")])
def test_a_killed_run_resumes_as_if_it_had_gone_on(wrapper: str, kind: str, tmp_path: Path) -> None:
    fresh = partial(run_in_fresh_processes, 2, train_for_weights, tmp_path, wrapper, kind)
    wanted = fresh()
    with pytest.raises(RankError):
        fresh(changes=SAVING, killed=True)
    assert (tmp_path / "checkpoint-1").exists()
    for found, other in zip(fresh(resumed=True), wanted, strict=True):
        assert largest_difference(found, other) == 0


def resume_in_other_groups(folder: Path) -> tuple[float, list[str]]:
    by_layer = train_for_weights(folder, "zero2", "mixtral", changes=SAVING)
    forget_process_groups()
    whole: dict[str, Any] = {"group_options": {"split_by": "parallel_group"}, "resumed": True}
    with pytest.raises(CheckpointMismatchError, match="saved with other groups"):
        train(folder, "zero2", "mixtral", **whole)
    forget_process_groups()
    engine = train(folder, "zero2", "mixtral", **whole, regroup="auto", lean_step="1MiB")
    assert tile_of(engine) == 1 << 20
    found = (
        largest_difference(full_weights(engine), by_layer),
        [r.name for r in describe(engine).rows],
    )
    forget_process_groups()
    return found


def test_a_checkpoint_of_other_groups_is_converted(tmp_path: Path) -> None:
    for difference, names in run_on_ranks(2, resume_in_other_groups, tmp_path, timeout=120):
        assert difference == 0
        assert names == ["dense", "dense.no_decay", "ep_size_2"]


def best_model(folder: Path) -> tuple[float, int]:
    """How far the weights after training are from the best ones; the step of these."""
    changes = SAVING | {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # the untrained model, nearly
    }
    seen: dict[int, Any] = {}

    class Seen(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen[state.global_step] = full_weights(trainer.deepspeed)

    cfg = deepspeed_config("zero2", 2, "AdamW")
    some = torch.utils.data.Subset(Tokens(), range(4))
    trainer = make_trainer(
        folder, cfg, make_model("mixtral"), changes=changes, callbacks=[Seen()], eval_dataset=some
    )
    trainer.train()
    best = int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])
    found = largest_difference(full_weights(trainer.deepspeed), seen[best])
    forget_process_groups()
    return found, best


@pytest.mark.long
def test_the_best_model_is_loaded(tmp_path: Path) -> None:
    for difference, best in run_on_ranks(2, best_model, tmp_path, timeout=60):
        assert difference == 0
        assert best == 1


def refusals() -> None:
    model, cfg = make_model("mixtral"), deepspeed_config("zero2", 2)
    with pytest.raises(InvalidArgumentError, match="does not enable AutoEP"):
        tag_autoep_experts(model, {"expert_parallel": {"enabled": False}})
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        tag_autoep_experts(model, "no/config.json")
    for change, message in (
        ({"autoep_size": 3}, "AutoEP cannot distribute"),
        ({"autoep_size": "2"}, "autoep_size='2': expected"),
        ({"autoep_size": 0}, "autoep_size=0: expected"),
        ({"enabled": "false"}, "enabled='false'"),
    ):
        odd = cfg | {"expert_parallel": cfg["expert_parallel"] | change}
        with pytest.raises(InvalidArgumentError, match=message):
            tag_autoep_experts(model, odd)
    with pytest.raises(InvalidArgumentError, match='"expert_parallel" of the DeepSpeed config is'):
        tag_autoep_experts(model, cfg | {"expert_parallel": True})
    with pytest.raises(InvalidArgumentError, match="AutoEP finds no MoE block"):
        tag_autoep_experts(torch.nn.Linear(2, 2), cfg)
    assert not tag_experts(model)
    # an error while grouping takes the tags back
    with pytest.raises(OverrideError):
        make_trainer(
            Path(),
            cfg,
            model,
            block=False,
            group_options={"overrides": [("no such", {"lr": 1.0})]},
        ).create_optimizer()
    assert not tag_experts(model)
    # without AutoEP nothing marks the experts, and the three ways to do it are named
    del cfg["expert_parallel"]
    with pytest.warns(UnmarkedExpertsWarning, match="AutoEP.*tag_experts.*moe_groups.MoE"):
        make_trainer(Path(), cfg, model, block=False).create_optimizer()
    # nor is there anything to mark in a dense model, with AutoEP or without
    dense = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32))
    for config in (cfg, deepspeed_config("zero2", 2)):
        with pytest.warns(UnmarkedExpertsWarning, match="no MoE layer is found"):
            make_trainer(Path(), config, dense, block=False).create_optimizer()


def test_refusals() -> None:
    run_on_ranks(2, refusals, timeout=60)


def with_adapters(folder: Path, wrapper: str) -> tuple[list[str], set[str]]:
    """Names of the groups, and what of the model has been trained."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    if wrapper == "zero2":
        lora.modules_to_save = ["gate"]
    model: Any = get_peft_model(make_model("mixtral"), lora)
    if wrapper == "zero2":  # thawed
        for name, param in model.named_parameters():
            param.requires_grad_(param.requires_grad or ".experts." in name)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    cfg = deepspeed_config(wrapper, 2, "AdamW")
    if wrapper == "zero3":  # as users had to write it
        cfg["expert_parallel"]["moe_layer_pattern"] = r"base_model\.model\.model\.layers\.\d+\.mlp"
    trainer = make_trainer(folder, cfg, model)
    trainer.train()
    verify(trainer.deepspeed)
    names = [row.name for row in describe(trainer.deepspeed).rows]
    after = full_weights(trainer.deepspeed)
    trainer.save_model(str(folder))
    distributed.barrier()
    saved = load_file(folder / "adapter_model.safetensors")
    # A and B in two layers, and what was trained inside of the layers of AutoEP
    assert len(saved) == (4 + 2 + 4 if wrapper == "zero2" else 4), saved.keys()
    unset_hf_deepspeed_config()
    loaded: Any = PeftModel.from_pretrained(make_model("mixtral"), folder)
    mine = dict(loaded.named_parameters())
    first = distributed.get_rank() * 2
    for name, weight in after.items():
        path = name.replace(".router.gate.", ".gate.modules_to_save.default.")
        if ".experts." not in name:
            assert torch.equal(mine[path], weight), name
        elif name.endswith("w2"):
            whole = mine[name.replace("w2", "down_proj")]
            assert torch.equal(whole[first : first + 2], weight), name
    forget_process_groups()
    return names, {
        name.rpartition(".")[0].rpartition(".")[0].rpartition(".")[2]
        for name, weight in after.items()
        if name not in before or not torch.equal(before[name], weight)
    }


@pytest.mark.parametrize("wrapper", ["zero2", pytest.param("zero3", marks=pytest.mark.long)])
def test_adapters_around_the_model(wrapper: str, tmp_path: Path) -> None:
    for names, trained in run_on_ranks(2, with_adapters, tmp_path, wrapper, timeout=60):
        if wrapper == "zero2":
            assert names == ["dense", *(f"ep_size_2_model.layers.{n}.mlp" for n in (0, 1))]
            assert trained == {"lora_A", "lora_B", "mlp", "router"}
        else:
            assert names == ["dense"]
            assert trained == {"lora_A", "lora_B"}


def from_pretrained_under_zero3(source: Path, folder: Path) -> float:
    """transformers partitions the weights while it loads them."""
    start_accelerate()
    cfg = deepspeed_config("zero3", 2, "AdamW")
    keep = HfDeepSpeedConfig(cfg)
    model = MixtralForCausalLM.from_pretrained(source)
    assert all(hasattr(param, "ds_id") for param in model.parameters())
    trainer = make_trainer(folder, cfg, model)
    trainer.train()
    del keep
    verify(trainer.deepspeed)
    difference = local_difference(trainer.deepspeed, one_process("mixtral", "AdamW")[0])[0]
    forget_process_groups()
    return difference


def test_a_model_that_transformers_has_partitioned(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "source")
    for difference in run_on_ranks(
        2, from_pretrained_under_zero3, tmp_path / "source", tmp_path, timeout=60
    ):
        assert difference <= 1e-6


def train_and_save(folder: Path, wrapper: str, kind: str) -> list[float]:
    """How far the saved model, and that of the checkpoint, are from the engine's weights."""
    changes = {"save_strategy": "steps", "save_steps": 3, "save_only_model": wrapper == "zero2"}
    cfg = deepspeed_config(wrapper, 2, "AdamW")
    trainer = make_trainer(folder, cfg, make_model(kind), changes=changes)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    distributed.barrier()
    names = load_file(folder / "saved" / "model.safetensors").keys()
    inside = {"mixtral": "block_sparse_moe.experts.3.w2", "deepseek": "mlp.experts.3.down_proj"}
    assert f"model.layers.1.{inside[kind]}.weight" in names  # as on the hub
    unset_hf_deepspeed_config()  # which would partition what is loaded
    found = []
    for saved in (folder / "saved", folder / "checkpoint-3"):
        model, info = AutoModelForCausalLM.from_pretrained(
            saved, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values()), info
        found.append(local_difference(trainer.deepspeed, model)[0])
    forget_process_groups()
    return found


@pytest.mark.parametrize(("wrapper", "kind"), [("zero2", "deepseek"), ("zero3", "mixtral")])
def test_trainer_saves_what_it_trained(wrapper: str, kind: str, tmp_path: Path) -> None:
    for differences in run_on_ranks(2, train_and_save, tmp_path, wrapper, kind, timeout=60):
        assert differences == [0.0, 0.0]


def two_stages(folder: Path) -> float:
    """A second Trainer goes on with the model of the first; before, one that only evaluates."""
    data = torch.utils.data.Subset(Tokens(), range(4))
    make_trainer(folder, deepspeed_config("zero3", 2), make_model("mixtral")).evaluate(data)
    forget_process_groups()
    model = make_model("mixtral")
    for _ in range(2):
        trainer = make_trainer(folder, deepspeed_config("zero2", 2, "AdamW"), model)
        trainer.train()
        verify(trainer.deepspeed)
    once, _ = one_process("mixtral", "AdamW")
    difference, _ = local_difference(trainer.deepspeed, one_process("", "AdamW", once)[0])
    forget_process_groups()
    return difference


def test_a_model_goes_through_two_trainers(tmp_path: Path) -> None:
    for difference in run_on_ranks(2, two_stages, tmp_path, timeout=60):
        assert difference <= 1e-6


def warned_of_loss(folder: Path) -> float:
    """With the coefficient that the warning asks for, training is that of one process."""
    model = make_model("mixtral")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    with pytest.warns(UserWarning, match=r"2 times.*router_aux_loss_coef=0.1 set 0.05"):
        make_trainer(folder, deepspeed_config("zero2", 2, "AdamW"), model)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.05
    trainer = make_trainer(folder, deepspeed_config("zero2", 2, "AdamW"), model)
    trainer.train()
    other = make_model("mixtral")
    other.config.output_router_logits, other.router_aux_loss_coef = True, 0.1
    difference, _ = local_difference(trainer.deepspeed, one_process("", "AdamW", other)[0])
    forget_process_groups()
    return difference


def test_the_auxiliary_loss_that_trainer_counts_for_each_rank(tmp_path: Path) -> None:
    for difference in run_on_ranks(2, warned_of_loss, tmp_path, timeout=60):
        assert difference <= 1e-6
