"""Counts and entropy of every kind of router, beside those from its inputs and its weights."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_groups import LossTracker
from tests.support.autoep_models import PRESETS, VOCABULARY, make_model
from tests.support.checkpointed_models import CheckpointedMoE, Way, plain, torchs
from tests.support.models import HIDDEN
from tests.support.ranks import run_on_ranks
from tests.support.training import initialize, make_groups

EXPERTS = 4


MATRICES = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
KEPT = partial(create_selective_checkpoint_contexts, MATRICES)
WAYS: dict[str, Way] = {
    "plain": plain,
    "reentrant": partial(checkpoint, use_reentrant=True),
    "torch": torchs,
    "selective": partial(checkpoint, use_reentrant=False, context_fn=KEPT),
}


def start(kind: str, stage: int, way: str, autoep: bool) -> Any:
    """An engine in fp32, so that equal scores choose equal experts."""
    cfg: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if kind == "moe":
        model: Any = CheckpointedMoE(WAYS[way], num_experts=EXPERTS, ep_size=2)
        return initialize(model, torch.optim.AdamW(make_groups(model, "expert"), lr=1e-2), cfg)
    model = make_model(kind)
    if way != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    if autoep:
        from moe_groups.integrations.autoep import autoep_optimizer

        cfg["expert_parallel"] = {
            "enabled": True,
            "autoep_size": 2,
            "preset_model": PRESETS[kind],
        }
        optimizer: Any = autoep_optimizer(model, lambda groups: torch.optim.AdamW(groups, lr=1e-2))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return initialize(model, optimizer, cfg)


def micro_batches(kind: str, count: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(count):
        if kind == "moe":
            x = torch.randn(2, 8, HIDDEN, generator=generator)
            yield {"x": x, "y": torch.tanh(x)}
        else:
            tokens = torch.randint(VOCABULARY, (2, 8), generator=generator)
            yield {"input_ids": tokens, "labels": tokens}


def loss_of(outputs: Any) -> torch.Tensor:
    loss: torch.Tensor = outputs if isinstance(outputs, torch.Tensor) else outputs.loss
    return loss


def chosen_by_hand(kind: str, logits: list[float]) -> list[int]:
    """The experts of one token; the models of DeepSeek choose in the better half."""
    if kind == "deepseek":
        scores = [1 / (1 + math.exp(-one)) for one in logits]
        return [0, 1] if sum(scores[:2]) > sum(scores[2:]) else [2, 3]
    return sorted(range(EXPERTS), key=lambda n: -logits[n])[: 1 if kind == "moe" else 2]


class ByHand:
    """Collects the inputs of routers; :meth:`take` counts those of the last forward pass."""

    def __init__(self, kind: str, model: nn.Module, names: list[str]) -> None:
        self.kind = kind
        self.inputs: dict[str, torch.Tensor] = {}
        self.routers: dict[str, Any] = {}
        self.counts = {name: [0] * EXPERTS for name in names}
        self.entropies: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            layer: Any = model.get_submodule(name)
            layer = getattr(layer, "deepspeed_moe", layer)
            router = layer.router if hasattr(layer, "router") else layer.gate
            self.routers[name] = router
            router.register_forward_pre_hook(
                lambda _, inputs, name=name: self.inputs.__setitem__(name, inputs[0].detach())
            )

    def take(self) -> None:
        for name, router in self.routers.items():
            part = getattr(router, "gate", getattr(router, "wg", router))
            with deepspeed.zero.GatheredParameters(list(router.parameters())):
                weight = part.weight.detach().double()
            for token in self.inputs[name].flatten(0, -2).double() @ weight.T:
                for number in chosen_by_hand(self.kind, token.tolist()):
                    self.counts[name][number] += 1
                shares = (token - token.logsumexp(0)).exp().tolist()
                self.entropies[name].append(-sum(one * math.log(one) for one in shares))


def counted(kind: str, stage: int, way: str, autoep: bool) -> Any:
    """The report, and by layer the counts and entropies of this rank by hand."""
    engine = start(kind, stage, way, autoep)
    tracker = LossTracker(engine, interval=2)
    hand = ByHand(kind, engine.module, [*tracker._layers])
    reports = []
    for batch in micro_batches(kind, 4):
        loss = loss_of(engine(**batch))
        hand.take()
        engine.backward(loss)
        engine.step()
        engine.eval()
        engine(**batch)  # is not counted
        engine.train()
        with torch.no_grad():
            engine(**batch)  # neither
        reports.append(tracker.step(loss.detach()))
    tracker.close()
    for module in engine.module.modules():
        assert not any("moe_groups.losses" in one.__module__ for one in hooks(module))
    assert reports[:3] == [None] * 3
    return reports[3], hand.counts, hand.entropies


def hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


@pytest.mark.parametrize(
    ("kind", "stage", "way", "autoep"),
    [
        ("moe", 0, "reentrant", False),
        pytest.param("moe", 2, "torch", False, marks=pytest.mark.long),
        ("moe", 1, "selective", False),
        pytest.param("mixtral", 0, "plain", False, marks=pytest.mark.long),
        ("qwen3", 3, "reentrant", False),
        pytest.param("deepseek", 1, "torch", False, marks=pytest.mark.long),
        ("mixtral", 2, "reentrant", True),
        ("qwen3", 3, "torch", True),
        pytest.param("deepseek", 1, "plain", True, marks=pytest.mark.long),
    ],
)
def test_counts_and_entropy(kind: str, stage: int, way: str, autoep: bool) -> None:
    if autoep:
        pytest.importorskip("deepspeed.module_inject.auto_ep_layer", reason="needs 0.19.2")
    if kind != "moe":  # others: tests/pure/losses/test_routers.py
        pytest.importorskip("transformers.utils.output_capturing", reason="needs transformers 5")
    ranks = run_on_ranks(2, counted, kind, stage, way, autoep)
    report = ranks[0][0]
    names = {"moe": "blocks.{}.moe"}.get(kind, "model.layers.{}.mlp")
    k = 1 if kind == "moe" else 2
    numbers = [1] if kind == "deepseek" else [0, 1]
    assert [*report.layers] == [names.format(number) for number in numbers]
    for name, layer in report.layers.items():
        counts = [sum(numbers) for numbers in zip(*(rank[1][name] for rank in ranks), strict=True)]
        entropies = [one for rank in ranks for one in rank[2][name]]
        assert layer.counts == tuple(counts)
        assert sum(counts) == len(entropies) * k == 128 * k
        assert layer.shares == pytest.approx([one / sum(counts) for one in counts])
        assert layer.entropy == pytest.approx(sum(entropies) / len(entropies), abs=1e-6)
        assert layer.dead_experts == counts.count(0)
        assert math.isnan(layer.loss) is math.isnan(layer.dropped) is (kind != "moe")
    assert len(report.as_dict()) == (8 if kind == "moe" else 6)


def losses(way: str, tracked: bool) -> list[float]:
    engine = start("moe", 0, way, False)
    if tracked:
        LossTracker(engine)
    found = []
    for batch in micro_batches("moe", 6):
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("way", ["plain", "selective"])
def test_training_stays_the_same(way: str) -> None:
    """Selective checkpointing gives a repetition the kept results by their number."""
    assert run_on_ranks(2, losses, way, True) == run_on_ranks(2, losses, way, False)
