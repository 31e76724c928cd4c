"""Pipeline, tensor, expert and data parallelism together: same training, whoever holds what."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from moe_groups import LossTracker, MoE, inspect_checkpoint, regroup_checkpoint, verify
from moe_groups.errors import CheckpointError, CheckpointWarning, InvalidArgumentError
from moe_groups.tags import is_expert_parameter
from tests.support.models import TinyMoE
from tests.support.ranks import forget_process_groups, run_in_fresh_processes
from tests.support.stage_models import COEFFICIENT, Run, start_run, train_run
from tests.support.training import NORM_TOLERANCE, config, initialize, make_groups, train

pytestmark = pytest.mark.long  # in processes of their own: a grid makes dozens of process groups

WORLD = 4
TWO = (2,) * 8
ONLY_LAST = (0, 0, 0, 0, 0, 2, 1, 0)
"""No MoE layer on the first of two stages."""
MIXED = (1, 2, 0, 1, 0, 0, 0, 2)
"""Two expert-parallel sizes, and another number of layers on each stage."""

TOPOLOGIES = [
    Run(pp=2),
    Run(tp=2),
    Run(ep=TWO),
    Run(pp=2, ep=TWO),
    Run(pp=2, tp=2),
    Run(tp=2, ep=TWO),
    Run(pp=2, tp=2, ep=TWO),
    Run(pp=4),
    Run(tp=2, ep=TWO, expert_tp=True),
    Run(ep=TWO, data_first=True),
]


def name(run: Run) -> str:
    changed = {k: v for k, v in run._asdict().items() if v != Run._field_defaults[k]}
    return " ".join(f"{key}={value}" for key, value in changed.items()) or "dp"


def histories(runs: list[Run], steps: int) -> list[list[float]]:
    """The losses of each run, and the norm of its last gradient."""
    found = []
    for run in runs:
        forget_process_groups()
        engine = start_run(run)
        found.append([*train_run(engine, run, steps), float(engine.get_global_grad_norm())])
        verify(engine)
    return found


def on_ranks(runs: list[Run], steps: int) -> list[list[float]]:
    """:func:`histories`, which all ranks have in common."""
    found = run_in_fresh_processes(WORLD, histories, runs, steps, timeout=300)
    assert all(other == found[0] for other in found)
    first: list[list[float]] = found[0]
    return first


# ---- the same training under every topology -------------------------------------------


def losses(runs: list[Run], steps: int) -> list[dict[str, list[float]]]:
    """The losses of each run in each step, apart."""
    found = []
    for run in runs:
        forget_process_groups()
        engine = start_run(run)
        in_loss = run.plain or run.carry == "carry"
        tracker = LossTracker(engine, coefficient=COEFFICIENT, interval=1, in_loss=in_loss)
        reports: list[Any] = [
            tracker.step(train_run(engine, run, 1, first=step)[0]) for step in range(steps)
        ]
        found.append({kind: [getattr(r, kind) for r in reports] for kind in TOLERANCES})
    return found


TOLERANCES = {"total": 0.03, "lm": 0.06, "aux": 0.03}
"""Relative: bf16 rounds, which now and then sends a token to another expert."""


@pytest.mark.parametrize("steps", [30])
def test_topologies_agree(steps: int) -> None:
    runs = [*TOPOLOGIES, Run(pp=2, tp=2, ep=TWO, carry="attach")]
    ranks = run_in_fresh_processes(WORLD, losses, [Run(plain=True), *runs], steps, timeout=900)
    assert all(found == ranks[0] for found in ranks)
    reference, *others = ranks[0]
    assert reference["lm"][-1] < 0.5 * reference["lm"][0]
    for run, found in zip(runs, others, strict=True):
        for kind, tolerance in TOLERANCES.items():
            expected = pytest.approx(reference[kind], rel=tolerance)
            assert found[kind] == expected, f"{kind} of {name(run)}"


@pytest.mark.parametrize("ep", [ONLY_LAST, MIXED], ids=["a stage without experts", "mixed"])
def test_stages_that_differ(ep: tuple[int, ...]) -> None:
    """DeepSpeed hangs there: its stages have to have the same groups."""
    runs = [
        Run(plain=True, ep=ep),
        Run(pp=2, ep=ep, split="expert"),
        Run(pp=2, ep=ep, wrapper="zero1", split="module"),
        Run(pp=2, ep=ep, wrapper="zero1", split="parallel_group", cap=1000),
    ]
    reference, *others = on_ranks(runs, 4)
    for run, history in zip(runs[1:], others, strict=True):
        assert history[:4] == pytest.approx(reference[:4], rel=0.03), name(run)
        assert history[4] == pytest.approx(reference[4], rel=0.03), name(run)


@pytest.mark.parametrize("ep", [(1,) * 8, TWO], ids=["EP 1", "EP 2"])
def test_norm_counts_experts_of_all_tensor_parallel_ranks(ep: tuple[int, ...]) -> None:
    """ZeRO's leaves out those of the second rank, with DeepSpeed's own split too."""
    runs = [Run(plain=True, ep=ep), Run(tp=2, ep=ep), Run(tp=2, ep=ep, wrapper="zero1")]
    norms = [history[-1] for history in on_ranks(runs, 1)]
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=0.01)


def squares(run: Run) -> tuple[float, float, float, float]:
    """The norm's square; those of dense gradients, of cut ones, and of copies in experts."""
    engine = start_run(run)
    original = engine.optimizer.step
    found = {"dense": 0.0, "cut": 0.0, "copies": 0.0}

    def step(*args: Any, **kwargs: Any) -> Any:
        for _, param in engine.module.named_parameters():
            expert = "copies" if is_expert_parameter(param) else "dense"
            kind = "cut" if getattr(param, "model_parallel", False) else expert
            found[kind] += float(safe_get_full_grad(param).float().square().sum())
        return original(*args, **kwargs)

    engine.optimizer.step = step
    train_run(engine, run, 1)
    norm = float(engine.get_global_grad_norm())
    return norm**2, found["dense"], found["cut"], found["copies"]


def test_norm_counts_copies_in_cut_experts_once() -> None:
    """What tensor parallelism does not cut of an expert is the same on all its ranks."""
    run = Run(tp=2, ep=TWO, expert_tp=True, wrapper="zero1", micro_batches=2)
    ranks = run_in_fresh_processes(WORLD, squares, run)
    for norm, *_ in ranks:
        dense, cut = ranks[0][1], sum(rank[2] for rank in ranks)
        copies = sum(rank[3] for rank in ranks[::2])  # of the first tensor-parallel rank
        assert copies > 0.01 * norm
        assert norm == pytest.approx(dense + cut + copies, rel=1e-3)


@pytest.mark.parametrize("run", TOPOLOGIES, ids=name)
def test_hierarchical_groups_train_as_deepspeeds(run: Run) -> None:
    ours, stock = on_ranks([run._replace(split=split) for split in ("expert", "stock")], 3)
    assert ours[:3] == stock[:3]


def tied_weights(run: Run) -> tuple[list[float], Any, list[int]]:
    """Losses, the tied weight, and in how many groups it is."""
    forget_process_groups()
    engine = start_run(run)
    ((_, weight),) = [(n, p) for n, p in engine.module.named_parameters() if p.shape == (16, 16)]
    copies_in_groups = [sum(p is weight for p in group) for group in engine.optimizer.bf16_groups]
    return train_run(engine, run, 4), weight.detach().float(), copies_in_groups


@pytest.mark.parametrize("carry", ["attach", "carry"])
def test_tied_layers_are_in_one_group_on_each_side_and_stay_equal(carry: str) -> None:
    run = Run(ep=TWO, tied=True, carry=carry, split="expert")
    reference = run_in_fresh_processes(WORLD, tied_weights, run._replace(plain=True))[0]
    ranks = run_in_fresh_processes(WORLD, tied_weights, run._replace(pp=2))
    for history, weight, copies_in_groups in ranks:
        assert sorted(copies_in_groups)[-2:] == [0, 1]
        assert torch.equal(weight, ranks[0][1])
        assert torch.allclose(weight, reference[1], atol=2e-3)
        if carry == "carry":
            assert history == pytest.approx(reference[0], rel=0.03)
        else:  # a pipeline does not report what is attached
            assert [a > b for a, b in zip(reference[0], history, strict=True)] == [True] * 4


def sequence_parallel(splits: list[str], wrapper: str) -> list[Any]:
    """Losses and norms with 2 x 2 data- and sequence-parallel ranks."""
    found = []
    for split in splits:
        forget_process_groups()
        model = TinyMoE(MoE, ep_size=2)
        optimizer = torch.optim.AdamW(make_groups(model, split), lr=1e-2)
        cfg = config(wrapper, sequence_parallel_size=2, gradient_clipping=0.0)
        engine = initialize(model, optimizer, cfg, mesh_param=(2, 2))
        verify(engine)
        found.append(train(engine, 3))
    return found


@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "bf16"])
def test_sequence_parallel_ranks_train_as_deepspeeds(wrapper: str) -> None:
    for ours, stock in run_in_fresh_processes(
        WORLD, sequence_parallel, ["expert", "stock"], wrapper
    ):
        assert ours["loss"] == stock["loss"]
        assert ours["norm"] == pytest.approx(stock["norm"], rel=NORM_TOLERANCE)


# ---- ways to carry the loss -----------------------------------------------------------


def gradients(run: Run, number: int = 0) -> dict[str, torch.Tensor]:
    """fp32 gradients of the first step, by the parameter's place in the whole model."""
    forget_process_groups()
    engine = start_run(run)
    found = {}
    original = engine.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        for own, param in engine.module.named_parameters():
            gradient = safe_get_full_grad(param)
            if gradient is not None:
                found[_place(own, run)] = gradient.float().clone()
        return original(*args, **kwargs)

    engine.optimizer.step = step
    train_run(engine, run, 1)
    return found


def _place(own: str, run: Run) -> str:
    """ "layers.3.moe..." or "3.block.moe..." as "3.moe..."."""
    return own.removeprefix("layers.").replace(".block.", ".", 1)


def all_gradients(runs: list[Run]) -> list[dict[str, torch.Tensor]]:
    return [gradients(run) for run in runs]


def test_gradients_are_those_without_a_pipeline() -> None:
    """Of every parameter, however the loss goes, under gradient accumulation."""
    runs = [
        Run(plain=True, off=tuple(range(8))),
        Run(plain=True),
        Run(pp=2, carry="carry"),
        Run(pp=2, carry="attach"),
        Run(pp=2, carry="carry", checkpoint=1, reentrant=False),
        Run(pp=2, carry="attach", checkpoint=1, reentrant=False),
        Run(pp=2, carry="attach", checkpoint=1),
        Run(pp=2, carry="attach", wrapper="zero1"),
        Run(pp=2, carry="carry", wrapper="zero1"),
    ]
    ranks = run_in_fresh_processes(WORLD, all_gradients, runs)
    without, reference = ranks[0][:2]
    for way in range(2, len(runs)):
        found = ranks[0][way] | ranks[WORLD - 1][way]
        assert set(found) == set(reference)
        for key, value in found.items():
            expected = reference[key]
            assert (value - expected).norm() < 0.02 * expected.norm() + 1e-6, (key, way)
    gates = [key for key in reference if "gate" in key]
    assert len(gates) == 8
    for key in gates:  # the loss is felt, so that a wrong one would be seen
        assert (without[key] - reference[key]).norm() > 0.05 * reference[key].norm(), key


def test_a_loss_that_a_stage_forgets_is_seen() -> None:
    """A planted fault: the checks above have to notice it."""
    reference, off = on_ranks([Run(pp=4), Run(pp=4, off=(3,))], 2)
    assert off[0] < reference[0] - 0.9 * COEFFICIENT
    ranks = run_in_fresh_processes(
        WORLD, all_gradients, [Run(plain=True), Run(pp=4, carry="attach", off=(3,))]
    )
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        whole |= rank[1]
    far = [
        k for k, v in whole.items() if (v - ranks[0][0][k]).norm() > 0.02 * ranks[0][0][k].norm()
    ]
    assert any(key.startswith("4.moe.deepspeed_moe.gate") for key in far)


def start_error(run: Run) -> str:
    forget_process_groups()
    try:
        start_run(run)
    except InvalidArgumentError as error:
        return str(error)
    return ""


def in_config(**pipeline: Any) -> dict[str, Any]:
    """The engine gives these to the module after it was checked."""
    return {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False, **pipeline}}


@pytest.mark.parametrize(
    "run",
    [Run(pp=2, checkpoint=2), Run(pp=2, other=in_config(activation_checkpoint_interval=1))],
    ids=["module", "config"],
)
def test_deepspeeds_checkpointing_cannot_carry(run: Run) -> None:
    for text in run_in_fresh_processes(WORLD, start_error, run):
        assert "use_reentrant=False" in text
        assert "attach_loss" in text


def test_deepspeeds_other_checkpointing_can() -> None:
    other = in_config(activation_checkpoint_interval=1, use_reentrant=False)
    stored, recomputed = on_ranks([Run(pp=2), Run(pp=2, other=other)], 2)
    assert stored == recomputed


def test_every_layer_of_every_stage_has_to_carry() -> None:
    for text in run_in_fresh_processes(WORLD, start_error, Run(pp=2, bare=5)):
        assert "layer 0 of pipeline stage 1 (Sparse) is not wrapped in CarryLoss" in text


def test_partitioned_activations_cannot_carry() -> None:
    run = Run(pp=2, tp=2, other={"pipeline": {"pipe_partitioned": True, "grad_partitioned": True}})
    for text in run_in_fresh_processes(WORLD, start_error, run):
        assert '"pipe_partitioned": false' in text
        assert "attach_loss" in text
    attached = run._replace(carry="attach")
    (history,) = on_ranks([attached], 2)
    assert history[1] < history[0]


# ---- checkpoints ----------------------------------------------------------------------


def resumed(runs: list[Run], folder: Path) -> list[str]:
    """What differs between a run and one that was saved and loaded in its middle."""
    problems = []
    for number, run in enumerate(runs):
        forget_process_groups()
        engine = start_run(run)
        train_run(engine, run, 2)
        engine.save_checkpoint(str(folder / str(number)))
        expected = train_run(engine, run, 2, first=2)
        forget_process_groups()
        engine = start_run(run)
        path, _ = engine.load_checkpoint(str(folder / str(number)))
        found = train_run(engine, run, 2, first=2)
        if path is None or found != expected:
            problems.append(f"{name(run)}: {found} instead of {expected}")
    return problems


def test_checkpoints_of_every_topology(tmp_path: Path) -> None:
    runs = [
        *(run for run in TOPOLOGIES if run.tp == 1 or run.ep == TWO),
        Run(pp=2, ep=ONLY_LAST, split="expert"),
        Run(pp=2, ep=MIXED, wrapper="zero1"),
    ]
    assert run_in_fresh_processes(WORLD, resumed, runs, tmp_path, timeout=300) == [[]] * WORLD


def warned_save(run: Run, folder: Path) -> list[str]:
    engine = start_run(run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CheckpointWarning)
        engine.save_checkpoint(str(folder))
    return [str(one.message) for one in caught if one.category is CheckpointWarning]


def test_weights_that_deepspeed_does_not_save(tmp_path: Path) -> None:
    """Those of the second tensor-parallel rank, where both have the same experts."""
    said, *others = run_in_fresh_processes(WORLD, warned_save, Run(tp=2), tmp_path)
    assert others == [[], [], []]
    assert len(said) == 1
    assert "no weights of the model-parallel rank(s) [1]" in said[0]
    with pytest.raises(CheckpointError, match="is shared by tensor-parallel ranks"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="is shared by tensor-parallel ranks"):
        regroup_checkpoint(tmp_path, tmp_path / "other", tmp_path)
