"""AutoEP on real transformers models: groups of what it makes, and those that came too early."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn

from moe_groups import create_moe_param_groups, describe, verify
from moe_groups.checkpoints.guard.engine_layout import own_origin
from moe_groups.errors import ParameterInputError, VerificationError
from moe_groups.integrations.autoep import autoep_optimizer, support_new_transformers
from moe_groups.tags import is_expert_parameter
from tests.distributed.test_demo import run_example
from tests.support.autoep_models import autoep_config, make_model, train_autoep
from tests.support.checkpointed_models import WAYS, Tensors, communication, different
from tests.support.ranks import run_in_fresh_processes, run_on_ranks
from tests.support.training import initialize

pytest.importorskip(
    "deepspeed.module_inject.auto_ep_layer", reason="DeepSpeed before 0.19.2 has no AutoEP"
)
pytest.importorskip(
    "transformers.utils.output_capturing", reason="the presets of AutoEP need transformers 5"
)

KINDS = ["mixtral", "qwen3", "deepseek"]
Groups = list[dict[str, Any]]


def adamw(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2)


def start(kind: str, wrapper: str, **grouping: Any) -> Any:
    model = make_model(kind)
    optimizer = autoep_optimizer(model, adamw, **grouping)
    return initialize(model, optimizer, autoep_config(kind, wrapper))


def stock_optimizer(model: nn.Module) -> Any:
    """DeepSpeed's own split, in the callable: one group of all experts."""

    def optimizer(params: Any) -> torch.optim.Optimizer:
        live = list(model.parameters())
        dense = {"params": [p for p in live if not is_expert_parameter(p)], "name": "dense"}
        experts = {"params": [p for p in live if is_expert_parameter(p)], "name": "ep_size_2"}
        return adamw([dense, experts | {"moe": True}])

    support_new_transformers()
    return optimizer


def trained(kind: str, wrapper: str) -> list[Any]:
    """Losses, norm and weights: ours by layer, and DeepSpeed's split; names of our groups."""
    found: list[Any] = []
    names: list[str] = []
    for ours in (True, False):
        if ours:
            engine = start(kind, wrapper)
            verify(engine)
            names = [row.name for row in describe(engine).rows]
        else:
            model = make_model(kind)
            engine = initialize(model, stock_optimizer(model), autoep_config(kind, wrapper))
        assert (own_origin(engine) is None) == bool(found)  # stock groups come second
        before = {n: safe_get_full_fp32_param(p).clone() for n, p in _experts(engine)}
        losses = train_autoep(engine, 3)
        after = {n: safe_get_full_fp32_param(p) for n, p in _experts(engine)}
        assert all(not torch.equal(before[n], after[n]) for n in before), "an expert stood still"
        found.append((losses, {n: value.tolist() for n, value in after.items()}))
    return [*found, names]


def _experts(engine: Any) -> list[tuple[str, Any]]:
    return [(n, p) for n, p in engine.module.named_parameters() if is_expert_parameter(p)]


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrapper", ["zero2", *(pytest.param(w, marks=pytest.mark.long) for w in ("zero1", "bf16"))]
)
def test_groups_by_layer_train_as_deepspeeds(kind: str, wrapper: str) -> None:
    layers = [1] if kind == "deepseek" else [0, 1]
    for ours, stock, names in run_on_ranks(2, trained, kind, wrapper, timeout=300):
        assert names == ["dense", *(f"ep_size_2_model.layers.{n}.mlp" for n in layers)]
        assert ours == stock


@pytest.mark.parametrize(
    "kind", ["mixtral", *(pytest.param(k, marks=pytest.mark.long) for k in KINDS[1:])]
)
def test_zero3(kind: str) -> None:
    for ours, stock, names in run_on_ranks(2, trained, kind, "zero3", timeout=300):
        assert len(names) == (2 if kind == "deepseek" else 3)
        assert ours == stock


def frozen(wrapper: str, folder: Path) -> tuple[list[bool], list[float], list[float]]:
    """Whether experts stay and the rest is trained; losses, and those after a load.

    DeepSpeed itself refuses to save them under ZeRO-3.
    """
    losses: list[list[float]] = []
    for resume in (False, True):
        model = make_model("mixtral")
        for name, param in model.named_parameters():
            param.requires_grad_(".experts." not in name)
            if resume and not param.requires_grad:
                param.data.zero_()  # loading has to bring them back
        optimizer = autoep_optimizer(model, adamw)
        engine = initialize(model, optimizer, autoep_config("mixtral", wrapper))
        verify(engine)
        if resume:
            engine.load_checkpoint(str(folder))
        else:
            before = {n: value(p).clone() for n, p in engine.module.named_parameters()}
            train_autoep(engine, 2)
            after = {n: value(p) for n, p in engine.module.named_parameters()}
            stay = [torch.equal(before[n], after[n]) == (".experts." in n) for n in before]
            if wrapper == "zero3":
                with pytest.raises(RuntimeError, match="does not support frozen expert"):
                    engine.save_checkpoint(str(folder))
                return stay, [], []
            engine.save_checkpoint(str(folder))
        losses.append(train_autoep(engine, 2))
    return stay, losses[0], losses[1]


def value(param: Any) -> torch.Tensor:
    """This rank's part of the weights."""
    local: torch.Tensor = getattr(param, "ds_tensor", param)
    return local.detach()


@pytest.mark.long
@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "zero3", "bf16"])
def test_frozen_experts(wrapper: str, tmp_path: Path) -> None:
    for stay, losses, resumed in run_on_ranks(2, frozen, wrapper, tmp_path, timeout=300):
        assert all(stay)
        assert losses == resumed


# ---- activation checkpointing ----------------------------------------------------------


def step_three_ways(kind: str) -> dict[str, tuple[int, list[str]]]:
    """All-to-alls of a step with each kind of checkpointing, and what differs from none."""
    model = make_model(kind)
    optimizer = autoep_optimizer(model, lambda groups: torch.optim.SGD(groups, lr=0.0))
    engine = initialize(model, optimizer, autoep_config(kind, "zero2"))
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(own_rank()))
    steps: dict[str, tuple[int, Tensors]] = {}
    for name, way in WAYS.items():
        model._set_gradient_checkpointing(gradient_checkpointing_func=way)
        found: Tensors = {}

        def forward_and_backward(found: Tensors = found) -> None:
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            found["loss"] = loss.detach()

        counted, _ = communication(forward_and_backward)
        found |= {n: safe_get_full_grad(p).clone() for n, p in model.named_parameters()}
        engine.step()
        steps[name] = counted, found
    assert all(value.any() for value in found.values())
    return {name: (n, different(found, steps["plain"][1])) for name, (n, found) in steps.items()}


def own_rank() -> int:
    return torch.distributed.get_rank()


def test_checkpointing_repeats_no_all_to_all() -> None:
    """Of 5 for each layer: counts, tokens there and back, and two of gradients."""
    layers = 2
    for found in run_on_ranks(2, step_three_ways, "mixtral", timeout=300):
        assert found == {
            "plain": (5 * layers, []),
            "torch": (8 * layers, []),
            "ours": (5 * layers, []),
        }


# ---- groups that came too early --------------------------------------------------------


def too_early(wrapper: str, inside: bool) -> str:
    """Groups of before, in an optimizer, or given out by a callable."""
    support_new_transformers()
    model = make_model("mixtral")
    groups = create_moe_param_groups(model)
    optimizer: Any = (lambda params: adamw(groups)) if inside else adamw(groups)
    try:
        engine = initialize(model, optimizer, autoep_config("mixtral", wrapper))
        verify(engine)
    except (ParameterInputError, VerificationError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("wrapper", "inside"),
    [
        ("zero2", False),
        ("zero3", True),
        pytest.param("zero2", True, marks=pytest.mark.long),
        pytest.param("zero3", False, marks=pytest.mark.long),
    ],
)
def test_groups_of_before_are_caught(wrapper: str, inside: bool) -> None:
    for text in run_in_fresh_processes(2, too_early, wrapper, inside, timeout=120):
        assert "optimizer=lambda params: torch.optim.AdamW(create_moe_param_groups(model))" in text
        assert "model.layers.0.mlp.experts.w1" in text
        assert "nothing would train them" in text if inside else "marked moe" in text


def without_autoep() -> str:
    model = make_model("mixtral")
    config = autoep_config("mixtral", "zero2")
    del config["expert_parallel"]
    with pytest.raises(ParameterInputError) as error:
        initialize(model, autoep_optimizer(model, adamw), config)
    return str(error.value)


def test_without_autoep_the_config_is_named() -> None:
    for text in run_on_ranks(2, without_autoep):
        assert '"expert_parallel": {"enabled": true' in text


# ---- transformers ----------------------------------------------------------------------


def test_registry_answers_as_before() -> None:
    """And to AutoEP's questions; see ``support_new_transformers``."""
    from transformers.utils import output_capturing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_model("mixtral")
    registry: Any = output_capturing._CAN_RECORD_REGISTRY
    name = str(type(model.model))
    key = name if type(registry) is dict else model.model  # a dict of class names up to 5.20
    assert (before := registry.get(key))
    support_new_transformers()
    support_new_transformers()
    assert registry.get(key) == before == registry.get(name, None)
    assert registry.get("nobody", 5) == 5


@pytest.mark.long
def test_example() -> None:
    printed = run_example("autoep_mixtral.py")
    first, last = (float(line.split()[-1]) for line in printed.splitlines() if "loss" in line)
    assert last < first < 6
    assert "ep_size_2_model.layers.1.mlp" in printed
