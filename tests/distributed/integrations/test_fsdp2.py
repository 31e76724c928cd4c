"""FSDP2: DTensors on several meshes, grouped by layer and expert, without DeepSpeed."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_groups import ExpertTag, StepConfig, create_moe_param_groups, tag_experts
from moe_groups.errors import InvalidArgumentError, TagError
from tests.distributed.test_demo import run_by_torchrun
from tests.support.models import FFN, HIDDEN
from tests.support.ranks import run_in_fresh_processes


class Layer(nn.Module):
    """Each rank has the same experts, all of which see its tokens."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.fused = nn.LayerNorm(HIDDEN), fused
        if fused:
            self.experts: Any = Fused()
        else:
            self.experts = nn.ModuleList(FFN() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        out: torch.Tensor = self.experts(y) if self.fused else sum(e(y) for e in self.experts)
        return x + out


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(2, HIDDEN, 24) / 4)
        self.w2 = nn.Parameter(torch.randn(2, 24, HIDDEN) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x @ self.w1) @ self.w2).sum(0)


def sharded() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(fused=False), Layer(fused=True))
    experts = init_device_mesh("cpu", (1, 2), mesh_dim_names=("same", "other"))["other"]
    layers: list[Any] = [*model]
    for expert in [*layers[0].experts, layers[1].experts]:
        fully_shard(expert, mesh=experts)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model


def train(model: nn.Module, groups: Any, **options: Any) -> list[torch.Tensor]:
    """The weights, of this rank."""
    optimizer = torch.optim.AdamW(groups, lr=1e-2, **options)
    rank = torch.distributed.get_rank()
    for step in range(4):
        x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(10 * step + rank))
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    parameters: list[Any] = list(model.parameters())
    return [param.to_local().detach().clone() for param in parameters]


def trains_as_one_group(kind: str) -> list[str]:
    options = {kind: True} if kind != "for-loop" else {"foreach": False}
    plain = sharded()
    # One group has tensors on two meshes, which foreach may not mix; it computes as a loop does.
    wanted = train(
        plain, plain.parameters(), **(options if kind == "fused" else {"foreach": False})
    )
    names: list[str] = []
    for split in ("parallel_group", "module", "expert"):
        model = sharded()
        tag_experts(model, "*.experts", ep_size=1)
        groups = create_moe_param_groups(model, split_by=split, max_group_size=400)
        members = [param for group in groups for param in group["params"]]
        assert Counter(map(id, members)) == Counter(map(id, model.parameters()))
        for group in groups:
            assert len({param.device_mesh for param in group["params"]}) == 1
        found = train(model, groups, **options)
        assert all(map(torch.equal, found, wanted))
        names = [group["name"] for group in groups]
        assert len(set(names)) == len(names)
    return names


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["for-loop", "foreach", "fused"])
def test_groups_train_as_one(kind: str) -> None:
    first, second = run_in_fresh_processes(2, trains_as_one_group, kind)
    assert first == second
    assert "ep_size_1_0.expert.1.tile.0" in first
    assert "ep_size_1_1.tile.1" in first


def meshes_apart() -> list[str]:
    """Dense parameters on two meshes, which one foreach operation may not mix."""
    model = sharded()
    groups = create_moe_param_groups(model)
    names = [group["name"] for group in groups]
    tag_experts(model, "*.experts", ep_size=1)
    for name, param in model.named_parameters():
        param.requires_grad_(".experts." not in name)
    parameters: list[Any] = list(model.parameters())
    before = [param.to_local().clone() for param in parameters]
    after = train(model, create_moe_param_groups(model, split_by="expert"))
    for param, old, new in zip(parameters, before, after, strict=True):
        assert torch.equal(old, new) != param.requires_grad
    return names


def test_dense_parameters_on_two_meshes() -> None:
    for names in run_in_fresh_processes(2, meshes_apart):
        assert names == ["dense.mesh.0", "dense.mesh.1"]


def refusals() -> list[str]:
    model = sharded()
    found = []
    for call in (
        lambda: tag_experts(model, "*.expert"),
        lambda: tag_experts(model, "*.experts", ep_size=0),
        lambda: create_moe_param_groups(model, step_memory_budget="auto", step=StepConfig()),
    ):
        with pytest.raises(InvalidArgumentError) as error:
            call()
        found.append(str(error.value))
    return found


def test_refusals() -> None:
    pattern, size, budget = run_in_fresh_processes(2, refusals)[0]
    assert pattern == "tag_experts: no module with parameters matches '*.expert'; there are " + (
        "'0.experts', '1.experts'."
    )
    assert "ep_size=0 must be" in size
    assert "which DeepSpeed does not step" in budget


def test_nothing_is_marked_after_an_error() -> None:
    model = nn.Module()
    model.add_module("a b", Fused())
    model.add_module("a_b", Fused())
    with pytest.raises(TagError, match="two MoE layers are called 'a_b'"):
        tag_experts(model, "a?b", ep_size=2)
    assert not any(vars(param) for param in model.parameters())


def test_marks_by_pattern() -> None:
    model = nn.Sequential(Layer(fused=False), Layer(fused=True))
    tags = tag_experts(model, "1.*", ep_size=4)
    assert tags == {
        "1.norm.weight": ExpertTag("ep_size_4", "1.norm"),
        "1.norm.bias": ExpertTag("ep_size_4", "1.norm"),
        "1.experts.w1": ExpertTag("ep_size_4", "1", fused=True),
        "1.experts.w2": ExpertTag("ep_size_4", "1", fused=True),
    }
    assert not any(vars(param) for param in model[0].parameters())


@pytest.mark.long
def test_example() -> None:
    printed = run_by_torchrun("fsdp2_moe.py")  # whose processes have not imported DeepSpeed
    assert "ep_size_2_1.expert.1" in printed
    assert "DeepSpeed was imported: False" in printed
