"""``lean_step``: the same step bit for bit, in tiles and with few collectives."""

import contextlib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import utils
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from moe_groups import GroupMetrics, MoE, compact_gradients, lean_step, set_group_options
from moe_groups._deepspeed.releases import EXACT_MEANS
from moe_groups._deepspeed.step.tiles import ALIGNED, BYTES_PER_ELEMENT
from moe_groups.errors import CostlyGroupsWarning
from tests.support import ROOT
from tests.support.models import TinyMoE
from tests.support.pairwise import Row, label, long_on_four_ranks, pairwise
from tests.support.ranks import forget_process_groups, run_in_fresh_processes, run_on_ranks
from tests.support.stage_models import Run as Staged, start_run, train_run
from tests.support.training import batches, config, groups_by, initialize, make_groups, start, train
from tests.support.zero_runs import (
    CLIP,
    Case,
    against_plain,
    changed_late,
    changed_too_late,
    changed_without,
    cost,
    dense_against_plain,
    differences,
    overflow_against_plain,
    refusal,
    resume,
    skipping_an_expert,
    snapshot,
    start_dense,
    start_muon,
    start_without_optimizer,
)

SMALL = ALIGNED * BYTES_PER_ELEMENT
"""The smallest tile: the larger groups of a TinyMoE take several."""
in_tiles = functools.partial(lean_step, tile=SMALL)
at_once = functools.partial(lean_step, tile="64MiB")
CHANGES = {"tiles": in_tiles, "at once": at_once}
WRAPPERS = ("zero1", "zero2", "zero2_fp32_grads", "bf16")


# ---- training -------------------------------------------------------------------------


def check(world: int, tile: str, cases: list[Case]) -> None:
    found = run_on_ranks(world, against_plain, CHANGES[tile], cases, timeout=300)
    assert found == [[]] * world


@pytest.mark.parametrize(
    "row",
    long_on_four_ranks(
        pairwise(
            {
                "world": [1, 2, 4],
                "tile": list(CHANGES),
                "wrapper": WRAPPERS,
                "split": ["expert", "module", "stock"],
                "ep_size": [1, 2, 4],
                "accumulate": [1, 4],
                "clip": [0.0, CLIP],
            },
            lambda world, ep_size, **_: ep_size <= world,
        )
    ),
    ids=label,
)
def test_trains_the_same(row: Row) -> None:
    settings = {k: v for k, v in row.items() if k not in ("world", "clip", "tile")}
    case = Case(**settings, other={"gradient_clipping": row["clip"]})
    check(row["world"], row["tile"], [case])


SETTINGS = [
    Case(accumulate=2, zero={"overlap_comm": True}),
    Case(accumulate=2, zero={"round_robin_gradients": True}),
    Case(other={"communication_data_type": "fp32"}),
    Case(other={"bf16": {"enabled": True, "check_grad_overflow": True}}),
    Case(other={"bf16": {"enabled": False}, "data_types": {}}),
    Case(other={"managed_gradient_accumulation": False}),
    Case(zero={"compute_grad_norm": False}, other={"gradient_clipping": 0.0}),
    Case(
        other={
            "bf16": {
                "enabled": True,
                "bf16_master_weights_and_grads": True,
                "bf16_optimizer_states": True,
            }
        }
    ),
]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: str(case.zero | case.other))
def test_trains_the_same_with_other_settings(case: Case) -> None:
    check(2, "tiles", [case, case._replace(wrapper="zero1", split="module")])


@pytest.mark.parametrize("off", ["contiguous_gradients", "reduce_scatter"])
def test_dense_model_trains_the_same(off: str) -> None:
    found = run_on_ranks(2, dense_against_plain, in_tiles, "zero1", {off: False})
    assert found == [[], []]


def test_expert_without_gradient_on_one_rank() -> None:
    assert run_on_ranks(2, skipping_an_expert, in_tiles, "zero2", 2, timeout=60) == [[], []]


def test_overflow_skips_the_same_step() -> None:
    assert run_on_ranks(2, overflow_against_plain, in_tiles) == [[], []]


def in_fp16(wrapper: str, options: dict[str, Any]) -> tuple[list[str], int]:
    """Differences, and skipped steps. torch computes in fp16 on any processor, if slowly."""
    other = {"fp16": {"enabled": True, **options}, "bf16": {"enabled": False}, "data_types": {}}
    case = Case(wrapper, "module", accumulate=2, other=other)
    device = type(get_accelerator())
    with mock.patch.object(device, "is_fp16_supported", return_value=True):
        problems = against_plain(in_tiles, [case], 6)
        engine = case.engine(in_tiles)
        train(engine, 12)
    return problems, engine.skipped_steps


@pytest.mark.parametrize(
    ("wrapper", "options", "skips"),
    [
        ("zero1", {"loss_scale": 128}, False),
        ("zero2", {"initial_scale_power": 24, "hysteresis": 1}, True),
    ],
)
def test_fp16_with_loss_scaling(wrapper: str, options: dict[str, Any], skips: bool) -> None:
    for problems, skipped in run_on_ranks(2, in_fp16, wrapper, options):
        assert problems == []
        assert bool(skipped) == skips


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=1e-2, foreach=True),
    "tensor lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), fused=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=1e-2),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2, centered=True),
}


def cpu_adam(groups: Any) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(groups, lr=1e-2)


def cpu_lion(groups: Any) -> Any:
    from deepspeed.ops.lion import DeepSpeedCPULion

    return DeepSpeedCPULion(groups, lr=1e-3)


COMPILED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "DeepSpeedCPUAdam": cpu_adam,
    "DeepSpeedCPULion": cpu_lion,
}


def with_optimizer(name: str, wrapper: str) -> list[str]:
    runs = []
    for change in (False, True):
        model = TinyMoE(MoE, ep_size=2)
        optimizer = (OPTIMIZERS | COMPILED)[name](make_groups(model, "parallel_group"))
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        engine = initialize(model, optimizer, config(wrapper), lr_scheduler=schedule)
        if change:
            lean_step(engine, 2 * SMALL)  # all but AdamW take more for an element
        runs.append((train(engine, 3), snapshot(engine)))
    return differences(*runs)


@pytest.mark.parametrize(
    "row", pairwise({"optimizer": list(OPTIMIZERS), "wrapper": ["zero2", "bf16"]}), ids=label
)
def test_optimizers(row: Row) -> None:
    assert run_on_ranks(2, with_optimizer, row["optimizer"], row["wrapper"]) == [[], []]


@pytest.mark.campaign  # compiling them takes minutes
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_optimizers_that_deepspeed_compiles(name: str, wrapper: str) -> None:
    assert run_on_ranks(2, with_optimizer, name, wrapper, timeout=900) == [[], []]


# ---- topologies -----------------------------------------------------------------------

STAGED = [
    Staged(pp=2, ep=(0, 0, 0, 0, 0, 2, 1, 0), wrapper="zero1", split="expert"),
    Staged(pp=2, tp=2, ep=(2,) * 8, wrapper="zero1", split="module"),
    Staged(tp=2, ep=(2,) * 8, expert_tp=True, wrapper="zero1", micro_batches=2),
    Staged(pp=2, ep=(2,) * 8, split="expert"),
]


def staged(change: Any) -> list[list[float]]:
    """The losses of each run, and the norm of its last gradient."""
    found = []
    for run in STAGED:
        forget_process_groups()
        engine = start_run(run)
        if change:
            change(engine)
        found.append([*train_run(engine, run, 3), float(engine.get_global_grad_norm())])
    return found


@pytest.mark.long
def test_pipelines_and_tensor_parallelism() -> None:
    plain = run_in_fresh_processes(4, staged, None, timeout=300)
    lean = run_in_fresh_processes(4, staged, in_tiles, timeout=300)
    for expected, found in zip(plain, lean, strict=True):
        for one, other in zip(expected, found, strict=True):
            assert other[:2] == one[:2]  # before a norm that differs in its last bit clips
            assert other == pytest.approx(one, rel=1e-3)
            assert other[-1] == pytest.approx(one[-1], rel=1e-3)


# ---- checkpoints, hooks, options ------------------------------------------------------


@pytest.mark.parametrize("around", ["after", "before", "both"])
def test_resume(around: str, tmp_path: Path) -> None:
    case = Case("zero2", "parallel_group", accumulate=2)
    changes = (in_tiles if around in (when, "both") else None for when in ("before", "after"))
    assert run_on_ranks(2, resume, case, *changes, tmp_path, timeout=60) == [[], []]


def test_resume_of_bf16_optimizer(tmp_path: Path) -> None:
    case = Case("bf16", "module")
    assert run_on_ranks(2, resume, case, in_tiles, at_once, tmp_path, timeout=60) == [[], []]


def with_options(wrapper: str) -> tuple[list[str], list[Any]]:
    """Rates, a frozen layer and metrics, in the second step with a report."""
    runs, reports = [], []
    for change in (None, in_tiles):
        engine = Case(wrapper, "module").engine(change)
        set_group_options(engine, "*blocks.0.moe.deepspeed_moe.experts*", frozen=True)
        set_group_options(
            engine, "*blocks.1.moe.deepspeed_moe.experts*", lr_multiplier=0.5, weight_decay=0.2
        )
        metrics, found = GroupMetrics(engine, interval=2), []
        history: dict[str, list[float]] = {}
        for step in range(4):
            for key, values in train(engine, 1, first=step).items():
                history.setdefault(key, []).extend(values)
            found.append(metrics.step())
        runs.append((history, snapshot(engine)))
        reports.append(found)
    assert [report is None for report in reports[0]] == [True, False] * 2
    return differences(*runs), reports


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_options_and_metrics(wrapper: str) -> None:
    for problems, (plain, lean) in run_on_ranks(2, with_options, wrapper):
        assert problems == []
        assert lean == plain


def gradients_in_hooks(wrapper: str) -> list[list[tuple[list[str], list[Any]]]]:
    """What a hook of a user sees in each call of two steps: names, and sums of gradients."""
    runs = []
    for change in (None, in_tiles):
        engine = Case(wrapper, "module").engine(change)
        seen: list[tuple[list[str], list[Any]]] = []

        def look(optimizer: Any, *_: object, seen: Any = seen) -> None:
            params = [group["params"][0] for group in optimizer.param_groups]
            names = [group["name"] for group in optimizer.param_groups]
            seen.append((names, [float(p.grad.double().sum()) for p in params]))

        engine.basic_optimizer.register_step_pre_hook(look)
        warns = pytest.warns(CostlyGroupsWarning, match="needs_gradients = False")
        with warns if change and wrapper == "zero2" else contextlib.nullcontext():
            train(engine, 2)
        runs.append(seen)
    return runs


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_hooks_see_what_they_see_without(wrapper: str) -> None:
    for plain, lean in run_on_ranks(2, gradients_in_hooks, wrapper):
        assert lean == plain


def test_may_be_called_between_steps_and_again(tmp_path: Path) -> None:
    assert run_on_ranks(2, changed_late, at_once, in_tiles, tmp_path) == [[], []]


# ---- collectives and memory -----------------------------------------------------------

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_gather", "broadcast", "barrier")


def collectives(wrapper: str, lean: bool = True) -> list[tuple[int, int]]:
    """Numbers of groups, and of collectives in a step."""
    found = []
    for split in ("parallel_group", "module", "expert"):
        change = at_once if lean else None
        engine = Case(wrapper, split, ep_size=1).engine(change, model_options={"num_experts": 8})
        x, y = (data.bfloat16() for data in next(batches(1)))
        engine.backward(engine(x, y))
        calls: list[None] = []

        def counted(original: Any, calls: list[None] = calls) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(None)
                return original(*args, **kwargs)

            return call

        with mock.patch.multiple(comm, **{n: counted(getattr(comm, n)) for n in COLLECTIVES}):
            engine.step()
        found.append((len(engine.optimizer.param_groups), len(calls)))
    return found


@pytest.mark.parametrize("wrapper", ["zero2", "bf16"])
def test_more_groups_take_no_more_collectives(wrapper: str) -> None:
    for found in run_on_ranks(2, collectives, wrapper):
        groups, counts = zip(*found, strict=True)
        assert groups[-1] > 10 > groups[0]
        assert len(set(counts)) == 1, found
        assert counts[0] <= 6


def costs(splits: list[str], tile: int | None) -> list[tuple[int, int]]:
    """T, and the largest partition, with a tile or without ``lean_step``."""
    found = []
    for split in splits:
        change = functools.partial(lean_step, tile=tile) if tile else compact_gradients
        engine = Case("zero2", split, ep_size=1).engine(change, model_options={"num_experts": 16})
        one = cost(engine)
        found.append((one.peak - one.held, max(map(int, engine.optimizer.partition_size))))
    return found


@pytest.mark.parametrize("tile", [SMALL, 2 * SMALL])
def test_temporaries_fit_into_the_tile(tile: int) -> None:
    splits = ["parallel_group", "module"]
    for lean, compact in zip(
        run_on_ranks(2, costs, splits, tile), run_on_ranks(2, costs, splits, None), strict=True
    ):
        for (transient, largest), (before, _) in zip(lean, compact, strict=True):
            assert largest > 3 * ALIGNED  # several tiles
            assert transient <= tile < before


# ---- where it cannot be used ----------------------------------------------------------


def start_autocast() -> Any:
    autocast = {"enabled": True, "dtype": "float16", "lower_precision_safe_modules": []}
    return start_dense(bf16={"enabled": False}, torch_autocast=autocast)


def start_bf16_accumulation() -> Any:
    engine = Case("bf16").engine()
    engine.optimizer.grad_acc_dtype = torch.bfloat16  # as in a pipeline without ZeRO
    return engine


def start_replaced() -> Any:
    engine = Case().engine()
    engine.optimizer.step = engine.optimizer.step
    return engine


def start_adafactor() -> Any:
    model = TinyMoE(MoE, ep_size=2)
    optimizer = torch.optim.Adafactor(make_groups(model, "module"), lr=1e-2)
    return initialize(model, optimizer, config("zero2"))


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "fp32": (lambda: start("fp32", groups_by("expert")), {}, "steps with AdamW, without ZeRO"),
    "half": (lambda: start("half", groups_by("expert")), {}, "steps with FP16_Optimizer, without"),
    "ZeRO-3": (lambda: start_dense(zero={"stage": 3}), {}, "ZeRO-3 already keeps nothing but"),
    "offload": (
        lambda: start_dense(
            zero={"offload_optimizer": {"device": "cpu"}}, zero_force_ds_cpu_optimizer=False
        ),
        {},
        "Leave out the call, or the offload",
    ),
    "DeepCompile": (lambda: start_dense(compile={"deepcompile": True}), {}, "Leave out the call"),
    "Muon": (start_muon, {}, "Muon needs the whole gradient of each parameter"),
    "not elementwise": (start_adafactor, {}, "cannot step torch.optim.Adafactor in tiles"),
    "bf16 accumulation": (start_bf16_accumulation, {}, "copies all gradients to fp32 at once"),
    "step replaced": (start_replaced, {}, "was replaced, and lean_step would replace it again"),
    "no optimizer": (start_without_optimizer, {}, "it has no optimizer"),
    "no engine": (lambda: object(), {}, "engine=<object> must be an engine"),
    "no size": (lambda: Case().engine(), {"tile": "some"}, "tile='some' is not a size"),
    "too small": (lambda: Case("bf16").engine(), {"tile": "1KiB"}, f"give at least {SMALL}"),
}


def refuse(what: str) -> str:
    engine, options, _ = REFUSED[what]
    return refusal(functools.partial(lean_step, **options), engine())


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    for message in run_on_ranks(2, refuse, what, timeout=900):
        assert REFUSED[what][2] in message


def test_refused_while_gradients_are_held() -> None:
    for message, problems in run_on_ranks(2, changed_too_late, lean_step, Case()):
        assert "lean_step was called while the engine holds gradients" in message
        assert problems == []


def test_unsupported_deepspeed() -> None:
    for message, unchanged in run_on_ranks(2, changed_without, lean_step, EXACT_MEANS[0]):
        assert "install deepspeed 0.19.8 or newer, or leave lean_step out" in message
        assert unchanged


# ---- the patches on the page ----------------------------------------------------------

PAGE = ROOT / "docs" / "lean-step.md"


def patched() -> Any:
    """A context manager: DeepSpeed with the patches of the page applied."""
    changed: dict[str, Any] = {}
    originals = DeepSpeedZeroOptimizer.scaled_global_norm, utils.all_gather_into_tensor_dp_groups
    diffs = re.findall("```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for original, diff in zip(originals, diffs, strict=True):
        function: Any = inspect.unwrap(original)
        lines = diff.splitlines(keepends=True)
        before, after = ("".join(one[1:] for one in lines if one[0] in " " + s) for s in "-+")
        assert inspect.getsource(function).strip() == before.strip()
        exec(textwrap.dedent(after), function.__globals__, changed)
    methods = {name: changed.pop(name) for name in ("scaled_global_norm", "_local_square")}
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.multiple(DeepSpeedZeroOptimizer, create=True, **methods))
    stack.enter_context(mock.patch.multiple(utils, create=True, **changed))
    return stack


def patched_against_plain(case: Case) -> tuple[list[str], list[tuple[int, int]]]:
    plain = case.engine()
    runs = [(train(plain, 4), snapshot(plain))]
    with patched():
        engine = case.engine()
        runs.append((train(engine, 4), snapshot(engine)))
        counts = collectives(case.wrapper, lean=False)
    return differences(*runs), counts


@pytest.mark.parametrize("wrapper", ["zero1", "zero2"])
def test_patches_of_the_page(wrapper: str) -> None:
    for problems, counts in run_on_ranks(2, patched_against_plain, Case(wrapper, accumulate=2)):
        assert problems == []
        assert len({count for _, count in counts}) == 1
