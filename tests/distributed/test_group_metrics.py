"""The numbers of layers and experts beside those of whole gradients and weights."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from moe_groups import MoE
from moe_groups.group_metrics import GroupMetrics
from moe_groups.metrics_report import GroupStats, MetricsReport
from tests.models import TinyMoE
from tests.ranks import run_on_ranks
from tests.training import batches, groups_by, start, weights

_EXPERT = re.compile(r"(blocks\.\d\.moe)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d)\..*")

Key = tuple[str, int | None]
"""A layer and its expert, or a block of dense parameters and None."""


def key_of(name: str, ep_size: int, num_experts: int = 4) -> Key:
    """Written anew from the names of the test's model."""
    if match := _EXPERT.fullmatch(name):
        own = num_experts // ep_size
        return match[1], torch.distributed.get_rank() % ep_size * own + int(match[2])
    parts = name.split(".")
    return (".".join(parts[:2]) if parts[0] == "blocks" else parts[0]), None


def squares(tensors: dict[str, torch.Tensor], ep_size: int) -> dict[Key, float]:
    """Sums of squares by key, over all ranks, each parameter once."""
    own: dict[str, tuple[Key, float]] = {}
    for name, tensor in tensors.items():
        key = key_of(name, ep_size)
        own[f"{key} {name.rpartition('.experts.')[2][22:]} {name}"] = (
            key,
            float(tensor.double().square().sum()),
        )
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own)
    sums: dict[Key, float] = {}
    for key, value in {name: item for some in everywhere for name, item in some.items()}.values():
        sums[key] = sums.get(key, 0.0) + value
    return sums


def found_in(report: MetricsReport) -> dict[Key, GroupStats]:
    found: dict[Key, GroupStats] = {(block, None): it for block, it in report.dense.items()}
    for label, layer in report.layers.items():
        for number, stats in enumerate(layer.experts):
            if stats is not None:
                found[label, number] = stats
    return found


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in engine.module.named_parameters():
        grad = param.grad if engine.optimizer is engine.basic_optimizer else None
        grad = safe_get_full_grad(param) if grad is None else grad
        if grad is not None:
            found[name] = grad.detach().float().clone()
    return found


def steps(engine: Any, count: int, first: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Runs optimizer steps; gives the gradients of each before it."""
    dtype = next(engine.module.parameters()).dtype
    micro = engine.gradient_accumulation_steps()
    for number, (x, y) in enumerate(batches(count * micro, first)):
        engine.backward(engine(x.to(dtype), y.to(dtype)))
        last = (number + 1) % micro == 0
        if last:
            yield gradients(engine)
        else:
            engine.step()


def compare(wrapper: str, split: str, ep_size: int, micro: int, cap: int | None = None) -> Any:
    engine = start(
        wrapper,
        groups_by(split, cap),
        model_options={"ep_size": ep_size},
        gradient_accumulation_steps=micro,
    )
    metrics = GroupMetrics(engine, interval=2)
    reports = []
    for number, grads in enumerate(steps(engine, 4), 1):
        before = weights(engine)
        engine.step()
        report = metrics.step()
        assert (report is None) == (number % 2 == 1)
        assert metrics.step() is None
        if report is None:
            continue
        after = weights(engine)
        updates = {name: after[name] - before[name] for name in after}
        found = found_in(report)
        for attribute, tensors in (
            ("grad_norm", grads),
            ("param_norm", after),
            ("update_norm", updates),
        ):
            expected = squares(tensors, ep_size)
            assert set(expected) == set(found)
            for key, stats in found.items():
                value = getattr(stats, attribute)
                assert value == pytest.approx(expected[key] ** 0.5, rel=2e-5), (attribute, key)
            whole = getattr(report.total, attribute)
            assert whole == pytest.approx(sum(expected.values()) ** 0.5, rel=2e-5)
        norm = engine.get_global_grad_norm()
        if norm is not None:
            assert report.total.grad_norm == pytest.approx(float(norm), rel=1e-5)
            assert float(norm) > 0.05  # it is clipped
        assert all(stats.lr == pytest.approx(1e-2) for stats in found.values())
        reports.append(report)
    metrics.close()
    assert "clip_fp32_gradients" not in vars(engine)
    return reports


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "zero2_fp32_grads", "bf16", "fp32"])
def test_norms_are_those_of_whole_gradients(wrapper: str, ep_size: int) -> None:
    for split, micro in (("expert", 1), ("parallel_group", 2)):
        ranks = run_on_ranks(2, compare, wrapper, split, ep_size, micro)
        assert ranks[0] == ranks[1]
        assert len(ranks[0]) == 2
