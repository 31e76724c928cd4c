"""Names, slices and refusals of ``load_experts`` and ``save_experts``, in one process."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moe_groups._deepspeed.layers import GATE_BIAS, give_bias
from moe_groups.errors import (
    CheckpointError,
    CheckpointWarning,
    InvalidArgumentError,
    MoEGroupsError,
)
from moe_groups.weights.load import load_experts
from moe_groups.weights.names import expand, find_stored_layers, match_layers
from moe_groups.weights.safetensors_files import INDEX, SINGLE, SafetensorsFiles, StoredTensor
from moe_groups.weights.save import save_experts
from tests.support.hf_checkpoints import (
    DENSE_LAYERS,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    INNER,
    NUMBERED,
    PROJECTIONS,
    Decoder,
    hf_model,
    save,
    true_experts,
)

STYLES = [(family, fused) for family in FAMILIES for fused in (False, True)]


def decoder(family: str = "mixtral", **options: Any) -> Decoder:
    return Decoder(first=DENSE_LAYERS.get(family, 0), **options)


def experts_of(model: Decoder, number: str) -> list[Any]:
    experts: Any = model.blocks[number]["moe"].deepspeed_moe.experts.deepspeed_experts  # type: ignore[index]
    return list(experts)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as safetensors itself loads them."""
    found: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return save(hf_model("mixtral"), tmp_path / "mixtral")


# ---- what is read ---------------------------------------------------------------------


@pytest.mark.parametrize(("family", "fused"), STYLES)
@pytest.mark.parametrize("names", [PROJECTIONS, NUMBERED])
def test_weights_are_those_of_transformers(
    family: str, fused: bool, names: tuple[str, str, str], tmp_path: Path
) -> None:
    source = hf_model(family)
    model = decoder(family, names=names)
    loaded = load_experts(model, save(source, tmp_path, fused=fused), strict=False)
    for number, block in model.blocks.items():
        wanted = true_experts(source, int(number))
        for expert, matrices in zip(experts_of(model, number), wanted, strict=True):
            for own, name in zip(names, PROJECTIONS, strict=True):
                assert torch.equal(expert.get_submodule(own).weight, matrices[name])
        gate: Any = block["moe"].deepspeed_moe.gate  # type: ignore[index]
        assert torch.equal(gate.wg.weight, source.model.layers[int(number)].mlp.gate.weight)  # type: ignore[union-attr,index]
        assert loaded.experts[f"blocks.{number}.moe"] == range(EXPERTS)
    assert loaded.not_filled == []
    assert loaded.bytes_read == sum(p.nbytes for p in model.parameters())
    if family == "deepseek_v3":
        assert "model.layers.1.mlp.shared_experts.up_proj.weight" in loaded.unused


def test_a_fused_tensor_is_read_in_slices(tmp_path: Path) -> None:
    with SafetensorsFiles(save(hf_model("mixtral"), tmp_path, fused=True)) as files:
        layer = find_stored_layers(files.tensors)["model.layers.1.mlp"]
        up = layer.piece(2, "w3.weight")
        assert up is not None
        assert up.part == (2, slice(INNER, 2 * INNER))
        assert up.shape == (INNER, HIDDEN)
        assert files.read(up.tensor, up.part).is_contiguous()
        assert files.read(up.tensor, up.part).shape == (INNER, HIDDEN)


@pytest.mark.parametrize("fused", [False, True])
def test_values_become_the_models_dtype(fused: bool, tmp_path: Path) -> None:
    directory = save(hf_model("qwen3_moe", dtype=torch.bfloat16), tmp_path, fused=fused)
    model = decoder()
    load_experts(model, directory, strict=False)
    weight = experts_of(model, "0")[1].up_proj.weight
    name = "model.layers.0.mlp.experts"
    tensors = stored(directory)
    wanted = (
        tensors[f"{name}.gate_up_proj"][1, INNER:] if fused else tensors[f"{name}.1.up_proj.weight"]
    )
    assert weight.dtype == torch.float32
    assert torch.equal(weight, wanted.float())


def test_dense_tensors_of_the_same_name(tmp_path: Path) -> None:
    """A whole model with layers of ours in place of the blocks, strict."""
    source, model = hf_model("qwen3_moe"), hf_model("qwen3_moe", seed=1)
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        layer.mlp = decoder().blocks[str(number)]
    loaded = load_experts(model, save(source, tmp_path))
    assert loaded.unused == loaded.not_filled == []
    own = dict(model.named_parameters())
    for name, param in source.named_parameters():
        if ".mlp." not in name:
            assert torch.equal(own[name], param), name


def test_tied_weights_and_buffers(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3, bias=False)
            self.embed = nn.Embedding(3, 4)
            self.embed.weight = self.head.weight
            self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
            self.register_buffer("cache", torch.zeros(1), persistent=False)

    tensors = {"embed.weight": torch.randn(3, 4), "steps": torch.tensor([1, 2])}
    save_file(tensors, tmp_path / "model.safetensors")
    model = Tied()
    assert sorted(load_experts(model, tmp_path).filled) == ["head.weight", "steps"]
    assert torch.equal(model.head.weight, tensors["embed.weight"])
    assert torch.equal(model.get_buffer("steps"), tensors["steps"])


# ---- names ----------------------------------------------------------------------------


def test_names_of_the_callers_own(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(HIDDEN, INNER)
            self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def tensor(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes)

    prefix = "transformer.h.0.ffn"
    tensors = {f"{prefix}.router.weight": tensor(2, HIDDEN)}
    for number in range(2):
        expert = f"{prefix}.experts.{number}"
        tensors[f"{expert}.fc1.weight"] = tensor(INNER, HIDDEN)
        tensors[f"{expert}.fc1.bias"] = tensor(INNER)
        tensors[f"{expert}.fc2.weight"] = tensor(HIDDEN, INNER)
    save_file(tensors, tmp_path / "model.safetensors")
    from moe_groups import MoE

    model = nn.ModuleDict({"moe": MoE(HIDDEN, Plain(), num_experts=2)})
    names: dict[str, Any] = {
        "layers": {"moe": prefix},
        "matrices": {"up.weight": "fc1.weight", "up.bias": "fc1.bias", "down.weight": "fc2.weight"},
        "router": "router",
    }
    loaded = load_experts(model, tmp_path, **names)
    assert loaded.not_filled == loaded.unused == []
    experts: Any = model["moe"].deepspeed_moe.experts.deepspeed_experts  # type: ignore[union-attr]
    assert torch.equal(experts[1].up.bias, tensors[f"{prefix}.experts.1.fc1.bias"])

    save_experts(model, tmp_path / "back", family="mixtral", **names)
    back = stored(tmp_path / "back")
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    with pytest.raises(InvalidArgumentError, match=r"matrices names 'up.wieght'.*\['down.weight'"):
        load_experts(model, tmp_path, layers={"moe": prefix}, matrices={"up.wieght": "fc1.weight"})


@pytest.mark.parametrize(
    ("path", "prefix"),
    [
        ("model.layers.1.mlp", "model.layers.1.mlp"),
        ("blocks.3.moe", "model.layers.3.block_sparse_moe"),
        ("blocks.7.moe", None),  # two have that number
        ("blocks.3.experts.1", None),  # two numbers
        ("moe", None),
    ],
)
def test_layers_by_number(path: str, prefix: str | None) -> None:
    prefixes = ["model.layers.1.mlp", "model.layers.3.block_sparse_moe", "a.7.mlp", "b.7.mlp"]
    assert match_layers([path], prefixes, None).get(path) == prefix


def test_layers_that_share_a_number_are_not_guessed() -> None:
    assert match_layers(["a.3.moe", "b.3.moe"], ["model.layers.3.mlp"], None) == {}


def test_given_layers() -> None:
    paths = ["enc.0.moe", "enc.11.moe", "moe"]
    given = {"enc.{}.moe": "layers.{}.mlp", "moe": "last.mlp"}
    assert expand(paths, given) == {
        "enc.0.moe": "layers.0.mlp",
        "enc.11.moe": "layers.11.mlp",
        "moe": "last.mlp",
    }
    with pytest.raises(InvalidArgumentError, match=r"names 'dec.{}.moe', but the MoE layers are"):
        expand(paths, {"dec.{}.moe": "layers.{}.mlp"})
    with pytest.raises(InvalidArgumentError, match=r"the same name 'layers.0.mlp'"):
        expand(paths, {"enc.{}.moe": "layers.0.mlp"})
    with pytest.raises(InvalidArgumentError, match="more numbers"):
        expand(paths, {"moe": "layers.{}.mlp"})
    with pytest.raises(InvalidArgumentError, match=r"'moe' is 'x.mlp' in the checkpoint"):
        match_layers(paths, ["layers.0.mlp"], {"moe": "x.mlp"})


def test_shared_experts_are_no_layer() -> None:
    tensor = StoredTensor((4, 4), "F32", "model.safetensors")
    names = ["mlp.shared_experts.up_proj.weight", "mlp.shared_expert.up_proj.weight"]
    assert find_stored_layers({f"model.layers.0.{name}": tensor for name in names}) == {}


# ---- what is refused ------------------------------------------------------------------


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """The checkpoint with other tensors, in one file."""
    tensors = stored(directory)
    change(tensors)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, directory / "model.safetensors")


LAYER = "model.layers.1.block_sparse_moe"
EXPERT = f"{LAYER}.experts.2.w1.weight"


def _drop(tensors: dict[str, torch.Tensor], start: str) -> None:
    for name in [name for name in tensors if re.match(start, name)]:
        del tensors[name]


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT] = torch.zeros(INNER + 1, HIDDEN)


def _quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.float8_e4m3fn)


def _count(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.int32)


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "a matrix": (
        lambda tensors: _drop(tensors, EXPERT),
        rf"blocks.1.moe, expert 2, gate_proj.weight: the checkpoint's {LAYER} has it for others",
    ),
    "a matrix of all experts": (
        lambda tensors: _drop(tensors, rf"{LAYER}.experts.\d.w1"),
        r"blocks.1.moe.experts.\*.gate_proj.weight: the checkpoint has nothing for it",
    ),
    "an expert": (lambda tensors: _drop(tensors, f"{LAYER}.experts.2"), r"lacks the experts \[2\]"),
    "the last expert": (
        lambda tensors: _drop(tensors, f"{LAYER}.experts.3"),
        rf"blocks.1.moe: it has 4 experts, the checkpoint's {LAYER} has 3",
    ),
    "a router": (
        lambda tensors: _drop(tensors, f"{LAYER}.gate.weight"),
        r"blocks.1.moe.router.weight: the checkpoint has nothing for it",
    ),
    "a layer": (
        lambda tensors: _drop(tensors, LAYER),
        r"blocks.1.moe.experts.\*.gate_proj.weight: the checkpoint has nothing for it",
    ),
    "a shape": (_widen, rf"{EXPERT} has shape \(13, 16\), the model's is \(12, 16\)"),
    "quantized": (_quantize, r"is F8_E4M3, .* has to be converted to bfloat16 first"),
    "integers": (_count, r"is I32, which does not become torch.float32 by a copy"),
    "too much": (
        lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}),
        r"strict=False.\n  extra.weight: the model has no place for it$",
    ),
}


def only_experts(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "block_sparse_moe" not in name]:
        del tensors[name]


def refused(model: nn.Module, directory: Path, match: str, **options: Any) -> str:
    """The error, after which the model is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MoEGroupsError, match=match) as caught:
        load_experts(model, directory, **options)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    return str(caught.value)


def test_the_checkpoint_of_the_refusals_is_accepted(mixtral: Path) -> None:
    rewrite(mixtral, only_experts)
    assert load_experts(decoder(), mixtral).unused == []


@pytest.mark.parametrize("what", CHANGES)
def test_a_checkpoint_that_does_not_fit(what: str, mixtral: Path) -> None:
    change, message = CHANGES[what]

    def both(tensors: dict[str, torch.Tensor]) -> None:
        only_experts(tensors)
        change(tensors)

    rewrite(mixtral, both)
    assert "nothing has been loaded" in refused(decoder(), mixtral, message)


def test_fused_tensors_that_are_transposed(tmp_path: Path) -> None:
    directory = save(hf_model("mixtral"), tmp_path, fused=True)

    def transpose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    rewrite(directory, transpose)
    refused(decoder(), directory, r"gate_up_proj\[0, slice.* has shape \(8, 24\)", strict=False)


def test_fused_with_another_number_of_experts(tmp_path: Path) -> None:
    directory = save(hf_model("mixtral"), tmp_path, fused=True)
    model = decoder(num_experts=2)
    refused(model, directory, "it has 2 experts, .* has 4", strict=False)


def test_nothing_in_common(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    refused(decoder(), tmp_path, "no name of the checkpoint is one of the model", strict=False)


def test_layers_of_no_known_number(mixtral: Path) -> None:
    model = nn.ModuleDict({"norm": nn.Identity(), "moe": decoder().blocks["0"]["moe"]})  # type: ignore[index]
    message = r"MoE layers moe are none of the checkpoint's model.layers.0.block.*layers=\{...\}"
    refused(model, mixtral, message, strict=False)
    loaded = load_experts(
        model, mixtral, strict=False, layers={"moe": "model.layers.1.block_sparse_moe"}
    )
    assert loaded.not_filled == []


def test_without_the_package(mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)  # an import of it fails
    refused(decoder(), mixtral, r"need safetensors, .* pip install 'moe-groups\[safetensors\]'")
    with pytest.raises(InvalidArgumentError, match=r"moe-groups\[safetensors\]"):
        save_experts(decoder(), mixtral / "out", family="mixtral")


def test_many_problems_are_cut(mixtral: Path) -> None:
    assert "and 19 more" in refused(decoder(inner=5), mixtral, "has shape")


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _corrupt(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:30] = b"x" * 22  # in the JSON of the header
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_off, "is damaged or cut off"),
        (_corrupt, "is damaged or cut off"),
        (lambda path: path.write_bytes(b""), "is damaged or cut off"),
        (Path.unlink, "is missing"),
    ],
)
def test_damaged_files(damage: Callable[[Path], None], message: str, mixtral: Path) -> None:
    shard = sorted(mixtral.glob("*.safetensors"))[-1]
    damage(shard)
    refused(decoder(), mixtral, f"{shard.name} {message}", strict=False)


def test_an_index_of_another_checkpoint(mixtral: Path) -> None:
    index = json.loads((mixtral / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == shards[0])
    index["weight_map"][name] = shards[1]
    (mixtral / INDEX).write_text(json.dumps(index))
    refused(decoder(), mixtral, f"says that {name} is in {shards[1]}", strict=False)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(text: str, mixtral: Path) -> None:
    (mixtral / INDEX).write_text(text)
    refused(decoder(), mixtral, "index.json is damaged", strict=False)


def test_an_index_cannot_name_files_elsewhere(mixtral: Path) -> None:
    (mixtral / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')
    refused(decoder(), mixtral, "index.json is damaged", strict=False)


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(decoder(), tmp_path / "none", "is no checkpoint of safetensors")


def test_ranks_are_not_known(mixtral: Path) -> None:
    message = r"'blocks.0.moe' are distributed over 2 ranks.*call deepspeed.init_distributed"
    refused(Decoder(ep_size=2), mixtral, message)
    with pytest.raises(InvalidArgumentError, match=r"deepspeed.init_distributed\(\) first"):
        save_experts(Decoder(ep_size=2), mixtral / "out", family="mixtral")
    assert not (mixtral / "out").exists()


def test_other_arguments(mixtral: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"model=\[\] must be a torch module"):
        load_experts([], mixtral)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="family='llama' is unknown"):
        save_experts(decoder(), mixtral, family="llama")
    with pytest.raises(CheckpointError, match="meta device"):
        load_experts(decoder().to("meta"), mixtral, strict=False)


# ---- back -----------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "fused"), STYLES)
def test_round_trip(family: Any, fused: bool, tmp_path: Path) -> None:
    """What was loaded from either style comes back as transformers writes it, bit for bit."""
    source = hf_model(family)
    model = decoder(family)
    load_experts(model, save(source, tmp_path / "in", fused=fused), strict=False)
    written = save_experts(model, tmp_path / "out", family=family, max_shard_size=4000)
    assert all(path.stat().st_size < 6000 for path in written)
    assert sorted(written) == sorted((tmp_path / "out").glob("*.safetensors"))
    wanted, back = stored(save(source, tmp_path / "wanted")), stored(tmp_path / "out")
    kept = {name for name in wanted if ".experts." in name or name.endswith(".gate.weight")}
    assert set(back) == kept
    assert all(torch.equal(back[name], wanted[name]) for name in kept)
    again = decoder(family)
    load_experts(again, tmp_path / "out")
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(own, other)


def test_biases_of_balance_experts(mixtral: Path, tmp_path: Path) -> None:
    """They come back beside the router's weight; a checkpoint without them is refused."""
    model, again = decoder(), decoder()
    load_experts(model, mixtral, strict=False)
    for number, one in enumerate((model, again)):
        block: Any
        for block in one.blocks.values():
            give_bias(block["moe"])[0].get_buffer(GATE_BIAS).fill_(1.5 - number)
    save_experts(model, tmp_path / "out", family="mixtral")
    load_experts(again, tmp_path / "out")
    for name, bias in again.named_buffers():
        assert name.endswith(GATE_BIAS)
        assert bias.tolist() == [1.5] * len(bias)
    save_experts(decoder(), tmp_path / "without", family="mixtral")
    refused(again, tmp_path / "without", "router.weight_bias: the checkpoint has nothing for it")


def test_a_changed_bit_is_refused(mixtral: Path, tmp_path: Path) -> None:
    """In any tensor; for files of other programs a warning says that they cannot be compared."""
    model = decoder()
    with pytest.warns(CheckpointWarning, match="26 tensors of .* state no CRC-32"):
        load_experts(model, mixtral, strict=False, check_data=True)
    (path,) = save_experts(model, tmp_path / "out", family="mixtral")
    load_experts(model, tmp_path / "out", check_data=True)
    sound = path.read_bytes()
    start = 8 + int.from_bytes(sound[:8], "little")
    header = json.loads(sound[8:start])
    for name in header.keys() - {"__metadata__"}:
        first, end = header[name]["data_offsets"]
        data = bytearray(sound)
        data[start + (first + end) // 2] ^= 4
        path.write_bytes(data)
        load_experts(decoder(), tmp_path / "out")
        refused(decoder(), tmp_path / "out", f"{path.name}: {name} is not what", check_data=True)
    path.write_bytes(sound.replace(b'\\": ', b'\\":x', 1))
    refused(decoder(), tmp_path / "out", "list of CRC-32 is damaged")


@pytest.mark.parametrize(
    ("family", "like"), [("qwen2_moe", "qwen3_moe"), ("olmoe", "qwen3_moe"), ("minimax", "mixtral")]
)
def test_families_with_the_names_of_another(family: str, like: str, tmp_path: Path) -> None:
    """By the model type, or by a checkpoint that has the names."""
    model = decoder(like)
    save_experts(model, tmp_path / "wanted", family=like)
    save_experts(model, tmp_path / "type", family=family)
    save_experts(model, tmp_path / "names", family=save(hf_model(like), tmp_path / "hf"))
    for name in ("type", "names"):
        assert stored(tmp_path / name).keys() == stored(tmp_path / "wanted").keys()


def test_transformers_loads_what_was_saved(mixtral: Path, tmp_path: Path) -> None:
    from transformers import MixtralForCausalLM

    source, model = hf_model("mixtral"), hf_model("mixtral", seed=1)
    for number, layer in enumerate(model.model.layers):  # type: ignore[union-attr,arg-type]
        layer.mlp = decoder().blocks[str(number)]
    load_experts(model, mixtral)
    save_experts(model, tmp_path / "out", family="mixtral")
    shutil.copy(mixtral / "config.json", tmp_path / "out")
    back = MixtralForCausalLM.from_pretrained(tmp_path / "out")
    for name, param in source.named_parameters():
        assert torch.equal(back.get_parameter(name), param), name


def test_saves_that_are_refused(mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"already holds model-00001-of"):
        save_experts(decoder(), mixtral, family="mixtral")
    out = tmp_path / "out"
    pair = nn.ModuleDict({"a": decoder(), "b": decoder()})
    with pytest.raises(InvalidArgumentError, match=r"'a.blocks.0.moe': .* Say with layers"):
        save_experts(pair, out, family="mixtral")
    with pytest.raises(InvalidArgumentError, match="MoE layer 'moe' has no number"):
        save_experts(decoder().blocks["0"], out, family="mixtral")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be written"):
        save_experts(decoder(), tmp_path / "file", family="mixtral")
    assert not out.exists()


def test_a_file_that_is_written_again_is_refused(tmp_path: Path) -> None:
    """It is mapped anew after each 32 MiB, and must be the file whose header was checked."""
    large = {name: torch.zeros(2**25 + 1, dtype=torch.uint8) for name in "ab"}
    save_file(large, tmp_path / SINGLE)
    with SafetensorsFiles(tmp_path) as files:
        assert len(files.read("a")) == len(files.read("b")) == 2**25 + 1
        save_file(large | {"a": torch.ones(2**25 + 1, dtype=torch.uint8)}, tmp_path / SINGLE)
        with pytest.raises(CheckpointError, match="written again while it was read"):
            files.read("a")


# ---- models of transformers -----------------------------------------------------------


@pytest.mark.parametrize(("family", "fused"), STYLES)
def test_blocks_of_transformers(family: str, fused: bool, tmp_path: Path) -> None:
    """From either style into the model of transformers itself, and back."""
    source, model = hf_model(family), hf_model(family, seed=1)
    loaded = load_experts(model, save(source, tmp_path / "in", fused=fused))
    assert loaded.not_filled == loaded.unused == []
    assert loaded.experts == {
        f"model.layers.{number}.mlp": range(EXPERTS)
        for number in range(DENSE_LAYERS.get(family, 0), 2)
    }
    wanted = source.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    save_experts(model, tmp_path / "out", family=family)
    found, wanted = stored(tmp_path / "out"), stored(save(source, tmp_path / "wanted"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
