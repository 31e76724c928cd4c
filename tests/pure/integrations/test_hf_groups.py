"""Optimizers of Trainer and Accelerate keep their hyperparameters, and get MoE groups."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.utils import DummyOptim
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from moe_groups import MoE, MoEGroupsError, create_moe_param_groups, is_norm_or_bias
from moe_groups.errors import (
    InvalidArgumentError,
    ParameterInputError,
    UnmarkedExpertsWarning,
)
from moe_groups.integrations.accelerate import group_optimizer
from moe_groups.integrations.hf_trainer import MoETrainer
from tests.support.hf_runs import make_model
from tests.support.models import FFN, HIDDEN, TinyMoE

Groups = list[dict[str, Any]]


class TupleToTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.moe = MoE(HIDDEN, FFN(), num_experts=4, ep_size=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.moe(x)[0]
        return out


def llama() -> nn.Module:
    """A model of transformers whose feed-forward networks are MoE layers."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 24, "num_hidden_layers": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, num_attention_heads=2))
    layers: Any = model.get_submodule("model.layers")
    for layer in layers:
        layer.mlp = TupleToTensor()
    return model


def adapted() -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["inp", "up", "down"], bias="lora_only")
    model: nn.Module = peft.get_peft_model(make_model(), config)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"own": make_model, "llama": llama, "LoRA": adapted}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, weight_decay=0.1, adam_beta1=0.8)


def options_of(groups: Groups, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Qualified parameter name to the hyperparameters that it is stepped with."""
    names = {id(param): name for name, param in model.named_parameters()}
    labels = ("params", "name", "moe", "expert_group_name", "expert_number")
    found = [
        (names[id(param)], {k: v for k, v in group.items() if k not in labels})
        for group in groups
        for param in group["params"]
    ]
    assert len(dict(found)) == len(found), "a parameter is in two groups"
    return dict(found)


def contents(groups: Groups) -> list[tuple[str, list[int]]]:
    return [(group["name"], list(map(id, group["params"]))) for group in groups]


# ---- Trainer ---------------------------------------------------------------------------


@models
def test_every_parameter_has_the_options_that_trainer_gives_it(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model, args = build(), arguments(tmp_path)
    theirs = Trainer(model=model, args=args).create_optimizer()
    trainer = MoETrainer(model=model, args=args, group_options={"split_by": "expert"})
    ours = trainer.create_optimizer()
    assert type(ours) is type(theirs)
    found = options_of(ours.param_groups, model)
    assert found == options_of(theirs.param_groups, model)
    decayed = {name for name, options in found.items() if options["weight_decay"] == 0.1}
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert decayed == trainable & set(trainer.get_decay_parameter_names(model))
    assert 0 < len(decayed) < len(found) or build is adapted
    assert trainer.create_optimizer() is ours  # Trainer asks twice


@models
def test_groups_are_those_of_a_model_and_a_rule(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    model = build()
    options: dict[str, Any] = {"split_by": "expert", "max_group_size": 500}
    trainer = MoETrainer(model=model, args=arguments(tmp_path), group_options=options)
    decayed = set(trainer.get_decay_parameter_names(model))
    keeps = {id(param) for name, param in model.named_parameters() if name in decayed}
    plain = create_moe_param_groups(
        model, weight_decay=0.1, no_decay=lambda _, param: id(param) not in keeps, **options
    )
    assert contents(trainer.create_optimizer().param_groups) == contents(plain)


def test_decay_rules_hold_where_deepspeed_makes_the_optimizer(tmp_path: Path) -> None:
    model = make_model()
    trainer = MoETrainer(model=model, args=arguments(tmp_path))
    trainer.optimizer = DummyOptim(params=list(model.parameters()))  # as Trainer does
    groups = trainer.create_optimizer().params
    decayed = set(trainer.get_decay_parameter_names(model))
    for name, options in options_of(groups, model).items():
        assert options == ({} if name in decayed else {"weight_decay": 0.0})
    assert any(group.get("moe") for group in groups)


def test_a_subclass_decides_on_decay_and_overrides_win(tmp_path: Path) -> None:
    class NoDecayInExperts(MoETrainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [n for n in super().get_decay_parameter_names(model) if "experts" not in n]

    model = make_model()
    options = {"overrides": [("*.expert.0", {"lr": 0.5, "weight_decay": 0.3})]}
    trainer = NoDecayInExperts(
        model=model, args=arguments(tmp_path), group_options=options | {"split_by": "expert"}
    )
    found = options_of(trainer.create_optimizer().param_groups, model)
    for name, given in found.items():
        if "experts" in name:
            own = (0.5, 0.3) if "experts.0." in name else (trainer.args.learning_rate, 0.0)
            assert (given["lr"], given["weight_decay"]) == own, name


def test_groups_of_another_trainer_keep_their_options(tmp_path: Path) -> None:
    class OwnRates(Trainer):  # type: ignore[misc, unused-ignore]
        optimizer: Any

        def create_optimizer(self, *args: Any) -> Any:
            if self.optimizer is None:
                moe, rest = self.model.body.blocks, (self.model.body.inp, self.model.body.out)
                groups = [{"params": [*moe.parameters()], "lr": 0.5}]
                groups.append({"params": [p for m in rest for p in m.parameters()]})
                self.optimizer = torch.optim.SGD(groups, lr=0.1)
            return self.optimizer

    class Both(MoETrainer, OwnRates):
        pass

    model, args = make_model(), arguments(tmp_path)
    ours = Both(model=model, args=args, group_options={"split_by": "expert"}).create_optimizer()
    theirs = OwnRates(model=model, args=args).create_optimizer()
    assert options_of(ours.param_groups, model) == options_of(theirs.param_groups, model)
    assert sum(bool(group.get("moe")) for group in ours.param_groups) == 4


@pytest.mark.parametrize("option", ["weight_decay", "no_decay", "max_size"])
def test_options_that_trainer_decides_are_refused(option: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"group_options has {option}: .*split_by"):
        MoETrainer(group_options={option: None})
    with pytest.raises(InvalidArgumentError, match="regroup='no'"):
        MoETrainer(regroup="no")  # type: ignore[arg-type]


# ---- any optimizer ---------------------------------------------------------------------


def test_groups_of_ones_own_keep_their_options() -> None:
    model = TinyMoE(MoE, ep_size=2)
    blocks = list(model.blocks.parameters())
    rest = [*model.inp.parameters(), *model.out.parameters()]
    own: Groups = [{"params": blocks, "lr": 0.5, "mine": 7}]
    optimizer = torch.optim.AdamW([*own, {"params": rest, "betas": (0.1, 0.2)}])
    before = options_of(optimizer.param_groups, model)
    assert group_optimizer(optimizer, model, split_by="expert") is optimizer
    assert options_of(optimizer.param_groups, model) == before
    assert sum(bool(group.get("moe")) for group in optimizer.param_groups) == 4


@pytest.mark.parametrize("named", [False, True])
def test_one_group_and_a_decay_rule(named: bool) -> None:
    model = TinyMoE(MoE, ep_size=2)
    params: Any = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.2)
    group_optimizer(optimizer, model, no_decay=is_norm_or_bias)
    plain = create_moe_param_groups(model, no_decay=is_norm_or_bias)
    assert contents(optimizer.param_groups) == contents(plain)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if "no_decay" in group["name"] else 0.2)


def test_the_parameters_of_a_dummy_may_come_from_a_generator() -> None:
    model = TinyMoE(MoE, ep_size=2)
    dummy = group_optimizer(DummyOptim(model.parameters(), lr=0.1), model)
    assert contents(dummy.params) == contents(create_moe_param_groups(model))
    assert dummy.lr == 0.1


def scheduled(model: nn.Module) -> Any:
    optimizer = torch.optim.AdamW(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return optimizer


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], dict[str, Any], type[Exception], str]] = {
    "a scheduler was made": (
        scheduled,
        {},
        InvalidArgumentError,
        "scheduler was made from this AdamW.*group the optimizer first",
    ),
    "another model": (
        lambda _: torch.optim.AdamW(TinyMoE(MoE, ep_size=2).parameters()),
        {},
        ParameterInputError,
        r"group 0 of the optimizer has a parameter of shape \(16, 16\).*not in the model",
    ),
    "weight decay": (
        lambda model: torch.optim.AdamW(model.parameters()),
        {"weight_decay": 0.1},
        InvalidArgumentError,
        "weight_decay cannot be given.*give it to the optimizer",
    ),
    "a bad override": (
        lambda model: torch.optim.AdamW(model.parameters()),
        {"overrides": [("nothing", {"lr": 1})]},
        MoEGroupsError,
        "'nothing' match no trainable parameter",
    ),
    "no optimizer": (lambda model: model, {}, InvalidArgumentError, "a TinyMoE cannot be grouped"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_optimizer_alone(case: str) -> None:
    make, options, error, message = REFUSED[case]
    model = TinyMoE(MoE, ep_size=2)
    optimizer = make(model)
    before = [dict(group) for group in getattr(optimizer, "param_groups", [])]
    with pytest.raises(error, match=message):
        group_optimizer(optimizer, model, **options)
    assert [dict(group) for group in getattr(optimizer, "param_groups", [])] == before
    # the model has not been tagged either
    assert all(getattr(p, "expert_group_name", None) is None for p in model.parameters())


def test_a_second_grouping_is_refused() -> None:
    model = make_model()
    optimizer = group_optimizer(torch.optim.AdamW(model.parameters()), model)
    names = [group["name"] for group in optimizer.param_groups]
    with pytest.raises(InvalidArgumentError, match="has groups of moe-groups already"):
        group_optimizer(optimizer, model, split_by="expert")
    assert [group["name"] for group in optimizer.param_groups] == names


@pytest.mark.parametrize("both", [True, False])
def test_an_optimizer_or_scheduler_of_ones_own_is_refused(both: bool, tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, float)
    with pytest.raises(InvalidArgumentError, match="override create_optimizer"):
        MoETrainer(
            model=model,
            args=arguments(tmp_path),
            optimizers=(optimizer if both else None, scheduler),
        )


def test_a_class_of_optimizers_is_kept(tmp_path: Path) -> None:
    model, kind = make_model(), (torch.optim.SGD, {"lr": 1e-5, "momentum": 0.5})
    trainer = MoETrainer(model=model, args=arguments(tmp_path), optimizer_cls_and_kwargs=kind)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.SGD
    assert {(group["lr"], group["momentum"]) for group in optimizer.param_groups} == {(1e-5, 0.5)}
    assert any(group.get("moe") for group in optimizer.param_groups)
    trainer.optimizer = DummyOptim(params=list(model.parameters()))  # as Trainer does for a block
    with pytest.raises(InvalidArgumentError, match="name two optimizers"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    "make_groups",
    [
        create_moe_param_groups,
        lambda model: create_moe_param_groups(model.named_parameters(), split_by="expert"),
        lambda model: (
            group_optimizer(
                torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), model
            ).param_groups
        ),
    ],
    ids=["module", "named", "optimizer"],
)
def test_frozen_experts_are_in_no_group(make_groups: Callable[[nn.Module], Groups]) -> None:
    model = TinyMoE(MoE, ep_size=2)
    model.blocks.requires_grad_(False)
    (group,) = make_groups(model)
    assert group["name"] == "dense"
    assert "moe" not in group
    trained = [*model.inp.parameters(), *model.out.parameters()]
    assert list(map(id, group["params"])) == list(map(id, trained))


@pytest.mark.parametrize(
    ("module", "package"), [("accelerate", "accelerate"), ("hf_trainer", "transformers")]
)
def test_a_missing_package_names_the_extra(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python itself does for a missing one
    monkeypatch.delitem(sys.modules, f"moe_groups.integrations.{module}")
    with pytest.raises(InvalidArgumentError, match=rf"need {package}.*pip install .*\[hf\]"):
        importlib.import_module(f"moe_groups.integrations.{module}")


def test_a_model_of_transformers_is_warned_of(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_local_experts=2))
    with pytest.warns(UnmarkedExpertsWarning, match=r"mlp\.experts.* looks like one"):
        group_optimizer(torch.optim.AdamW(model.parameters()), model)
    trainer = MoETrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    with pytest.warns(UnmarkedExpertsWarning, match="tag_experts"):
        trainer.create_optimizer()
