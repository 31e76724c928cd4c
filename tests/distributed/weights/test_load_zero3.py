"""``load_experts`` and ``save_experts`` where ZeRO-3 has the weights in parts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from moe_groups import create_moe_param_groups, tag_experts
from moe_groups.errors import CheckpointError, InvalidArgumentError
from moe_groups.integrations.autoep import autoep_optimizer
from moe_groups.weights.gather import gather_model
from moe_groups.weights.load import load_experts
from moe_groups.weights.save import save_experts
from tests.distributed.weights.test_load_experts import stored
from tests.support.autoep_models import VOCABULARY, make_model
from tests.support.autoep_runs import deepspeed_config
from tests.support.hf_checkpoints import save
from tests.support.hf_runs import start_accelerate
from tests.support.pairwise import Row, few_now, pairwise
from tests.support.ranks import forget_process_groups, run_on_ranks
from tests.support.training import initialize

pytest.importorskip("deepspeed.module_inject.auto_ep_layer", reason="AutoEP came with 0.19.2")


def zero3(ep_size: int, small: int = 0, offload: bool = False) -> dict[str, Any]:
    """A config in bfloat16, where weights and masters differ.

    Args:
        small: parameters below this size are always gathered.
    """
    cfg = deepspeed_config("zero3", ep_size) | {"bf16": {"enabled": True}}
    cfg["zero_optimization"] |= {"sub_group_size": 600, "stage3_param_persistence_threshold": small}
    if offload:
        cfg["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        cfg["zero_force_ds_cpu_optimizer"] = False
    if not ep_size:
        del cfg["expert_parallel"]
    return cfg


def start(model: nn.Module, cfg: dict[str, Any]) -> Any:
    def make(groups: list[dict[str, Any]]) -> Any:
        return torch.optim.AdamW(groups, lr=1e-2)

    if "expert_parallel" in cfg:
        return initialize(model, autoep_optimizer(model, make), cfg)
    tag_experts(model, "*.experts")
    return initialize(model, make(create_moe_param_groups(model)), cfg)


def trained(engine: Any) -> dict[str, torch.Tensor]:
    """The weights on rank 0 after two steps."""
    generator = torch.Generator().manual_seed(distributed.get_rank())
    for _ in range(2):
        tokens = torch.randint(VOCABULARY, (2, 8), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    return gather_model(engine)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


FAMILIES = {"mixtral": "mixtral", "qwen3": "qwen3_moe", "deepseek": "deepseek_v3"}
CASES = pairwise(
    {
        "kind": [*FAMILIES],
        "fused": [False, True],
        "ep_size": [0, 1, 2],
        "early": [False, True],
        "small": [0, 200],
        "offload": [False, True],
    }
)


def other(kind: str) -> Any:
    """A model of other weights than ``make_model`` gives."""
    model = make_model(kind).bfloat16()
    for param in model.parameters():
        param.data += 1
    return model


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def other_model(early: bool, cfg: dict[str, Any], folder: Path) -> tuple[nn.Module, object]:
    """Of other weights; partitioned before ``deepspeed.initialize`` if it is to be loaded early."""
    if not early:
        return model_of(folder / "other"), None
    start_accelerate()
    keep = HfDeepSpeedConfig(cfg)
    model = model_of(folder / "other")
    assert all(hasattr(param, "ds_id") for param in model.parameters())
    return model, keep


def round_trip(row: Row, folder: Path) -> int:
    """Compare with from_pretrained, with an engine over its model, and with what is saved."""
    source = model_of(folder / "in")
    wanted = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    cfg = zero3(row["ep_size"], row["small"], row["offload"])
    model, keep = other_model(row["early"], cfg, folder)
    if row["early"]:
        loaded = load_experts(model, folder / "in")
        engine = start(model, cfg)
    else:
        engine = start(model, cfg)
        engine.optimizer.checkpoint_event_epilogue()  # the small ones, as after a step
        loaded = load_experts(engine, folder / "in")
    del keep
    assert loaded.not_filled == loaded.unused == []
    for name, dtype in (("out", None), ("fp32", "fp32")):
        save_experts(
            engine,
            folder / name,
            family=folder / "in" if not row["fused"] else FAMILIES[row["kind"]],
            dtype=dtype,  # type: ignore[arg-type]
            max_shard_size=10_000,
        )
    first = distributed.get_rank() == 0
    same(gather_model(engine), wanted if first else {})
    after = trained(engine)
    forget_process_groups()
    same(after, trained(start(source, cfg)))
    assert not first or any(not torch.equal(after[name], wanted[name]) for name in wanted)
    forget_process_groups()
    return loaded.bytes_read


@pytest.mark.parametrize("row", few_now(CASES, 3))
def test_round_trip(row: Row, tmp_path: Path) -> None:
    model = make_model(row["kind"]).bfloat16()
    save(model, tmp_path / "in", fused=row["fused"])
    save(other(row["kind"]), tmp_path / "other")
    read = run_on_ranks(2, round_trip, row, tmp_path, timeout=60)
    params = sum(param.nbytes for param in model.parameters())
    buffers = sum(tensor.nbytes for tensor in model.state_dict().values()) - params
    assert sum(read) == params + 2 * buffers, "each rank reads its partitions alone"
    wanted = stored(save(model, tmp_path / "wanted"))
    for name, dtype in (("out", torch.bfloat16), ("fp32", torch.float32)):
        same(stored(tmp_path / name), {key: value.to(dtype) for key, value in wanted.items()})


def evaluate(folder: Path) -> None:
    """An engine without an optimizer, whose small parameters a forward pass has gathered."""
    engine = initialize(model_of(folder / "other"), None, zero3(0, small=10**5))
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        engine(input_ids=tokens)
        load_experts(engine, folder / "in")
        logits = engine(input_ids=tokens).logits
        assert torch.equal(logits, model_of(folder / "in")(input_ids=tokens).logits)
    save_experts(engine, folder / "fp32", family="mixtral", dtype="fp32")
    forget_process_groups()


def test_an_engine_that_evaluates(tmp_path: Path) -> None:
    directory = save(make_model("mixtral").bfloat16(), tmp_path / "in")
    save(other("mixtral"), tmp_path / "other")
    run_on_ranks(2, evaluate, tmp_path, timeout=60)
    same(stored(tmp_path / "fp32"), {k: v.float() for k, v in stored(directory).items()})


def refused(folder: Path) -> None:
    """Nothing has changed afterwards."""
    engine = start(other("mixtral"), zero3(0))
    before = gather_model(engine)
    partition: Any = next(engine.module.parameters()).ds_tensor
    partition.ds_quant_scale = torch.ones(1)
    with pytest.raises(InvalidArgumentError, match=r"embed_tokens.weight, .* quantized \("):
        load_experts(engine, folder / "in")
    del partition.ds_quant_scale
    partition.final_location = "nvme"
    with pytest.raises(InvalidArgumentError, match=r"embed_tokens.weight, .* on NVMe \("):
        load_experts(engine, folder / "in")
    partition.final_location = None
    engine.optimizer.zenflow = True
    with pytest.raises(InvalidArgumentError, match=r"cannot refresh all .*zenflow"):
        load_experts(engine, folder / "in")
    engine.optimizer.zenflow = False
    with pytest.raises(CheckpointError, match=r"lacks the experts \[1\]"):
        load_experts(engine, folder / "bad")
    with pytest.raises(InvalidArgumentError, match="give load_experts the engine"):
        load_experts(engine.module, folder / "in")
    same(gather_model(engine), before)
    forget_process_groups()


def test_refusals_change_nothing(tmp_path: Path) -> None:
    save(make_model("mixtral").bfloat16(), tmp_path / "in")
    tensors = stored(tmp_path / "in")
    lacking = {name: tensor for name, tensor in tensors.items() if ".experts.1." not in name}
    (tmp_path / "bad").mkdir()
    save_file(lacking, tmp_path / "bad" / "model.safetensors")
    run_on_ranks(2, refused, tmp_path, timeout=60)
