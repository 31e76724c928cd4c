"""``load_experts`` on real ranks, against transformers' own blocks, and back."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from transformers import MixtralForCausalLM, __version__

from moe_groups import MoE, cli, create_moe_param_groups
from moe_groups.errors import CheckpointError, InvalidArgumentError
from moe_groups.topology import Topology
from moe_groups.weights.load import load_experts
from moe_groups.weights.save import save_experts
from tests.distributed.test_demo import run_example
from tests.support.hf_checkpoints import (
    DENSE_LAYERS,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INNER,
    Decoder,
    hf_model,
    moe_layer,
    save,
    true_experts,
)
from tests.support.ranks import run_on_ranks
from tests.support.training import (
    WRAPPERS,
    TorchFusedAdam,
    config,
    initialize,
    largest_difference,
    weights,
)

pytestmark = pytest.mark.skipif(
    Version(__version__) < Version("5"),
    reason="the blocks to compare with are those of transformers 5",
)
NO_AUTOEP = "DeepSpeed before 0.19.2 has no AutoEP"
STYLES = [(family, fused) for family in FAMILIES for fused in (False, True)]


def batch(shape: tuple[int, ...] = (2, 5, HIDDEN)) -> torch.Tensor:
    """Other values on each rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7 + distributed.get_rank()))


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7 + distributed.get_rank())
    return torch.randint(32, (2, 6), generator=generator)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def bind(model: nn.Module) -> None:
    """What ``deepspeed.initialize`` does with the layers."""
    for module in model.modules():
        layer: Any = module
        if isinstance(module, MoE) or type(module).__name__ == "AutoEPMoELayer":
            layer.set_deepspeed_parallelism()


class Block(nn.Module):
    """A layer of ours where transformers has a block, with DeepSeek's shared experts beside it."""

    def __init__(self, layer: nn.Module, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.moe = layer
        if shared is not None:
            self.shared_experts = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.moe(x)[0]
        return out


def with_layers_of_ours(family: str, ep_size: int) -> nn.Module:
    """Another model of the family whose MoE blocks hold DeepSpeed's layer."""
    model: Any = hf_model(family, seed=1)
    for layer in model.model.layers[DENSE_LAYERS.get(family, 0) :]:
        layer.mlp = Block(moe_layer(ep_size), getattr(layer.mlp, "shared_experts", None))
    return model  # type: ignore[no-any-return]


# ---- equal to transformers ------------------------------------------------------------


def load_and_compare(family: str, directory: Path, ep_size: int) -> int:
    """Weights of this rank's experts bit for bit, and what the model computes."""
    source: Any = hf_model(family)
    model: Any = with_layers_of_ours(family, ep_size)
    loaded = load_experts(model, directory, strict=family != "deepseek_v3")
    here = distributed.get_rank() * (EXPERTS // ep_size) if ep_size > 1 else 0
    for number in range(DENSE_LAYERS.get(family, 0), 2):
        moe = model.model.layers[number].mlp.moe.deepspeed_moe
        wanted = true_experts(source, number)[here : here + EXPERTS // ep_size]
        for expert, matrices in zip(moe.experts.deepspeed_experts, wanted, strict=True):
            for name, matrix in matrices.items():
                assert torch.equal(expert.get_submodule(name).weight, matrix)
        path = f"model.layers.{number}.mlp.moe"
        assert loaded.experts[path] == range(here, here + EXPERTS // ep_size)
    assert loaded.not_filled == []
    assert loaded.bytes_read == sum(p.nbytes for p in model.parameters())
    if family == "deepseek_v3":  # DeepSpeed's gate has no place for it, and routes by softmax
        assert loaded.unused == ["model.layers.1.mlp.gate.e_score_correction_bias"]
        return loaded.bytes_read
    bind(model)
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, source(x).logits, rtol=1e-4, atol=1e-4)
    return loaded.bytes_read


@pytest.mark.numeric
@pytest.mark.parametrize(("family", "fused"), STYLES)
def test_layers_compute_what_transformers_computes(
    family: str, fused: bool, tmp_path: Path
) -> None:
    directory = save(hf_model(family), tmp_path, fused=fused)
    halves = run_on_ranks(2, load_and_compare, family, directory, 2)
    wholes = run_on_ranks(2, load_and_compare, family, directory, 1)
    layers = 2 - DENSE_LAYERS.get(family, 0)
    experts = layers * EXPERTS * 3 * INNER * HIDDEN * 4
    assert [w - h for h, w in zip(halves, wholes, strict=True)] == [experts // 2] * 2


def autoep_layer(block: nn.Module, family: str, ep_size: int) -> nn.Module:
    """AutoEP's layer in place of a block: what its preset says of the family, by hand.

    AutoEP's own search for blocks fails with this transformers (``_CanRecordRegistry``).
    """
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    deepseek = family == "deepseek_v3"
    spec = MoELayerSpec(
        moe_module_name="mlp",
        model_family=family,
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=EXPERTS,
        top_k=2,
        hidden_size=HIDDEN,
        ffn_hidden_size=INNER,
        score_func="sigmoid" if deepseek else "softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=deepseek,
        shared_experts_name="shared_experts",
        route_scale=2.5 if deepseek else 1.0,
        num_expert_groups=2 if deepseek else None,
        num_limited_groups=1 if deepseek else None,
    )
    options = AutoEPConfig(enabled=True, autoep_size=ep_size, use_grouped_mm=False)
    options.load_balance_coeff = None
    ep_rank = distributed.get_rank() % ep_size
    layer: nn.Module = AutoEPMoELayer(spec, block, ep_size, ep_rank, options)
    return layer


def with_autoep(family: str, ep_size: int) -> nn.Module:
    model: Any = hf_model(family, seed=1)
    for layer in model.model.layers[DENSE_LAYERS.get(family, 0) :]:
        layer.mlp = autoep_layer(layer.mlp, family, ep_size)
    return model  # type: ignore[no-any-return]


def compare_autoep(family: str, directory: Path, ep_size: int, back: Path) -> None:
    source, model = hf_model(family), with_autoep(family, ep_size)
    loaded = load_experts(model, directory)
    assert loaded.not_filled == loaded.unused == []
    bind(model)
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, source(x).logits, rtol=1e-4, atol=1e-4)
    save_experts(model, back, family=family)


@pytest.mark.numeric
@pytest.mark.parametrize(("family", "fused"), STYLES)
@pytest.mark.parametrize("ep_size", [1, 2])
def test_autoep_layers(family: str, fused: bool, ep_size: int, tmp_path: Path) -> None:
    """DeepSeek's routing too, bias and groups included; and back, bit for bit."""
    pytest.importorskip("deepspeed.module_inject.auto_ep_config", reason=NO_AUTOEP)
    source = hf_model(family)
    directory = save(source, tmp_path / "in", fused=fused)
    run_on_ranks(2, compare_autoep, family, directory, ep_size, tmp_path / "out")
    wanted, back = stored(save(source, tmp_path / "wanted")), stored(tmp_path / "out")
    assert set(back) == set(wanted)
    assert all(torch.equal(back[name], wanted[name]) for name in wanted)


# ---- engines --------------------------------------------------------------------------


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = Decoder(ep_size=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.model.blocks.values():
            x = x + block["moe"](x)[0]  # type: ignore[index]
        return x.float().square().mean()


def engine_of(model: nn.Module, wrapper: str) -> Any:
    # FP16_Optimizer steps once with gradients of zero when it is made, and so would decay.
    options = {"lr": 1e-2, "weight_decay": 0.0}
    kind = TorchFusedAdam if wrapper == "half" else torch.optim.AdamW
    groups = create_moe_param_groups(model)
    return initialize(model, kind(groups, **options), config(wrapper))  # type: ignore[arg-type]


def trained(engine: Any) -> list[dict[str, torch.Tensor]]:
    """The full-precision weights at the start and after two steps."""
    found = [weights(engine)]
    dtype = next(engine.module.parameters()).dtype
    for _ in range(2):
        engine.backward(engine(batch().to(dtype)))
        engine.step()
    return [*found, weights(engine)]


def load_before_and_after(wrapper: str, directory: Path) -> None:
    early = Trained()
    load_experts(early, directory, strict=False)
    wanted = trained(engine_of(early, wrapper))
    engine = engine_of(Trained(), wrapper)
    assert type(engine.optimizer).__name__ == WRAPPERS[wrapper]
    with pytest.raises(InvalidArgumentError, match="belongs to a DeepSpeed engine"):
        load_experts(engine.module, directory, strict=False)
    with pytest.raises(InvalidArgumentError, match="belongs to a DeepSpeed engine"):
        load_experts(engine.module.model, directory, strict=False)
    assert largest_difference(weights(engine), wanted[0]) > 0
    load_experts(engine, directory, strict=False)
    for own, other in zip(trained(engine), wanted, strict=True):
        assert largest_difference(own, other) == 0
    assert largest_difference(wanted[0], wanted[1]) > 0
    with pytest.raises(
        CheckpointError, match=r"has 1 of 2 parts of the experts of model\.blocks\.0"
    ):
        engine.save_16bit_model(str(directory / "half"))
    save_experts(engine, directory / "fp32", family="qwen3_moe", dtype="fp32")
    back, layers = stored(directory / "fp32"), engine.module.model.blocks
    for name, master in weights(engine).items():
        layer, rest = re.fullmatch(r"model\.blocks\.(\d)\.moe\.deepspeed_moe\.(.+)", name).groups()  # type: ignore[union-attr]
        rest = rest.replace("gate.wg.", "gate.")
        number = re.match(r"experts\.deepspeed_experts\.(\d)", rest)
        if number:
            first = distributed.get_rank() * EXPERTS // 2
            rest = rest.replace(number[0], f"experts.{first + int(number[1])}")
        found = back.pop(f"model.layers.{layer}.mlp.{rest}")
        assert found.dtype == torch.float32
        assert torch.equal(found, master.float())
    assert len(back) == len(layers) * 3 * EXPERTS // 2  # of the other rank


@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "bf16", "fp32", "half"])
def test_an_engine_steps_what_was_loaded(wrapper: str, tmp_path: Path) -> None:
    """As if it had been loaded before ``deepspeed.initialize``, bit for bit."""
    run_on_ranks(2, load_before_and_after, wrapper, save(hf_model("mixtral"), tmp_path))


def load_into_autoep_engine(directory: Path) -> None:
    model: Any = with_autoep("mixtral", 2).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(create_moe_param_groups(model), lr=1e-3)
    engine = initialize(model, optimizer, config("zero2"))
    load_experts(engine, directory)
    first = 2 * distributed.get_rank()
    wanted = true_experts(hf_model("mixtral"), 1)[first : first + 2]
    master = weights(engine)["model.layers.1.mlp.experts.w3"]
    rounded = torch.stack([expert["up_proj"] for expert in wanted]).bfloat16().float()
    assert torch.equal(master, rounded)
    save_experts(engine, directory / "fp32", family="mixtral", dtype="fp32")
    back = stored(directory / "fp32")
    prefix = "model.layers.1.block_sparse_moe.experts"
    experts = [back[f"{prefix}.{number}.w3.weight"] for number in (first, first + 1)]
    assert torch.equal(torch.stack(experts), master)


def test_an_engine_with_autoep_layers(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed.module_inject.auto_ep_config", reason=NO_AUTOEP)
    run_on_ranks(2, load_into_autoep_engine, save(hf_model("mixtral"), tmp_path, fused=True))


def export(wrapper: str, directory: Path) -> None:
    """Trained, saved and exported; rank 0 compares with what the engine itself writes."""
    engine = engine_of(with_layers_of_ours("mixtral", 2), wrapper)
    for _ in range(2):
        engine.backward(engine(tokens()).logits.float().square().mean())
        engine.step()
    engine.save_checkpoint(str(directory / "saved"))
    for dtype in ("fp32", None):
        own, made = (directory / f"{name} {dtype}" for name in ("own", "made"))
        save_experts(engine, own, family="mixtral", dtype=dtype)
        if distributed.get_rank() == 0:
            options = ["--family", "mixtral", *(["--dtype", dtype] if dtype else [])]
            paths = str(directory / "saved"), str(made)
            assert cli.main(["export-checkpoint", *paths, *options]) == 0
            wanted, found = stored(own), stored(made)
            assert found.keys() == wanted.keys()
            assert {t.dtype for t in found.values()} == {torch.float32 if dtype else torch.bfloat16}
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    distributed.barrier()


@pytest.mark.parametrize("wrapper", ["zero1", "zero2", "bf16"])
def test_transformers_loads_the_masters_of_a_checkpoint(wrapper: str, tmp_path: Path) -> None:
    run_on_ranks(2, export, wrapper, tmp_path)
    hf_model("mixtral").config.save_pretrained(tmp_path / "made fp32")  # type: ignore[operator,union-attr]
    model, info = MixtralForCausalLM.from_pretrained(
        tmp_path / "made fp32", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    back = stored(save(model, tmp_path / "back"))
    assert all(torch.equal(back[k], v) for k, v in stored(tmp_path / "made fp32").items())


# ---- which experts --------------------------------------------------------------------


def place(directory: Path, data_first: bool, back: Path) -> tuple[range, range]:
    """Experts of this rank before and after the process groups exist."""
    topology = Topology(world_size=4, use_data_before_expert_parallel=data_first)
    model = Decoder(ep_size=2)
    before = load_experts(model, directory, strict=False, topology=topology)
    for block in model.blocks.values():
        block["moe"].set_deepspeed_parallelism(data_first)  # type: ignore[index]
    save_experts(model, back, family="mixtral", max_shard_size=4000)
    after = load_experts(model, directory, strict=False)
    return before.experts["blocks.0.moe"], after.experts["blocks.0.moe"]


@pytest.mark.parametrize("data_first", [False, True])
def test_four_ranks(data_first: bool, tmp_path: Path) -> None:
    """Two hold the same experts; one of them writes them."""
    directory = save(hf_model("mixtral"), tmp_path / "in")
    places = run_on_ranks(4, place, directory, data_first, tmp_path / "out")
    low, high = range(2), range(2, 4)
    order = [low, low, high, high] if data_first else [low, high, low, high]
    assert [before for before, _ in places] == [after for _, after in places] == order
    wanted, back = stored(directory), stored(tmp_path / "out")
    assert set(back) == {name for name in wanted if "block_sparse_moe" in name}
    assert all(torch.equal(back[name], wanted[name]) for name in back)


def initialize_after(directory: Path, with_topology: bool) -> str | None:
    """What ``initialize`` says to a model that was loaded before, where data ranks come first."""
    topology = (
        Topology(world_size=4, use_data_before_expert_parallel=True) if with_topology else None
    )
    model = Decoder(ep_size=2)
    load_experts(model, directory, strict=False, topology=topology)
    optimizer = torch.optim.AdamW(create_moe_param_groups(model))
    try:
        initialize(model, optimizer, config("zero2") | {"use_data_before_expert_parallelism": True})
    except InvalidArgumentError as error:
        return str(error)
    return None


def test_experts_of_another_rank_are_refused(tmp_path: Path) -> None:
    directory = save(hf_model("mixtral"), tmp_path)
    assert run_on_ranks(4, initialize_after, directory, with_topology=True) == [None] * 4
    messages = run_on_ranks(4, initialize_after, directory, with_topology=False)
    assert messages[0] == messages[2], "one holds the right ones, and would wait for the other"
    assert "rank 2 experts 0 to 1 of 'blocks.0.moe'" in messages[0]
    assert "it has 2 to 3: say with load_experts(topology=" in messages[0]
    assert messages[1] == messages[3]
    assert "rank 1 experts 2 to 3" in messages[1]


def load_on_the_first_rank(directory: Path) -> torch.Tensor:
    """DeepSpeed gives the other ranks what the first one has."""
    model = Decoder(ep_size=1)
    if distributed.get_rank() == 0:
        load_experts(model, directory, strict=False)
    engine = initialize(model, torch.optim.AdamW(create_moe_param_groups(model)), config("zero2"))
    weight: torch.Tensor = next(engine.module.parameters()).detach().clone()
    return weight


def test_ranks_that_load_nothing_are_not_waited_for(tmp_path: Path) -> None:
    first, second = run_on_ranks(
        2, load_on_the_first_rank, save(hf_model("mixtral"), tmp_path), timeout=60
    )
    assert torch.equal(first, second)


def wrong_topology(directory: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="world_size=4, but there are 2 ranks"):
        load_experts(Decoder(ep_size=2), directory, topology=Topology(world_size=4))


def test_a_topology_of_other_ranks(tmp_path: Path) -> None:
    run_on_ranks(2, wrong_topology, save(hf_model("mixtral"), tmp_path))


# ---- failures -------------------------------------------------------------------------


def load_wrong(directory: Path) -> str:
    model = Decoder(ep_size=2)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_experts(model, directory, strict=False)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    return str(caught.value)


def test_all_ranks_refuse_what_one_would_read(tmp_path: Path) -> None:
    tensors = stored(save(hf_model("mixtral"), tmp_path / "in"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors[name] = torch.zeros(1)
    (tmp_path / "one").mkdir()
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    first, second = run_on_ranks(2, load_wrong, tmp_path / "one")
    assert first == second
    assert f"blocks.1.moe, expert 3, down_proj.weight: {name} has shape (1,)" in first


def save_to_a_file(directory: Path) -> str:
    if distributed.get_rank():
        directory = directory / "file"
        directory.write_text("")
    with pytest.raises(CheckpointError) as caught:
        save_experts(Decoder(ep_size=2), directory, family="mixtral")
    return str(caught.value)


def test_a_rank_that_cannot_write_stops_all(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, save_to_a_file, tmp_path)
    assert first == second
    assert "file" in first
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left"


def load_round_trip(source: Path, back: Path) -> bool:
    """Save under EP=2 what was loaded, load it under EP=1."""
    halves, wholes, wanted = Decoder(ep_size=2), Decoder(), Decoder()
    load_experts(halves, source, strict=False)
    save_experts(halves, back, family="qwen3_moe")
    load_experts(wholes, back)
    load_experts(wanted, source, strict=False)
    same = all(
        torch.equal(*pair) for pair in zip(wholes.parameters(), wanted.parameters(), strict=True)
    )
    distributed.barrier()
    if distributed.get_rank() == 0:  # what rank 1 alone reads
        path = max(back.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    distributed.barrier()
    with pytest.raises(CheckpointError, match=r"\.experts\.[23]\..* is not what was written"):
        load_experts(halves, back, check_data=True)
    lost = back / "nowhere" if distributed.get_rank() else back
    with pytest.raises(CheckpointError, match="nowhere is no checkpoint of safetensors"):
        load_experts(halves, lost, check_data=True)  # one rank does not see the files
    return same


def test_round_trip_to_another_ep_size(tmp_path: Path) -> None:
    source = save(hf_model("qwen3_moe"), tmp_path / "in")
    assert run_on_ranks(2, load_round_trip, source, tmp_path / "out") == [True, True]


@pytest.mark.long
def test_example() -> None:
    printed = run_example("load_mixtral_experts.py")
    for rank, numbers in ((0, "0 to 3"), (1, "4 to 7")):
        assert f"model.layers.1.mlp: experts {numbers}" in printed
        assert f"rank {rank} wrote model-0000{rank + 1}-of-00002.safetensors" in printed
    assert "not filled" not in printed
    assert "not used" not in printed
