"""A gate with a bias beside DeepSpeed's own: one of 0 changes no bit, another the choice alone."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.sharded_moe import TopKGate
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_groups import LossTracker, MoE, balance_experts
from moe_groups._deepspeed.layers import GATE_BIAS, give_bias
from moe_groups.errors import CheckpointError, InvalidArgumentError
from tests.support.checkpointed_models import (
    WAYS as CHECKPOINTED,
    CheckpointedMoE,
    Way,
    different,
    gradients,
    initialized,
)
from tests.support.checkpoints.guard_runs import to_universal
from tests.support.models import FFN, HIDDEN
from tests.support.pairwise import Row, few_now, pairwise
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.stage_models import Run, start_run, train_run
from tests.support.training import batches, groups_by, largest_difference, start, weights

EXPERTS = 4
SETTINGS: dict[str, list[Any]] = {
    "k": [1, 2, 3],
    "drop_tokens": [True, False],
    "noisy_gate_policy": [None, "RSample", "Jitter"],
    "use_rts": [True, False],
    "top2_2nd_expert_sampling": [True, False],
    "use_residual": [False, True],
    "capacity_factor": [0.5, 2.0],
    "ep_size": [2, 1],
    "layer": ["ours", "DeepSpeed's"],
    "used": [False, True],
    "training": [True, False],
}
LAYERS: dict[str, Any] = {"ours": MoE, "DeepSpeed's": DeepSpeedMoE}
"""By name, because a row is the test's name too."""


def made(row: Row) -> nn.Module:
    torch.manual_seed(torch.distributed.get_rank())
    options = {key: row[key] for key in SETTINGS if key not in ("layer", "used", "training")}
    layer = LAYERS[row["layer"]](HIDDEN, FFN(), num_experts=EXPERTS, min_capacity=2, **options)
    return initialized(layer).train(row["training"])


def batch(used: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    x = torch.randn(3, 8, HIDDEN, generator=generator)
    return x, (torch.arange(24) % 5 > 0).long() if used else None


def run(layer: nn.Module, used: bool) -> dict[str, Any]:
    torch.manual_seed(7)
    layer.zero_grad()
    x, tokens = batch(used)
    x.requires_grad_()
    y, loss, counts = layer(x, tokens)
    (y.square().sum() + 3 * loss).backward()
    outputs = {"y": y.detach(), "loss": loss.detach(), "counts": counts, "x": x.grad}
    return {**outputs, **gradients(layer), "random": torch.get_rng_state()}


def gate_outputs(layer: Any, x: torch.Tensor, tokens: torch.Tensor | None, sparse: bool) -> Any:
    """Of DeepSpeed's layer since 0.19, which is ``sparse``, or before."""
    torch.manual_seed(7)
    return layer.deepspeed_moe.gate(x.flatten(0, 1), tokens, sparse)


def extended(layer: Any, bias: torch.Tensor) -> Any:
    """DeepSpeed's gate with the bias as the weight of one more input, which is 1."""
    gate = copy.copy(layer.deepspeed_moe.gate)
    wg = nn.Linear(HIDDEN + 1, EXPERTS, bias=False)
    wg.weight.data = torch.cat([gate.wg.weight.data, bias.unsqueeze(1)], dim=1)
    gate._modules = {"wg": wg}
    return gate


def compared(row: Row) -> list[str]:
    """What differs from DeepSpeed's layer with a bias of 0; then checks of another bias."""
    layer: Any = made(row)
    expected = run(layer, row["used"])
    bias = torch.tensor([0.0, 1.5, -1.0, 0.5])
    x, tokens = batch(row["used"])
    with_one = torch.cat([x, torch.ones(3, 8, 1)], dim=-1).flatten(0, 1)
    gate = extended(layer, bias)
    dense = gate_outputs(layer, x, tokens, sparse=False)
    module, name = give_bias(layer)
    changed = different(run(layer, row["used"]), expected)
    assert all(map(torch.equal, gate_outputs(layer, x, tokens, sparse=False), dense))
    if row["noisy_gate_policy"] == "Jitter":
        return changed  # jitter of the one more input would be jitter of the bias
    module.get_buffer(name).copy_(bias)
    loss, capacity, _, indices, locations, weights, counts = gate_outputs(
        layer, x, tokens, sparse=True
    )
    torch.manual_seed(7)
    other = gate(with_one, tokens, True)
    assert capacity == other[1]
    assert torch.equal(indices, other[3])
    assert torch.equal(locations, other[4])
    assert torch.equal(counts, other[6])
    assert not torch.equal(counts, expected["counts"])
    scores = torch.softmax(x.flatten(0, 1) @ layer.deepspeed_moe.gate.wg.weight.T, -1).tolist()
    for token, (chosen, own) in enumerate(
        zip(indices.t().tolist(), weights.t().tolist(), strict=True)
    ):
        kept = [scores[token][expert] if expert >= 0 else 0.0 for expert in chosen]
        total = 1.0 if row["k"] == 1 or not sum(kept) else sum(kept)
        assert own == pytest.approx([one / total for one in kept], abs=1e-6)
    if row["k"] != 2:
        shares = (counts / 24).tolist()
        mean = [sum(one) / 24 for one in zip(*scores, strict=True)]
        by_hand = sum(a * b for a, b in zip(shares, mean, strict=True)) * EXPERTS / row["k"]
        assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    return changed


@pytest.mark.parametrize("row", few_now(pairwise(SETTINGS), 6))
def test_bias_of_zero_changes_nothing_and_another_only_the_choice(row: Row) -> None:
    assert run_on_ranks(2, compared, row) == [[], []]


RATE = 0.25
"""A power of two, so that sums of it are exact."""
MATRICES = [torch.ops.aten.mm.default]
KEPT = partial(create_selective_checkpoint_contexts, MATRICES)
WAYS: dict[str, Way] = {
    **CHECKPOINTED,
    "reentrant": partial(checkpoint, use_reentrant=True),
    "selective": partial(checkpoint, use_reentrant=False, context_fn=KEPT),
}


class ByHand:
    """What gates choose in forward passes between ``on = True`` and ``on = False``."""

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        self.counts: dict[str, torch.Tensor] = {}
        self.biases: dict[str, list[float]] = {}
        for path, module in model.named_modules():
            if isinstance(module, DeepSpeedMoE):
                layer: Any = module
                name = str(getattr(layer, "group_label", None) or path)
                self.counts[name] = torch.zeros(EXPERTS, dtype=torch.long)
                self.biases[name] = [0.0] * EXPERTS
                layer.deepspeed_moe.gate.register_forward_hook(
                    lambda gate, _, outputs, name=name: self.add(name, gate.training, outputs)
                )

    def add(self, name: str, training: bool, outputs: Any) -> None:
        if self.on and training:
            self.counts[name] += torch.bincount(outputs[3].flatten(), minlength=EXPERTS)

    def step(self, group: Any = None) -> dict[str, tuple[int, ...]]:
        """Change the biases, and return the counts of the step."""
        found = {}
        for name, counts in self.counts.items():
            torch.distributed.all_reduce(counts, group=group)
            found[name] = tuple(counts.tolist())
            mean = int(counts.sum()) / EXPERTS
            for number, count in enumerate(counts.tolist()):
                self.biases[name][number] += RATE * ((count < mean) - (count > mean))
            counts.zero_()
        return found


def start_engine(wrapper: str, way: str, ep_size: int = 2, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = CheckpointedMoE(WAYS[way], num_experts=EXPERTS, ep_size=ep_size, k=2)
    return start(wrapper, groups_by("expert"), model, gradient_accumulation_steps=2, **changes)


def two_micro_batches(engine: Any, step: int, hand: ByHand | None = None) -> list[float]:
    losses = []
    torch.manual_seed(step)  # top-2 samples
    hand = hand or ByHand(nn.Module())
    for x, y in batches(2, first=2 * step):
        hand.on = True
        loss = engine(*both(engine, x, y))
        hand.on = False  # what the backward pass repeats does not count
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def both(engine: Any, *data: torch.Tensor) -> list[torch.Tensor]:
    dtype = next(engine.module.parameters()).dtype
    return [one.to(dtype) for one in data]


def by_hand(wrapper: str, way: str) -> list[Any]:
    engine = start_engine(wrapper, way)
    balancer = balance_experts(engine, RATE)
    tracker = LossTracker(engine)
    hand = ByHand(engine.module)
    for step in range(3):
        two_micro_batches(engine, step, hand)
        engine.eval()
        with torch.no_grad():
            engine(*both(engine, *next(batches(1))))  # is not counted
        engine.train()
        tracked = {name: layer.counts for name, layer in tracker.balance().items()}
        assert tracked == hand.step()
        assert {name: bias.tolist() for name, bias in balancer.biases.items()} == hand.biases
        assert all(bias.dtype == torch.float32 for bias in balancer.biases.values())
    return [bias.tolist() for bias in balancer.biases.values()]


@pytest.mark.parametrize(
    ("wrapper", "way"),
    [
        ("zero2", "ours"),
        ("fp32", "selective"),
        ("bf16", "reentrant"),
        pytest.param("zero1", "torch", marks=pytest.mark.long),
        pytest.param("half", "plain", marks=pytest.mark.long),
    ],
)
def test_biases_by_hand(wrapper: str, way: str) -> None:
    first, other = run_on_ranks(2, by_hand, wrapper, way)
    assert first == other
    assert max(map(max, first)) > 0


def resumed(wrapper: str, folder: Path) -> list[Any]:
    engine = start_engine(wrapper, "plain")
    balancer = balance_experts(engine, RATE)
    two_micro_batches(engine, 0)
    engine.save_checkpoint(str(folder))
    saved = [bias.clone() for bias in balancer.biases.values()]
    losses = two_micro_batches(engine, 1)
    straight = weights(engine)
    forget_process_groups()
    engine = start_engine(wrapper, "plain")
    balancer = balance_experts(engine, RATE)
    engine.load_checkpoint(str(folder))
    loaded = [bias.clone() for bias in balancer.biases.values()]
    same = two_micro_batches(engine, 1) == losses
    assert all(map(torch.equal, loaded, saved))
    assert all(bias.dtype == torch.float32 and bias.any() for bias in loaded)
    return [same, largest_difference(weights(engine), straight)]


@pytest.mark.parametrize(
    "wrapper", ["zero2", *(pytest.param(one, marks=pytest.mark.long) for one in ("zero1", "bf16"))]
)
def test_resume_is_the_same(wrapper: str, tmp_path: Path) -> None:
    assert run_on_ranks(2, resumed, wrapper, tmp_path) == [[True, 0.0]] * 2


def with_and_without(folder: Path) -> list[Any]:
    """Checkpoints with biases and without, each in a run of the other kind."""
    engine = start_engine("zero1", "plain")
    two_micro_batches(engine, 0)
    engine.save_checkpoint(str(folder), tag="without")
    balancer = balance_experts(engine, RATE)
    two_micro_batches(engine, 1)
    engine.save_checkpoint(str(folder), tag="with")
    assert all(bias.any() for bias in balancer.biases.values())
    engine.load_checkpoint(str(folder), tag="without")
    begins_at_0 = not any(bias.any() for bias in balancer.biases.values())
    forget_process_groups()
    engine = start_engine("zero1", "plain")
    before = weights(engine)
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(str(folder), tag="with")
    unchanged = largest_difference(weights(engine), before)
    engine.load_checkpoint(str(folder), tag="with", load_module_strict=False)
    balance_experts(engine, RATE).close()
    engine.load_checkpoint(str(folder), tag="with")
    biases = [bias for name, bias in engine.module.named_buffers() if name.endswith(GATE_BIAS)]
    goes_on = [bool(bias.any()) and bias.dtype == torch.float32 for bias in biases]
    copied: Any = copy.deepcopy(engine.module.blocks[0].moe)
    two_micro_batches(engine, 2)  # the balancer is closed
    assert torch.equal(getattr(copied.deepspeed_moe.gate.wg, GATE_BIAS), biases[0])
    return [begins_at_0, unchanged, goes_on, str(error.value)]


def test_checkpoints_with_and_without_biases(tmp_path: Path) -> None:
    begins_at_0, unchanged, goes_on, text = run_on_ranks(2, with_and_without, tmp_path)[0]
    assert begins_at_0
    assert unchanged == 0.0
    assert goes_on == [True, True]
    assert "blocks.0.moe.deepspeed_moe.gate.wg.weight_bias, a bias of a run" in text
    assert "Call balance_experts(engine) before load_checkpoint" in text


def universal(folder: Path) -> str:
    """A universal checkpoint with biases, loaded by a balanced run, and by another."""
    engine = start_engine("zero1", "plain", ep_size=1)
    balancer = balance_experts(engine, RATE)
    two_micro_batches(engine, 0)
    engine.save_checkpoint(str(folder / "saved"), tag="t")
    saved = [bias.clone() for bias in balancer.biases.values()]
    to_universal(folder)
    forget_process_groups()
    engine = start_engine("zero1", "plain", ep_size=1, checkpoint={"load_universal": True})
    before = weights(engine)
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(str(folder / "universal"))
    assert largest_difference(weights(engine), before) == 0.0
    engine.load_checkpoint(str(folder / "universal"), load_module_strict=False)
    balancer = balance_experts(engine, RATE)
    engine.load_checkpoint(str(folder / "universal"))
    assert all(map(torch.equal, balancer.biases.values(), saved))
    assert any(bias.any() for bias in saved)
    return str(error.value)


def test_universal_checkpoints_keep_the_biases(tmp_path: Path) -> None:
    for error in run_on_ranks(2, universal, tmp_path):
        assert "blocks.0.moe.deepspeed_moe.gate.wg.weight_bias, a bias of a run" in error


def pipeline(folder: Path) -> list[Any]:
    """Two stages with three layers each, and one data-parallel rank."""
    run = Run(pp=2, ep=(1,) * 6, micro_batches=2)
    engine = start_run(run)
    balancer = balance_experts(engine, RATE)
    hand = ByHand(engine.module)
    hand.on = True
    for step in range(2):
        train_run(engine, run, 1, first=step)
        hand.step(engine.mpu.get_data_parallel_group())
        assert {name: bias.tolist() for name, bias in balancer.biases.items()} == hand.biases
    engine.save_checkpoint(str(folder))
    saved = {name: bias.clone() for name, bias in balancer.biases.items()}
    losses = train_run(engine, run, 1, first=2)
    engine.load_checkpoint(str(folder))
    assert all(torch.equal(bias, saved[name]) for name, bias in balancer.biases.items())
    assert train_run(engine, run, 1, first=2) == losses
    return [name for name, bias in saved.items() if bias.any()]


def test_pipeline(tmp_path: Path) -> None:
    first, last = run_on_ranks(2, pipeline, tmp_path)
    assert first == ["block0", "block1", "block2"]
    assert last == ["block3", "block4", "block5"]


def stage_without_experts(folder: Path) -> str:
    """It does not load what the other stage refuses."""
    run = Run(pp=2, ep=(0, 0, 1, 1), micro_batches=2)
    engine = start_run(run)
    balance_experts(engine, RATE)
    train_run(engine, run, 1)
    engine.save_checkpoint(str(folder))
    forget_process_groups()
    engine = start_run(run)
    before = {name: param.clone() for name, param in engine.module.named_parameters()}
    with pytest.raises(CheckpointError) as error:
        engine.load_checkpoint(str(folder))
    assert engine.global_steps == 0
    now = dict(engine.module.named_parameters())
    assert all(torch.equal(now[name], param) for name, param in before.items())
    return str(error.value)


def test_a_stage_without_experts_loads_nothing_that_another_refuses(tmp_path: Path) -> None:
    first, last = run_on_ranks(2, stage_without_experts, tmp_path)
    assert first == last
    assert "wg.weight_bias, a bias of a run with balance_experts" in last


class OwnGate(TopKGate):
    """A gate of a user."""


def refusals() -> list[str]:
    found = []
    for change in ("use_tutel", "gate"):
        engine = start_engine("fp32", "plain")
        layer: Any = engine.module.blocks[1].moe.deepspeed_moe
        if change == "gate":
            layer.gate.__class__ = OwnGate
        else:
            layer.use_tutel = True
        with pytest.raises(InvalidArgumentError) as error:
            balance_experts(engine)
        found.append(str(error.value))
        assert not any(name.endswith(GATE_BIAS) for name, _ in engine.module.named_buffers())
        assert type(engine.module.blocks[0].moe.deepspeed_moe.gate) is TopKGate
    return found


def test_refusals() -> None:
    tutel, gate = run_on_ranks(2, refusals)[0]
    assert "cannot balance 'blocks.1.moe': its layer runs on Tutel" in tutel
    assert "cannot balance 'blocks.1.moe': its gate is a OwnGate of your own" in gate
