"""Biases of experts beside those by hand, in checkpoints, and what they do to loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from moe_groups import LossTracker, balance_experts
from moe_groups.errors import InvalidArgumentError
from moe_groups.integrations.autoep import autoep_optimizer
from tests.support.autoep_models import PRESETS, VOCABULARY, make_model
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import initialize, largest_difference

pytest.importorskip(
    "deepspeed.module_inject.auto_ep_layer", reason="DeepSpeed before 0.19.2 has no AutoEP"
)
pytest.importorskip(
    "transformers.utils.output_capturing", reason="the presets of AutoEP need transformers 5"
)
EXPERTS, RATE = 4, 0.01


def start(kind: str, stage: int, autoep: bool, lr: float = 1e-2, **changes: Any) -> Any:
    """An engine in bf16, whose biases have to be fp32."""
    cfg: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    model = make_model(kind)
    if not autoep:
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=lr)
        return initialize(model, optimizer, cfg | changes)
    cfg["expert_parallel"] = {"enabled": True, "autoep_size": 2, "preset_model": PRESETS[kind]}
    optimizer = autoep_optimizer(model, lambda groups: torch.optim.AdamW(groups, lr=lr))
    return initialize(model, optimizer, cfg | changes)


def train(engine: Any, steps: range, factor: float = 1.0) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(2):
            seed = 100 * step + 10 * micro + torch.distributed.get_rank()
            generator = torch.Generator().manual_seed(seed)
            tokens = torch.randint(VOCABULARY, (2, 8), generator=generator)
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss * factor)
            engine.step()
            losses.append(float(loss.detach()))
    return losses


class Chosen:
    """What routers return in training, by layer."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self.counts = {name: torch.zeros(EXPERTS, dtype=torch.long) for name in layers}
        for name in layers:
            layer: Any = model.get_submodule(name)
            router = layer.router if hasattr(layer, "router") else layer.gate
            router.register_forward_hook(
                lambda module, _, outputs, name=name: self.add(module, outputs, name)
            )

    def add(self, module: nn.Module, outputs: Any, name: str) -> None:
        indices = next(one for one in outputs if not one.is_floating_point())
        if module.training:
            self.counts[name] += torch.bincount(indices.flatten(), minlength=EXPERTS)


def two_steps(kind: str, stage: int, autoep: bool, zero_mean: bool) -> list[Any]:
    engine = start(kind, stage, autoep)
    balancer = balance_experts(engine, RATE, zero_mean=zero_mean, first_step=2, last_step=3)
    expected = {name: [0.0] * EXPERTS for name in balancer.biases}
    chosen = Chosen(engine.module, [*expected])
    for step in range(4):
        train(engine, range(step, step + 1))
        engine.eval()
        with torch.no_grad():
            engine(input_ids=torch.zeros(2, 8, dtype=torch.long))  # is not counted
        engine.train()
        for name, counts in chosen.counts.items():
            torch.distributed.all_reduce(counts)
            mean = int(counts.sum()) / EXPERTS
            if step in (1, 2):
                for number, count in enumerate(counts.tolist()):
                    expected[name][number] += RATE * ((count < mean) - (count > mean))
                if zero_mean:
                    shift = sum(expected[name]) / EXPERTS
                    expected[name] = [one - shift for one in expected[name]]
            counts.zero_()
            bias = balancer.biases[name]
            assert bias.dtype == torch.float32
            assert bias.tolist() == pytest.approx(expected[name], abs=1e-7)
            assert (step == 0) <= (bias.abs().max() == 0)
            assert (step == 1) <= (bias.abs().max() > 0)
    found = [bias.clone() for bias in balancer.biases.values()]
    balancer.close()
    train(engine, range(4, 5))
    assert all(map(torch.equal, found, balancer.biases.values()))
    return [bias.tolist() for bias in found]


@pytest.mark.parametrize(
    ("kind", "stage", "autoep", "zero_mean"),
    [
        ("mixtral", 2, True, False),
        ("qwen3", 3, True, True),
        pytest.param("deepseek", 1, True, False, marks=pytest.mark.long),
        ("deepseek", 0, False, True),
        pytest.param("deepseek", 3, False, False, marks=pytest.mark.long),
    ],
)
def test_biases_by_hand(kind: str, stage: int, autoep: bool, zero_mean: bool) -> None:
    first, other = run_on_ranks(2, two_steps, kind, stage, autoep, zero_mean)
    assert first == other


def masters(engine: Any) -> dict[str, torch.Tensor]:
    named = engine.module.named_parameters()
    return {name: safe_get_full_fp32_param(param).clone() for name, param in named}


def resumed(kind: str, stage: int, autoep: bool, folder: Path) -> list[Any]:
    engine = start(kind, stage, autoep)
    balancer = balance_experts(engine, RATE)
    train(engine, range(2))
    engine.save_checkpoint(str(folder))
    straight = train(engine, range(2, 4)), masters(engine), balancer.biases
    forget_process_groups()
    engine = start(kind, stage, autoep)
    balancer = balance_experts(engine, RATE)
    engine.load_checkpoint(str(folder))
    losses = train(engine, range(2, 4))
    assert all(bias.dtype == torch.float32 for bias in balancer.biases.values())
    same = list(map(torch.equal, balancer.biases.values(), straight[2].values()))
    return [losses == straight[0], largest_difference(masters(engine), straight[1]), same]


@pytest.mark.parametrize(
    ("kind", "stage", "autoep"),
    [
        ("mixtral", 2, True),
        pytest.param("deepseek", 1, True, marks=pytest.mark.long),
        ("deepseek", 2, False),
        pytest.param("deepseek", 3, False, marks=pytest.mark.long),
    ],
)
def test_resume_is_the_same(kind: str, stage: int, autoep: bool, tmp_path: Path) -> None:
    for losses, difference, same in run_on_ranks(2, resumed, kind, stage, autoep, tmp_path):
        assert losses
        assert difference == 0.0
        assert same == [True] * len(same) != []


def weights_of(kind: str, autoep: bool) -> list[Any]:
    """Of a router with a large bias: who is chosen, and its weights and those of the scores."""
    engine = start(kind, 0 if kind == "deepseek" else 1, autoep)
    balancer = balance_experts(engine, RATE)
    (bias, *_) = balancer.biases.values()
    (name, *_) = balancer.biases
    layer: Any = engine.module.get_submodule(name)
    router = layer.router if autoep else layer.gate
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    seen: list[Any] = []
    router.register_forward_hook(lambda *given: seen.append(given[-1]))
    found = []
    for favoured in ([0.0] * EXPERTS, [0.0, 5.0, 0.0, 4.0]):
        bias.copy_(torch.tensor(favoured))
        layer(x.view(2, 32, 32))
        outputs = seen.pop()
        logits = router.gate(x).float() if autoep else outputs[0].float()
        weights, chosen = outputs[:2] if autoep else outputs[1:]
        scores = logits.sigmoid() if kind == "deepseek" else logits.softmax(-1)
        own = scores.gather(1, chosen)
        own = own / own.sum(-1, keepdim=True) * getattr(router, "route_scale", 1.0)
        own = own * getattr(router, "routed_scaling_factor", 1.0)
        found.append(sorted(set(chosen.flatten().tolist())))
        assert torch.allclose(weights.float(), own, atol=1e-6)
    return found


@pytest.mark.parametrize(
    ("kind", "autoep"), [("mixtral", True), ("deepseek", True), ("deepseek", False)]
)
def test_weights_do_not_have_the_bias(kind: str, autoep: bool) -> None:
    before, after = run_on_ranks(2, weights_of, kind, autoep)[0]
    assert before == [0, 1, 2, 3]
    if kind == "mixtral":
        assert after == [1, 3]


def skipped() -> list[Any]:
    """Biases after a step, after one that overflows, and after another."""
    engine = start("mixtral", 2, True, bf16={"enabled": True, "check_grad_overflow": True})
    balancer = balance_experts(engine, RATE)
    found = []
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        train(engine, range(step, step + 1), factor)
        found.append([bias.tolist() for bias in balancer.biases.values()])
    return [engine.skipped_steps, *found]


def test_skipped_steps_change_nothing() -> None:
    number, first, second, third = run_on_ranks(2, skipped)[0]
    assert number == 1
    assert first == second != third


def imbalances(balanced: bool) -> list[float]:
    """Of 30 steps with a router that prefers experts 0 and 1, and weights that stay."""
    engine = start("deepseek", 1, False, lr=0.0)
    router: Any = engine.module.get_submodule("model.layers.1.mlp.gate")
    router.e_score_correction_bias.copy_(torch.tensor([0.05, 0.05, 0.0, 0.0]))
    tracker = LossTracker(engine, interval=10)
    if balanced:
        balance_experts(engine, RATE / 4)
    found = []
    for step in range(30):
        train(engine, range(step, step + 1))
        if step % 10 == 9:
            found.append(max(layer.imbalance for layer in tracker.balance().values()))
    return found


@pytest.mark.long
def test_imbalance_falls() -> None:
    without, balanced = (run_on_ranks(2, imbalances, one)[0] for one in (False, True))
    assert balanced[-1] < 1.2 < without[-1]


def refusals() -> list[str]:
    found = []
    engines = [start("mixtral", 1, False)]
    dense = nn.Linear(2, 2)
    engines.append(
        initialize(
            dense,
            torch.optim.SGD(dense.parameters(), lr=0.1),
            {"train_micro_batch_size_per_gpu": 2},
        )
    )
    for engine in engines:
        buffers = dict(engine.module.named_buffers())
        with pytest.raises(InvalidArgumentError) as error:
            balance_experts(engine)
        found.append(str(error.value))
        assert dict(engine.module.named_buffers()).keys() == buffers.keys()
        assert "_take_model_step" not in vars(engine)
    engine = start("deepseek", 1, False)
    balancer = balance_experts(engine)
    with pytest.raises(InvalidArgumentError, match="are balanced already"):
        balance_experts(engine)
    balancer.close()
    balance_experts(engine).close()
    assert "_take_model_step" not in vars(engine)
    return found


def test_refusals() -> None:
    mixtral, dense = run_on_ranks(2, refusals)[0]
    assert "cannot balance 'model.layers.0.mlp': MixtralTopKRouter has no buffer" in mixtral
    assert "found no router" in dense
