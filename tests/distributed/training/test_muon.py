"""DeepSpeed's Muon over our groups, on real ranks; the oracles are its own split and the SVD."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from moe_groups import MoE, create_moe_param_groups, protect_checkpoints, verify
from moe_groups.checkpoints.guard.engine_layout import own_origin
from moe_groups.errors import CheckpointError, InvalidArgumentError
from moe_groups.groups.muon import is_hidden_matrix, split_for_muon
from tests.distributed.test_demo import run_example
from tests.support.models import HIDDEN, TinyMoE
from tests.support.newton_schulz import ROOM, orthogonalized, rounding_of
from tests.support.ranks import run_on_ranks
from tests.support.training import batches, config, initialize, largest_difference, train, weights

MUON = {"lr": 2e-2, "momentum": 0.95, "weight_decay": 0.1}
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.01}
Groups = list[dict[str, Any]]


def eager(job: Callable[..., Any]) -> Callable[..., Any]:
    """DeepSpeed compiles its Muon, which takes a minute on a CPU."""

    @functools.wraps(job)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return job(*args, **kwargs)

    return run


def is_matrix(name: str, param: torch.Tensor) -> bool:
    """DeepSpeed's own rule, for a model without embeddings."""
    return param.ndim >= 2


def our_groups(model: nn.Module, split_by: Any = "parallel_group", rule: Any = None) -> Groups:
    halves = split_for_muon(model, muon=MUON, adam=ADAM, is_muon=rule)
    return create_moe_param_groups(halves, split_by=split_by)


def muon_engine(model: nn.Module, groups: Groups, cfg: dict[str, Any]) -> Any:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    optimizer = MuonWithAuxAdam(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"foreach": None}
    )
    return initialize(model, optimizer, cfg)


def named_in_config() -> dict[str, Any]:
    """The config's entry from which DeepSpeed builds its Muon."""
    shared = {key: ADAM[key] for key in ("betas", "eps")} | {"momentum": MUON["momentum"]}
    rates = {"muon_lr": MUON["lr"], "adam_lr": ADAM["lr"], "weight_decay": 0.1}
    return {"type": "Muon", "params": {**shared, **rates, "torch_adam": True}}


@eager
def compare_with_deepspeed(wrapper: str, ep_size: int) -> tuple[bool, list[str]]:
    model = TinyMoE(MoE, ep_size=ep_size)
    cfg = config(wrapper, optimizer=named_in_config())
    stock = initialize(model, None, cfg, model_parameters=list(model.parameters()))
    theirs = train(stock, 3), weights(stock)
    assert any(name.startswith("ep_size") for name in map(group_name, stock.optimizer.param_groups))
    model = TinyMoE(MoE, ep_size=ep_size)
    halves = split_for_muon(model, muon=MUON, adam=ADAM | {"weight_decay": 0.1}, is_muon=is_matrix)
    groups = create_moe_param_groups(halves, split_by="parallel_group")
    ours = muon_engine(model, groups, config(wrapper))
    verify(ours)
    history = train(ours, 3)
    equal = history == theirs[0] and largest_difference(weights(ours), theirs[1]) == 0
    return equal, list(map(group_name, ours.optimizer.param_groups))


def group_name(group: dict[str, Any]) -> str:
    return str(group["name"])


@pytest.mark.parametrize(("wrapper", "ep_size"), [("zero1", 2), ("zero2", 2), ("zero2", 1)])
def test_training_equals_that_of_the_split_of_deepspeed(wrapper: str, ep_size: int) -> None:
    experts = f"ep_size_{ep_size}_experts"
    names = ["muon", "adam", f"{experts}.muon", f"{experts}.adam"]
    assert run_on_ranks(2, compare_with_deepspeed, wrapper, ep_size) == [(True, names)] * 2


DENSE_MATRICES = ("inp.weight", "out.weight", "blocks.0.moe.deepspeed_moe.gate.wg.weight")


class FusedModel(TinyMoE):
    """Has, beside DeepSpeed's layers, one with a tensor for both of this rank's experts."""

    def __init__(self) -> None:
        super().__init__(MoE, layers=1, ep_size=2)
        self.fused = Fused()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = super().forward(x + self.fused(x), y)
        return loss


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, HIDDEN, 24) / 4)
        self.up_proj_bias = nn.Parameter(torch.randn(2, 1, 24)[:, 0])
        self.down_proj = nn.Parameter(torch.randn(2, 24, HIDDEN) / 4)
        for param in self.parameters():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = "ep_size_2"  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = torch.einsum("bsh,ehf->besf", x, self.up_proj) + self.up_proj_bias[:, None]
        out: torch.Tensor = torch.einsum("besf,efh->bsh", torch.tanh(up), self.down_proj)
        return out


def error_of_one_step(
    before: torch.Tensor, after: torch.Tensor, gradient: torch.Tensor, muon: bool
) -> float:
    """Of the weights, as a multiple of what rounding makes."""
    from deepspeed.runtime.zero.muon.original_muon import ns_compute_dtype

    options: Any = MUON if muon else ADAM
    lr, weight_decay = float(options["lr"]), float(options["weight_decay"])
    if muon:  # in fp16 where the processor has it, and else in fp32
        gradient = gradient * (1 - MUON["momentum"] ** 2)  # Nesterov momentum of a first step
        update, rounding = orthogonalized(gradient), rounding_of(gradient, ns_compute_dtype("gram"))
    else:
        update, rounding = gradient.double() / (gradient.double().abs() + options["eps"]), 0.0
    expected = before.double() * (1 - lr * weight_decay) - lr * update
    rounding = lr * rounding + torch.finfo(torch.float32).eps * float(
        before.norm() + lr * update.norm()
    )
    return float((after - expected).norm()) / rounding


@eager
def compare_with_svd(wrapper: str) -> dict[str, float]:
    cfg = config(wrapper, gradient_clipping=0.0)
    cfg.pop("bf16"), cfg.pop("data_types")
    model = FusedModel()
    plain = initialize(model, torch.optim.SGD(create_moe_param_groups(model), lr=1.0), cfg)
    ((x, y),) = batches(1)
    plain.backward(plain(x, y))
    parameters = plain.module.named_parameters()
    gradients = {name: safe_get_full_grad(param).clone() for name, param in parameters}
    plain.step()
    plain_norm = plain.get_global_grad_norm()
    model = FusedModel()
    engine = muon_engine(model, our_groups(model, "expert"), cfg)
    verify(engine)
    before = weights(engine)
    norm = train(engine, 1)["norm"][0]
    updates = [orthogonalized(gradients[name]) for name in gradients if name in DENSE_MATRICES]
    assert norm > float(torch.cat([update.flatten() for update in updates]).norm()) > 3 * plain_norm
    errors: dict[str, float] = {}
    params = dict(engine.module.named_parameters())
    for name, after in weights(engine).items():
        muon = name.endswith("weight") and params[name].ndim == 2 and "norm" not in name
        muon = muon or name in ("fused.up_proj", "fused.down_proj")
        assert params[name].use_muon is muon, name
        assert gradients[name].abs().max() > 0, name
        errors[name] = error_of_one_step(before[name], after, gradients[name], muon)
    return errors


@pytest.mark.numeric
@pytest.mark.parametrize("wrapper", ["zero1", "zero2"])
def test_a_step_is_what_the_singular_values_say(wrapper: str) -> None:
    for errors in run_on_ranks(2, compare_with_svd, wrapper):
        assert max(errors.values()) < ROOM, errors
        assert "fused.up_proj" in errors
        assert sum("deepspeed_experts" in name for name in errors) == 2 * 3


@eager
def compare_marks() -> bool:
    """A config that names Muon makes DeepSpeed mark the parameters by its own rule."""
    runs = []
    for changes in ({}, {"optimizer": named_in_config()}):
        model = TinyMoE(MoE, ep_size=2)
        groups = our_groups(
            model, "expert", lambda name, p: p.ndim == 2 and not name.startswith("inp")
        )
        engine = muon_engine(model, groups, config("zero2", **changes))
        runs.append((train(engine, 2), weights(engine)))
    return runs[0][0] == runs[1][0] and largest_difference(runs[0][1], runs[1][1]) == 0


def test_groups_decide_and_not_marks() -> None:
    assert run_on_ranks(2, compare_marks) == [True, True]


@eager
def resume(folder: str) -> tuple[bool, str]:
    def engine(split_by: str) -> Any:
        model = TinyMoE(MoE, ep_size=1)
        return muon_engine(model, our_groups(model, split_by), config("zero2"))

    first = engine("expert")
    train(first, 2)
    first.save_checkpoint(folder)
    assert own_origin(first) is None  # MuonWithAuxAdam sorts its parameters by size
    expected = train(first, 2, first=2), weights(first)
    second = engine("expert")
    second.load_checkpoint(folder)
    verify(second)
    equal = train(second, 2, first=2) == expected[0]
    equal &= largest_difference(weights(second), expected[1]) == 0
    other = engine("module")
    protect_checkpoints(other, regroup="auto")
    with pytest.raises(CheckpointError) as refused:
        other.load_checkpoint(folder)
    return equal, str(refused.value)


def test_resume(tmp_path: Path) -> None:
    for equal, refused in run_on_ranks(2, resume, str(tmp_path)):
        assert equal
        assert "Muon" in refused


def torch_muon() -> None:
    model = TinyMoE(MoE, ep_size=2)
    for name, param in model.named_parameters():
        param.requires_grad_(is_hidden_matrix(name, param))
    optimizer = torch.optim.Muon(create_moe_param_groups(model))
    train(initialize(model, optimizer, config("zero2")), 1)


@eager
def refusals() -> None:
    model = TinyMoE(MoE, ep_size=2)
    named = config("zero2", optimizer=named_in_config())
    with pytest.raises(InvalidArgumentError, match=r"MuonWithAuxAdam\(groups\)"):
        initialize(model, None, named, model_parameters=our_groups(model))
    with pytest.raises(InvalidArgumentError, match=r"torch.optim.Muon .* under ZeRO"):
        torch_muon()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_groups._deepspeed.start.settle_muon", lambda engine, optimizer: None)
        with pytest.raises(ValueError, match="must be a 2D matrix"):  # by torch.optim.Muon.step
            torch_muon()
    model = TinyMoE(MoE, ep_size=2)
    with pytest.raises(ValueError, match="BF16 Muon currently requires"):  # by BF16_Optimizer
        muon_engine(model, our_groups(model), config("bf16"))


def test_what_is_refused_and_by_whom() -> None:
    run_on_ranks(2, refusals)


@pytest.mark.long
def test_example() -> None:
    printed = run_example("muon_moe.py")
    losses = [float(text.split()[0]) for text in printed.split("loss ")[1:]]
    assert losses[-1] < losses[0]
    assert "ep_size_2_moe.0.muon" in printed
