"""A model whose experts AutoEP distributes, saved whole and loaded by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from moe_groups import balance_experts, create_moe_param_groups, gather_model
from moe_groups._deepspeed.layers import is_autoep_layer
from moe_groups._deepspeed.parts import gathered, is_partitioned
from moe_groups.errors import InvalidArgumentError
from moe_groups.integrations.autoep import autoep_optimizer, tag_autoep_experts
from tests.support.autoep_models import VOCABULARY, autoep_config, make_model, train_autoep
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import initialize

pytest.importorskip(
    "deepspeed.module_inject.auto_ep_layer", reason="DeepSpeed before 0.19.2 has no AutoEP"
)
pytest.importorskip(
    "transformers.utils.output_capturing", reason="the presets of AutoEP need transformers 5"
)


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2)


def partitioned_model(kind: str, cfg: dict[str, Any], folder: Path) -> Any:
    """As Trainer's users load it for ZeRO-3: each parameter is partitioned when it is made."""
    model = make_model(kind)
    if distributed.get_rank() == 0:
        model.save_pretrained(folder)
    distributed.barrier()
    known = HfDeepSpeedConfig(cfg)  # transformers looks for it
    try:
        loaded = type(model).from_pretrained(folder)
        assert is_partitioned(loaded)
        return loaded
    finally:
        unset_hf_deepspeed_config()
        del known


def trained(kind: str, cfg: dict[str, Any], start: Path | None = None) -> Any:
    model = make_model(kind) if start is None else partitioned_model(kind, cfg, start)
    engine = initialize(model, autoep_optimizer(model, adamw), cfg)
    train_autoep(engine, 2)
    return engine


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found


def same_as_saved(
    engine: Any, folder: Path, cfg: dict[str, Any]
) -> tuple[float, float, dict[str, Any], list[bool]]:
    """What a model loaded from the files has of the engine's.

    Differences of the logits in an engine of its own and in transformers, what the load could not
    place, and whether each of this rank's experts is there.
    """
    distributed.barrier()
    unset_hf_deepspeed_config()  # Trainer's arguments have set it: it would partition the model
    loaded, problems = type(engine.module).from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    engine.eval()
    wanted = logits(engine)
    plainly = float((logits(loaded.eval()) - wanted).abs().max())
    experts = []
    for path, layer in engine.module.named_modules():
        if is_autoep_layer(layer):
            whole, own = loaded.get_submodule(path).experts, layer.experts
            first = layer.ep_rank * layer.num_local_experts
            here = slice(first, first + layer.num_local_experts)
            both, width = whole.gate_up_proj[here], whole.down_proj.shape[-1]
            parts = (
                (own.w1, both[:, :width]),
                (own.w3, both[:, width:]),
                (own.w2, whole.down_proj[here]),
            )
            for mine, saved in parts:
                with gathered(mine) as values:
                    experts.append(torch.equal(values, saved))
    forget_process_groups()
    again = initialize(loaded, autoep_optimizer(loaded, adamw), cfg)
    again.eval()
    difference = float((logits(again) - wanted).abs().max())
    return difference, plainly, problems, experts


def gather_and_save(
    folder: Path, kind: str, wrapper: str, autoep_size: int, zero_init: bool, on_save: bool
) -> Any:
    cfg = autoep_config(kind, wrapper, autoep_size)
    if on_save:
        cfg["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    engine = trained(kind, cfg, folder / "start" if zero_init else None)
    gather_model(engine)
    train_autoep(engine, 1)
    weights = gather_model(engine)
    assert bool(weights) == (distributed.get_rank() == 0)
    if weights:
        engine.module.save_pretrained(folder, state_dict=weights)
    return same_as_saved(engine, folder, cfg)


@pytest.mark.parametrize(
    ("kind", "wrapper", "autoep_size", "zero_init", "on_save"),
    [
        ("mixtral", "zero2", 2, False, False),
        pytest.param("qwen3", "zero1", 1, False, False, marks=pytest.mark.long),
        ("deepseek", "bf16", 2, False, False),
        pytest.param("mixtral", "zero3", 1, False, True, marks=pytest.mark.long),
        ("qwen3", "zero3", 2, True, False),
        pytest.param("deepseek", "zero3", 2, False, False, marks=pytest.mark.long),
        ("qwen2", "zero2", 2, False, False),
        pytest.param("qwen2", "zero3", 1, True, False, marks=pytest.mark.long),
        pytest.param("deepseek2", "zero2", 2, False, False, marks=pytest.mark.long),
        pytest.param("qwen3.5", "zero2", 2, False, False, marks=pytest.mark.long),
        pytest.param("minimax", "zero2", 2, False, False, marks=pytest.mark.long),
    ],
)
def test_what_is_gathered_loads_in_transformers(
    kind: str, wrapper: str, autoep_size: int, zero_init: bool, on_save: bool, tmp_path: Path
) -> None:
    settings = tmp_path, kind, wrapper, autoep_size, zero_init, on_save
    for found in run_on_ranks(2, gather_and_save, *settings, timeout=300):
        difference, plainly, problems, experts = found
        assert difference == 0.0
        assert plainly < 0.01  # AutoEP rounds the router's scores elsewhere
        assert not any(problems.values()), problems
        assert all(experts)
        assert experts


# ---- what cannot be gathered -------------------------------------------------------------


def compiled_names() -> set[str]:
    model = make_model("mixtral")
    known = set(model.state_dict())
    cfg = autoep_config("mixtral", "zero2")
    tag_autoep_experts(model, cfg)
    compiled: Any = torch.compile(model)
    engine = initialize(compiled, adamw(create_moe_param_groups(model)), cfg)
    return known.symmetric_difference(gather_model(engine) or known)


def test_a_compiled_model_has_its_own_names() -> None:
    for different in run_on_ranks(2, compiled_names):
        assert different == set()


def with_a_bias() -> set[str]:
    engine = trained("mixtral", autoep_config("mixtral", "zero2"))
    known = set(gather_model(engine))
    balance_experts(engine, rate=0.1)
    train_autoep(engine, 1)
    with pytest.warns(UserWarning, match=r"model.layers.0.mlp.expert_bias is left out"):
        return known ^ set(gather_model(engine))


def test_a_bias_that_transformers_does_not_know_is_left_out() -> None:
    for different in run_on_ranks(2, with_a_bias):
        assert different == set()


def refused() -> tuple[str, str]:
    """A tensor that AutoEP may add in another release, and a config of other layers."""
    engine = trained("deepseek", autoep_config("deepseek", "zero2"))
    engine.module.model.layers[1].mlp.register_buffer("own", torch.ones(1))
    with pytest.raises(InvalidArgumentError) as unknown:
        gather_model(engine)
    engine.module.config.first_k_dense_replace = 2
    with pytest.raises(InvalidArgumentError) as error:
        gather_model(engine)
    return str(unknown.value), str(error.value)


def test_what_has_no_name_in_transformers_is_refused() -> None:
    for unknown, message in run_on_ranks(2, refused):
        assert "model.layers.1.mlp.own is AutoEP's own" in unknown
        assert "make other MoE layers than AutoEP has replaced" in message
        assert "no MoE layers detected" in message  # AutoEP's own words
