"""Wrappers leave names and tags as the user wrote them."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from moe_groups import MoE, create_moe_param_groups, tag_experts
from moe_groups.tags import is_expert_parameter
from tests.support.models import FFN, HIDDEN, MoEBlock, TinyMoE

Wrap = Callable[[nn.Module], Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of one rank: DistributedDataParallel refuses to start without."""
    store = tmp_path_factory.mktemp("world") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def checkpointed(model: nn.Module) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, MoEBlock | FFN))
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block)
    return model


WRAPPERS: dict[str, Wrap] = {
    "compile": lambda m: torch.compile(m),
    "compiled blocks": compiled_blocks,
    "checkpoint": checkpoint_wrapper,
    "checkpointed blocks and experts": checkpointed,
    "DistributedDataParallel": data_parallel,
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "all": lambda m: torch.compile(data_parallel(checkpointed(m))),
}


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("layer", [MoE, DeepSpeedMoE], ids=["ours", "DeepSpeed's"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_tags_are_those_of_the_unwrapped_model(wrapper: str, layer: Any) -> None:
    wrapped = WRAPPERS[wrapper](TinyMoE(layer))
    plain = TinyMoE(layer)
    assert tag_experts(wrapped) == tag_experts(plain)
    options: dict[str, Any] = {"split_by": "expert", "overrides": [("inp", {"lr": 0.5})]}
    groups = create_moe_param_groups(wrapped, **options)
    assert [g["name"] for g in groups] == [
        g["name"] for g in create_moe_param_groups(plain, **options)
    ]


def test_a_users_own_submodule_called_like_a_slot_stays_in_the_name() -> None:
    class User(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = TinyMoE(MoE, layers=1)
            self.model = self.base_layer = nn.Linear(2, 2)

    found = tag_experts(User())
    assert {tag.layer for tag in found.values()} == {"module.blocks.0.moe"}


# ---- PEFT ------------------------------------------------------------------------------


class HandMade(nn.Module):
    """Experts marked for DeepSpeed, without a layer class of DeepSpeed's."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(HIDDEN, HIDDEN)
        self.moe = nn.Module()
        self.moe.experts = nn.ModuleList(FFN() for _ in range(2))
        for param in self.moe.experts.parameters():
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = "ep_size_2"  # type: ignore[attr-defined]


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "ours": (lambda: TinyMoE(MoE, 1, 4, ep_size=2), "blocks.0.moe"),
    "DeepSpeed's": (lambda: TinyMoE(DeepSpeedMoE, 1, 4, ep_size=2), "blocks.0.moe"),
    "hand-made": (HandMade, "moe"),
}
models = pytest.mark.parametrize(("build", "label"), MODELS.values(), ids=MODELS)


def with_peft(model: nn.Module, **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=2, target_modules=["inp", "up", "down"], **options)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def group(model: nn.Module) -> list[dict[str, Any]]:
    """Grouping tags the adapters; doing it again changes nothing."""
    groups = create_moe_param_groups(model, split_by="expert")
    tags = tag_experts(model)
    assert tag_experts(model) == tags
    again = create_moe_param_groups(model, split_by="expert")
    assert [(g["name"], list(map(id, g["params"]))) for g in again] == [
        (g["name"], list(map(id, g["params"]))) for g in groups
    ]
    return groups


def check_groups(groups: list[dict[str, Any]], model: nn.Module, label: str) -> set[str]:
    """Every trained parameter inside an expert is in that expert's group; their names."""
    names = {id(param): name for name, param in model.named_parameters()}
    found = set()
    for group in groups:
        for param in group["params"]:
            inside = re.search(r"experts\.(\d+)\.", names[id(param)])
            assert group.get("moe", False) is (inside is not None)
            # DeepSpeed reads these two when it reduces gradients
            assert is_expert_parameter(param) is (inside is not None)
            if inside:
                assert param.group_name == "ep_size_2"
                assert group["expert_group_name"] == label
                assert group["expert_number"] == int(inside[1])
                found.add(names[id(param)])
    return found


@models
def test_adapters_inside_of_experts_become_parameters_of_that_expert(
    build: Callable[[], nn.Module], label: str
) -> None:
    model = with_peft(build())
    found = check_groups(group(model), model, label)
    assert len(found) == 2 * 2 * 2  # experts, matrices, lora_A and lora_B
    assert all("lora_" in name for name in found)


@models
def test_adapters_beside_a_trained_base(build: Callable[[], nn.Module], label: str) -> None:
    model = with_peft(build()).requires_grad_()
    by_module = group(model)
    assert len(check_groups(by_module, model, label)) == 2 * (3 + 4)
    by_params = create_moe_param_groups(model.parameters(), split_by="expert")
    assert [g["name"] for g in by_params] == [g["name"] for g in by_module]


@models
def test_modules_to_save_train_copies_that_are_experts(
    build: Callable[[], nn.Module], label: str
) -> None:
    model = with_peft(build(), modules_to_save=[label])
    found = check_groups(group(model), model, label)
    copies = {name for name in found if "modules_to_save.default" in name}
    assert len(copies) == len(found) >= 2 * 3
    groups = create_moe_param_groups(model, overrides=[("inp", {"lr": 0.5})])
    assert {g["expert_group_name"] for g in groups if g.get("moe")} == {label}


class FusedExperts(nn.Module):
    """All experts in two tensors, which PEFT adapts as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, HIDDEN, 24))
        self.down = nn.Parameter(torch.zeros(4, 24, HIDDEN))


@pytest.mark.parametrize("kind", ["bank", "fused"])
def test_adapters_of_other_hand_made_experts_stay_with_their_layer(kind: str) -> None:
    """A list that is not called experts, and experts that are tensors, not modules."""
    model = HandMade()
    experts: nn.Module = nn.ModuleList(FFN() for _ in range(2))
    model.moe = nn.Module()
    if kind == "bank":
        model.moe.bank = experts
    else:
        model.moe.experts = experts = FusedExperts()
    for param in experts.parameters():
        param.allreduce = False  # type: ignore[attr-defined]
        param.group_name = "ep_size_2"  # type: ignore[attr-defined]
    plain = {g["name"] for g in create_moe_param_groups(model, split_by="expert")}
    fused = {"target_parameters": ["moe.experts.up", "moe.experts.down"]}
    adapted = with_peft(model, **(fused if kind == "fused" else {}))
    groups = group(adapted)
    assert {g["name"] for g in groups} == plain
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(map(is_expert_parameter, trained)) == len(trained) - 2  # all but those of inp
