"""A checkpoint loaded into AutoEP's layers, each rank its own experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from moe_groups import create_moe_param_groups, gather_model, verify
from moe_groups.errors import InvalidArgumentError, MoEGroupsError
from moe_groups.integrations.autoep import autoep_optimizer, load_autoep
from tests.support.autoep_models import autoep_config, make_model, train_autoep
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


def saved(kind: str, folder: Path, as_on_hub: bool = True) -> Any:
    """A checkpoint in bfloat16, and its class."""
    model = make_model(kind)
    for name, values in model.state_dict().items():
        if "correction_bias" in name:
            values.copy_(torch.rand(values.shape))  # not zero, and not exact in bfloat16
    if distributed.get_rank() == 0:
        model.bfloat16().save_pretrained(folder, save_original_format=as_on_hub)
    distributed.barrier()
    return type(model)


def empty(kind: Any, folder: Path) -> Any:
    config = kind.config_class.from_pretrained(folder)
    with torch.device("meta"):
        return kind._from_config(config, dtype=torch.bfloat16)


def results(engine: Any) -> list[Any]:
    """Losses, and all weights after them with what no checkpoint holds."""
    before = gather_model(engine)
    buffers = {
        name: value.tolist()
        for name, value in engine.module.named_buffers()
        if "tokens_per_expert" not in name
    }
    losses = train_autoep(engine, 2)
    weights = gather_model(engine)
    for named in (before, weights):
        buffers |= {f"{len(buffers)} {name}": value.tolist() for name, value in named.items()}
    return [losses, buffers]


def both_ways(
    folder: Path, kind: str, wrapper: str, autoep_size: int, on_hub: bool, early: bool
) -> tuple[list[Any], list[Any]]:
    cfg = autoep_config(kind, wrapper, autoep_size)
    cls = saved(kind, folder, on_hub)
    model = cls.from_pretrained(folder, dtype=torch.bfloat16).train()
    plain = results(initialize(model, autoep_optimizer(model, adamw), cfg))
    forget_process_groups()
    model = empty(cls, folder)
    loaded = load_autoep(model, folder, cfg)
    local = 4 // autoep_size
    first = local * (distributed.get_rank() % autoep_size)
    assert set(loaded.experts.values()) == {range(first, first + local)}
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    optimizer: Any = autoep_optimizer(model, adamw)
    if early:  # layers are there, so groups need no callable
        optimizer = adamw(create_moe_param_groups(model))
    engine = initialize(model, optimizer, cfg)
    verify(engine)
    return results(engine), plain


@pytest.mark.parametrize(
    ("kind", "wrapper", "autoep_size", "on_hub", "early"),
    [
        ("mixtral", "zero2", 2, True, True),
        ("qwen3", "zero3", 2, True, False),
        ("deepseek", "bf16", 2, True, True),
        pytest.param("mixtral", "zero3", 1, False, True, marks=pytest.mark.long),
        pytest.param("qwen2", "zero1", 2, False, False, marks=pytest.mark.long),
        pytest.param("deepseek", "zero2", 1, False, False, marks=pytest.mark.long),
        pytest.param("deepseek2", "zero2", 2, True, True, marks=pytest.mark.long),
        pytest.param("qwen3.5", "zero2", 2, True, False, marks=pytest.mark.long),
        pytest.param("minimax", "zero2", 2, True, False, marks=pytest.mark.long),
    ],
)
def test_trains_as_from_pretrained(
    kind: str, wrapper: str, autoep_size: int, on_hub: bool, early: bool, tmp_path: Path
) -> None:
    settings = tmp_path, kind, wrapper, autoep_size, on_hub, early
    for ours, plain in run_on_ranks(2, both_ways, *settings, timeout=300):
        assert ours == plain


# ---- what is refused -----------------------------------------------------------------------


def refused(folder: Path, case: str) -> str:
    """The error; the model is as before."""
    cfg = autoep_config("mixtral", "zero2")
    cls = saved("mixtral", folder)
    model = empty(cls, folder)
    if case in ("missing", "shape") and distributed.get_rank() == 0:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
        values = tensors.pop(name)
        if case == "shape":
            tensors[name] = values[:, 1:].contiguous()
        save_file(tensors, file)
    distributed.barrier()
    match case:
        case "no file":
            folder = folder / "nowhere" if distributed.get_rank() else folder
        case "memory":
            model.lm_head.to_empty(device="cpu")
        case "buffer":
            model.model.norm.register_buffer("own", torch.ones(2, device="meta"), persistent=False)
        case "not enabled":
            del cfg["expert_parallel"]
        case "size":
            cfg["expert_parallel"]["autoep_size"] = 3
    before = {name: type(part) for name, part in model.named_modules()}
    tensors = dict(model.named_parameters())
    with pytest.raises(MoEGroupsError) as error:
        load_autoep(model, folder, cfg)
    assert before == {name: type(part) for name, part in model.named_modules()}
    assert all(param is tensors[name] for name, param in model.named_parameters())
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("missing", "model.layers.1.mlp, expert 3, w2.weight: the checkpoint's"),
        ("shape", "experts.3.w2.weight has shape (32, 47), the model's is (32, 48)"),
        ("no file", "nowhere is no checkpoint of safetensors"),
        ("memory", "lm_head.weight is on cpu"),
        ("buffer", "model.norm.own is not in checkpoints"),
        ("not enabled", '"expert_parallel": {"enabled": true'),
        ("size", "AutoEP refuses this model or config: "),
    ],
)
def test_what_does_not_fit_is_refused_on_all_ranks(
    case: str, expected: str, tmp_path: Path
) -> None:
    for message in run_on_ranks(2, refused, tmp_path, case):
        assert expected in message


def other_size(folder: Path) -> str:
    cls = saved("mixtral", folder)
    model = empty(cls, folder)
    load_autoep(model, folder, autoep_config("mixtral", "zero2", 2))
    with pytest.raises(InvalidArgumentError) as error:
        initialize(model, autoep_optimizer(model, adamw), autoep_config("mixtral", "zero2", 1))
    return str(error.value)


def test_another_size_than_the_loaded_one_is_refused(tmp_path: Path) -> None:
    for message in run_on_ranks(2, other_size, tmp_path):
        assert "autoep_size=2" in message
        assert "autoep_size=1" in message


def test_no_ranks_yet() -> None:
    with torch.device("meta"):
        model = make_model("mixtral")
    with pytest.raises(InvalidArgumentError, match="init_distributed"):
        load_autoep(model, "nowhere", {})
    with pytest.raises(InvalidArgumentError, match="not Linear"):
        load_autoep(torch.nn.Linear(2, 2), "nowhere", {})
