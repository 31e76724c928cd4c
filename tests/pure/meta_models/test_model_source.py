"""Models to plan for: known sizes, one rank's part of them, and every bad source."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_groups import ExpertTag, create_moe_param_groups, is_norm_or_bias, tag_experts
from moe_groups.errors import InvalidArgumentError, ParameterInputError
from moe_groups.meta_models.rank import shard_for_rank
from moe_groups.meta_models.source import load_model, names_function
from tests.pure.test_import import run

pytest.importorskip("transformers")

QWEN3_235B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
OLMOE_7B = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "vocab_size": 50304,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
}
TINY_MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, **TINY}
TINY_GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 8, **TINY}
TINY_DEEPSEEK = {
    "model_type": "deepseek_v3",
    **TINY,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
TINY_QWEN2 = {
    "model_type": "qwen2_moe",
    **TINY,
    "num_experts": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
}
TINY_MODELS = [TINY_MIXTRAL, TINY_GPT_OSS, TINY_DEEPSEEK, TINY_QWEN2]


def elements(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def is_expert(param: Any) -> bool:
    return not getattr(param, "allreduce", True)


def expert_elements(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters() if is_expert(param))


def write(path: Path, values: dict[str, Any]) -> str:
    file = path / "config.json"
    file.write_text(json.dumps(values))
    return str(file)


@pytest.fixture
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> nn.Module:
    return load_model(write(tmp_path, getattr(request, "param", TINY_MIXTRAL)))


each_tiny = pytest.mark.parametrize("tiny", TINY_MODELS, indirect=True)


# ---- load -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        ("mixtral", 46.7),
        (QWEN3_235B, 235.1),
        (DEEPSEEK_V3, 671.0),
        (OLMOE_7B, 6.92),
        (GPT_OSS_20B, 20.9),
        ("gpt_oss", 116.8),
    ],
)
def test_published_sizes(config: str | dict[str, Any], billions: float, tmp_path: Path) -> None:
    source = config if isinstance(config, str) else write(tmp_path, config)
    model = load_model(source)
    assert elements(model) == pytest.approx(billions * 1e9, rel=0.005)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_a_directory_with_a_config(tmp_path: Path) -> None:
    write(tmp_path, TINY_MIXTRAL)
    assert elements(load_model(str(tmp_path))) == elements(load_model(f"{tmp_path}/config.json"))


def test_a_directory_called_like_a_model_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk is meant, as with a path."""
    monkeypatch.chdir(tmp_path)
    Path("mixtral").mkdir()
    with pytest.raises(InvalidArgumentError, match=r"'mixtral.config\.json' does not exist"):
        load_model("mixtral")
    write(Path("mixtral"), TINY_MIXTRAL)
    assert elements(load_model("mixtral")) < 1e6


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float8_e4m3fn"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_dtype(named: dict[str, str], expected: torch.dtype, tmp_path: Path) -> None:
    model = load_model(write(tmp_path, TINY_MIXTRAL | named))
    assert {param.dtype for param in model.parameters()} == {expected}


def test_tied_embeddings_count_once(tmp_path: Path) -> None:
    untied = load_model(write(tmp_path, TINY_MIXTRAL))
    tied = load_model(write(tmp_path, TINY_MIXTRAL | {"tie_word_embeddings": True}))
    assert elements(untied) - elements(tied) == 64 * 32
    assert elements(shard_for_rank(tied)) == elements(tied)


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, {"model_type": "llama", **TINY}))
    (group,) = create_moe_param_groups(shard_for_rank(model))
    assert sum(param.numel() for param in group["params"]) == elements(model)
    with pytest.raises(
        InvalidArgumentError, match="ep_size=4 needs experts, and there are none in"
    ):
        shard_for_rank(model, ep_size=4)


def test_transformers_is_imported_when_it_is_needed() -> None:
    run("""
import sys
import moe_groups.meta_models.source, moe_groups.meta_models.rank
moe_groups.meta_models.source.load_model("tests.pure.meta_models.test_model_source_models:dense")
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"transformers", "deepspeed"}, loaded
""")


# ---- module:function ------------------------------------------------------------------

MODELS = """
import torch
from torch import nn
from moe_groups import ExpertTag, set_expert_tag

class Models:
    @staticmethod
    def tagged():
        experts = nn.ModuleList([nn.Linear(4, 4)])
        model = nn.ModuleDict({"dense": nn.Linear(4, 4), "experts": experts})
        for param in experts.parameters():
            set_expert_tag(param, ExpertTag("ep_size_2"))
        return model

def build(): return Models.tagged()
def layer():
    from moe_groups import MoE
    return nn.Sequential(nn.Linear(4, 4), MoE(4, nn.Linear(4, 4), num_experts=4, ep_size=2))
def nothing(): return None
def needs_an_argument(size): return nn.Linear(size, size)
def fails(): raise RuntimeError("first line\\nsecond line " + "x" * 1000)
def leaves(): raise SystemExit(3)
def asks_for_ranks(): return nn.Linear(4, torch.distributed.get_world_size(
    torch.distributed.new_group([0])))
def makes_groups():
    model = layer()
    model[1].set_deepspeed_parallelism()
    return model
def pipeline():
    from deepspeed.pipe import PipelineModule
    return PipelineModule([nn.Linear(4, 4)], num_stages=1)
a_number = 3
"""


@pytest.fixture
def in_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the module ``planned_models`` and a package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planned_models.py").write_text(MODELS)
    package = tmp_path / "planned_package"
    package.mkdir()
    (package / "broken.py").write_text("import no_such_dependency")
    (package / "script.py").write_text("import sys; sys.exit('usage: script')")
    before = list(sys.path)
    yield tmp_path
    assert sys.path == before
    for name in [name for name in sys.modules if name.startswith("planned_")]:
        del sys.modules[name]


@pytest.mark.parametrize("function", ["build", "Models.tagged"])
def test_a_function_in_the_current_directory(function: str, in_directory: Path) -> None:
    source = f"planned_models:{function}"
    assert names_function(source)
    model = load_model(source)
    assert {param.device.type for param in model.parameters()} == {"meta"}
    assert tag_experts(model)["experts.0.weight"].parallel_group == "ep_size_2"


def test_a_function_with_deepspeeds_layer(in_directory: Path) -> None:
    model = load_model("planned_models:layer")
    names = [group["name"] for group in create_moe_param_groups(model, split_by="expert")]
    assert [name for name in names if "expert" in name] == [
        "ep_size_2_1.expert.0",
        "ep_size_2_1.expert.1",
    ]
    assert {param.device.type for param in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:build", r"module 'no_such_module' cannot be imported: ModuleNotFound"),
        ("planned_package.broken:build", r"imported: .*No module named 'no_such_dependency'"),
        ("planned_package.script:build", r"imported: SystemExit: usage: script"),
        ("planned_models:bild", r"no function 'bild'; did you mean 'build'"),
        ("planned_models:Models.nothing", r"no function 'Models\.nothing'"),
        ("planned_models:a_number", r"is no function but int"),
        ("planned_models:nothing", r"returned NoneType: it must return the model"),
        ("planned_models:needs_an_argument", r"failed: TypeError: .*'size'$"),
        ("planned_models:fails", r"failed: RuntimeError: first line second line x+\.\.\.$"),
        ("planned_models:leaves", r"failed: SystemExit: 3$"),
        ("planned_models:asks_for_ranks", r"failed: .* It needs process groups"),
        ("planned_models:makes_groups", r"failed: .* It needs process groups"),
        ("planned_models:pipeline", r"failed: .* It needs process groups"),
    ],
)
def test_bad_functions(source: str, message: str, in_directory: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


# ---- bad sources ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "source is empty"),
        ("no/such/config.json", "'no/such/config.json' does not exist: .*'mixtral'"),
        ("config.jsn.json", "does not exist"),
        ("mistralai/Mixtral-8x7B-v0.1", "does not exist: .*download it first"),
        ("a:b:c", "does not exist: .*'module:function'"),
        ("module:", "does not exist: .*'module:function'"),
        ("null\0/byte", "does not exist"),
        ("x" * 5000 + "/config.json", "does not exist"),
        ("mixtrall", r"'mixtrall' is unknown to transformers [\d.]+; did you mean 'mixtral'"),
        ("Qwen3-MoE", "did you mean 'qwen3_moe'"),
        ("zzzzzzzz", r"'zzzzzzzz' is unknown to transformers [\d.]+$"),
    ],
)
def test_bad_sources(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        load_model(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot use .*not a valid JSON file"),
        (b"{", "cannot use .*not a valid JSON file"),
        (b"\xff\xfe\x00", "cannot use .*not a valid JSON file"),
        (b"[" * 100_000, "cannot use .*RecursionError"),
        (b"[1]", "cannot use .*config.json"),
        (b"{}", "Should have a `model_type` key"),
        (b'{"model_type": 3}', "cannot use .*model type `3`"),
        (b'{"model_type": "mixtrall"}', "model type `mixtrall` but .* does not recognize"),
        (b'{"model_type": "mixtral", "hidden_size": "wide"}', "cannot .*config.json"),
        (b'{"model_type": "mixtral", "hidden_size": -8}', "cannot .*config.json"),
        (b'{"model_type": "siglip_text_model"}', r"no model of its own for .*\(SiglipTextConfig\)"),
    ],
)
def test_bad_files(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        load_model(str(file))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_an_unreadable_directory(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"config\.json' does not exist"):
        load_model(str(tmp_path))


def test_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for source in ("mixtral", write(tmp_path, TINY_MIXTRAL)):
        with pytest.raises(InvalidArgumentError, match=r"pip install 'moe-groups\[cli\]'"):
            load_model(source)


# ---- expert parallel ------------------------------------------------------------------


@each_tiny
@pytest.mark.parametrize("experts", ["list", "fused"])
def test_ranks_of_experts_add_up(tiny: nn.Module, experts: Any) -> None:
    before = {name: param.shape for name, param in tiny.named_parameters()}
    whole = shard_for_rank(tiny, experts=experts)
    assert elements(whole) == elements(tiny)
    part = shard_for_rank(tiny, ep_size=4, experts=experts)
    assert 4 * expert_elements(part) == expert_elements(whole) > 0
    assert elements(whole) - elements(part) == 3 * expert_elements(part)
    assert {name: param.shape for name, param in tiny.named_parameters()} == before
    assert not any(is_expert(param) for param in tiny.parameters())


@each_tiny
@pytest.mark.parametrize("experts", ["list", "fused"])
def test_groups_by_expert(tiny: nn.Module, experts: Any) -> None:
    rank = shard_for_rank(tiny, ep_size=4, experts=experts)
    layers = [f"model.layers.{n}.mlp" for n in range(5)]
    if "Deepseek" in type(tiny).__name__:
        layers = layers[2:]
    suffixes = [".expert.0", ".expert.1"] if experts == "list" else [""]
    groups = create_moe_param_groups(rank, split_by="expert")
    names = [group["name"] for group in groups if group.get("moe")]
    assert names == [f"ep_size_4_{layer}{suffix}" for layer in layers for suffix in suffixes]
    (dense,) = [group for group in groups if not group.get("moe")]
    assert sum(p.numel() for p in dense["params"]) == elements(rank) - expert_elements(rank)
    modules = create_moe_param_groups(rank, split_by="module")
    assert [g["name"] for g in modules if g.get("moe")] == [f"ep_size_4_{n}" for n in layers]


def test_a_rank_of_deepseek_v3() -> None:
    """58 layers of 256 experts, 7168 wide and 2048 inside; 8 of them and 1/8 of the layers here."""
    model = load_model("deepseek_v3")
    rank = shard_for_rank(model, ep_size=32, tp_size=4, pp_size=8, pp_rank=7)
    assert expert_elements(rank) == 7 * 8 * 3 * 7168 * 2048
    names = [g["name"] for g in create_moe_param_groups(rank, split_by="expert") if g.get("moe")]
    assert names == [
        f"ep_size_32_model.layers.{layer}.mlp.expert.{expert}"
        for layer in range(54, 61)
        for expert in range(8)
    ]


def test_an_expert_of_its_own_has_three_matrices(tiny: nn.Module) -> None:
    tags = tag_experts(shard_for_rank(tiny, ep_size=2))
    label = "model.layers.3.mlp"
    assert {name: tag for name, tag in tags.items() if f"{label}.experts.1." in name} == {
        f"{label}.experts.1.{matrix}.weight": ExpertTag("ep_size_2", label, 1, 4)
        for matrix in ("gate_proj", "up_proj", "down_proj")
    }
    shapes = {tuple(p.shape) for p in shard_for_rank(tiny).parameters() if is_expert(p)}
    assert shapes == {(48, 32), (32, 48)}


@pytest.mark.parametrize("tiny", [TINY_GPT_OSS], indirect=True)
@pytest.mark.parametrize("experts", ["list", "fused"])
def test_biases_of_experts(tiny: nn.Module, experts: Any) -> None:
    rank = shard_for_rank(tiny, ep_size=4, experts=experts)
    own = {
        name.partition("layers.0.mlp.experts.")[2]: tuple(param.shape)
        for name, param in rank.named_parameters()
        if "layers.0.mlp.experts." in name
    }
    if experts == "fused":
        assert own == {
            "gate_up_proj": (2, 32, 96),
            "gate_up_proj_bias": (2, 96),
            "down_proj": (2, 48, 32),
            "down_proj_bias": (2, 32),
        }
    else:
        assert own == {
            f"{number}.{name}": shape
            for number in range(2)
            for name, shape in {
                "gate_proj.weight": (32, 48),
                "gate_proj.bias": (48,),
                "up_proj.weight": (32, 48),
                "up_proj.bias": (48,),
                "down_proj.weight": (48, 32),
                "down_proj.bias": (32,),
            }.items()
        }
    groups = create_moe_param_groups(rank, weight_decay=0.1, no_decay=is_norm_or_bias)
    decayed = {g["weight_decay"] for g in groups for p in g["params"] if is_expert(p)}
    assert decayed == {0.0, 0.1}


@pytest.mark.parametrize("tiny", [TINY_DEEPSEEK, TINY_QWEN2], indirect=True)
def test_shared_experts_are_dense(tiny: nn.Module) -> None:
    tags = tag_experts(shard_for_rank(tiny, ep_size=2))
    assert tags
    assert not [name for name in tags if "shared" in name]


class Tree(nn.Module):
    """A module with the given children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class ExpertGLU(nn.Module):
    """The tensors of all experts of a layer."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(f"w{number}", nn.Parameter(torch.empty(shape, device="meta")))


def listed_model(experts: int = 4, layers: int = 2, **more: nn.Module) -> nn.Module:
    """Experts as transformers kept them before version 5."""

    def layer() -> nn.Module:
        bank = nn.ModuleList(Tree(w1=nn.Linear(8, 6), w2=nn.Linear(6, 8)) for _ in range(experts))
        return Tree(moe=Tree(gate=nn.Linear(8, experts), experts=bank))

    with torch.device("meta"):
        return Tree(layers=nn.ModuleList(layer() for _ in range(layers)), **more)


def test_experts_in_a_list() -> None:
    model = listed_model()
    rank = shard_for_rank(model, ep_size=2)
    tags = tag_experts(rank)
    assert Counter(tags.values()) == {
        ExpertTag("ep_size_2", f"layers.{layer}.moe", number, 2): 4
        for layer in range(2)
        for number in range(2)
    }
    assert 2 * expert_elements(rank) == expert_elements(shard_for_rank(model))


def test_experts_in_a_list_become_one_tensor() -> None:
    rank = shard_for_rank(listed_model(), ep_size=2, experts="fused")
    shapes = {n: tuple(p.shape) for n, p in rank.named_parameters() if "layers.1.moe.exp" in n}
    assert {name.rpartition("experts.")[2]: shape for name, shape in shapes.items()} == {
        "w1": (2, 6, 8),
        "w1_bias": (2, 6),
        "w2": (2, 8, 6),
        "w2_bias": (2, 8),
    }
    assert {(tag.place, tag.fused) for tag in tag_experts(rank).values()} == {
        (("ep_size_2", f"layers.{layer}.moe", None), True) for layer in range(2)
    }


def test_one_layer_in_two_modules(tmp_path: Path) -> None:
    """JetMoe's inputs and outputs; it has experts in its attention too."""
    config = {"model_type": "jetmoe", "hidden_size": 32, "intermediate_size": 16}
    config |= {"num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 8, "vocab_size": 64}
    model = load_model(write(tmp_path, config))
    for experts, tensors in (("list", 4), ("fused", 2)):
        rank = shard_for_rank(model, ep_size=4, experts=experts)  # type: ignore[arg-type]
        found = Counter(tag.layer for tag in tag_experts(rank).values())
        assert found == {"model.layers.0.self_attention": tensors, "model.layers.0.mlp": tensors}
        assert 4 * expert_elements(rank) == expert_elements(shard_for_rank(model))


@pytest.mark.parametrize("experts", ["list", "fused"])
def test_tensors_with_different_numbers_of_experts(experts: Any) -> None:
    """As in LongCat, whose experts that do nothing have rows in one of two tensors."""
    model = Tree(ffn=Tree(experts=ExpertGLU((6, 10, 4), (4, 3, 5), (9,))))
    rank = shard_for_rank(model, ep_size=2, experts=experts)
    assert elements(rank) == (6 * 40 + 4 * 15) // 2 + 9
    tags = tag_experts(rank)
    assert sum(p.numel() for n, p in rank.named_parameters() if n in tags) == elements(rank) - 9
    numbers = Counter(tag.expert_number for tag in tags.values())
    assert numbers == ({0: 2, 1: 2, 2: 1} if experts == "list" else {None: 2})
    assert {tag.layer for tag in tags.values()} == {"ffn"}
    with pytest.raises(InvalidArgumentError, match="ep_size=3 does not divide the 4 experts of"):
        shard_for_rank(model, ep_size=3)


@pytest.mark.parametrize("experts", ["list", "fused"])
def test_what_experts_have_in_common_is_dense(experts: Any) -> None:
    """As in Muse Spark, whose experts share a norm."""
    common = ExpertGLU((4, 10, 4), (4, 3, 5))
    common.norm = nn.RMSNorm(5, device="meta")
    rank = shard_for_rank(Tree(ffn=Tree(experts=common)), ep_size=2, experts=experts)
    assert expert_elements(rank) == (4 * 40 + 4 * 15) // 2
    assert not is_expert(rank.get_parameter("ffn.experts.norm.weight"))
    layers = {tag.place for tag in tag_experts(rank).values()}
    assert layers == {("ep_size_2", "ffn", n) for n in ((0, 1) if experts == "list" else (None,))}


def test_a_class_of_experts_called_shared() -> None:
    """As in GraniteMoeShared, which calls all its classes so; what is shared says its slot."""

    class SharedParallelExperts(ExpertGLU):
        pass

    moe = Tree(input_linear=SharedParallelExperts((4, 6, 2)), shared_experts=ExpertGLU((1, 2, 2)))
    rank = shard_for_rank(Tree(moe=moe), ep_size=2)
    assert expert_elements(rank) == 4 * 12 // 2
    assert elements(rank) == 4 * 12 // 2 + 4


def test_a_tower_with_few_experts_stays_whole() -> None:
    """As in dots3_note: 4 experts in the vision tower. In the decoder it is refused."""
    tower = listed_model(experts=2, layers=1)
    rank = shard_for_rank(listed_model(experts=8, layers=4, tower=tower), ep_size=4)
    assert {tag.layer for tag in tag_experts(rank).values()} == {
        f"layers.{n}.moe" for n in range(4)
    }
    assert expert_elements(rank.get_submodule("tower")) == 0
    rank = shard_for_rank(listed_model(experts=8, layers=4, tower=tower), ep_size=2)
    assert 2 * expert_elements(rank.get_submodule("tower")) == expert_elements(
        shard_for_rank(tower)
    )
    with pytest.raises(InvalidArgumentError, match=r"divide the 2 experts of 'layers\.0\.moe'"):
        shard_for_rank(tower, ep_size=4)


def test_a_frozen_expert_stays_frozen(tiny: nn.Module) -> None:
    for name, param in tiny.named_parameters():
        param.requires_grad_("layers.1." not in name)
    for experts in ("list", "fused"):
        rank = shard_for_rank(tiny, experts=experts)
        frozen = {name for name, param in rank.named_parameters() if not param.requires_grad}
        assert frozen == {name for name, _ in rank.named_parameters() if "layers.1." in name}


# ---- tensor parallel ------------------------------------------------------------------


WHOLE_ON_EVERY_RANK = re.compile(
    r"norm|sinks|_a_proj|mlp\.gate\.|expert_gate\.|\.router\.|(o|down)_proj\.bias"
)


@each_tiny
def test_tensor_slices_add_up(tiny: nn.Module) -> None:
    """What is divided comes out whole from two ranks, what is replicated is as it was."""
    whole = dict(shard_for_rank(tiny).named_parameters())
    part = dict(shard_for_rank(tiny, tp_size=2).named_parameters())
    assert list(part) == list(whole)
    divided = {name for name, param in part.items() if 2 * param.numel() == whole[name].numel()}
    replicated = {name for name, param in part.items() if param.shape == whole[name].shape}
    assert divided | replicated == set(whole)
    for name, param in whole.items():
        stays = is_expert(param) or WHOLE_ON_EVERY_RANK.search(name)
        assert name in (replicated if stays else divided)


def test_an_uneven_slice_counts_the_larger_share(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, TINY_MIXTRAL | {"vocab_size": 65}))
    part = shard_for_rank(model, tp_size=2)
    assert part.get_parameter("lm_head.weight").shape == (33, 32)
    assert part.get_parameter("model.embed_tokens.weight").shape == (33, 32)


def test_tied_embeddings_are_divided_once(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, {"model_type": "gpt2", "n_layer": 2}))
    part = shard_for_rank(model, tp_size=2)
    assert part.get_parameter("lm_head.weight") is part.get_parameter("transformer.wte.weight")
    assert part.get_parameter("transformer.wte.weight").shape == (math.ceil(50257 / 2), 768)
    assert part.get_parameter("transformer.wpe.weight").shape == (1024, 768)
    assert part.get_parameter("transformer.h.0.mlp.c_fc.weight").numel() == 768 * 3072 // 2


# ---- pipeline -------------------------------------------------------------------------


@each_tiny
@pytest.mark.parametrize("pp_size", [2, 3, 5])
def test_stages_add_up(tiny: nn.Module, pp_size: int) -> None:
    whole = {name: param.shape for name, param in shard_for_rank(tiny).named_parameters()}
    stages = [shard_for_rank(tiny, pp_size=pp_size, pp_rank=rank) for rank in range(pp_size)]
    found = [(name, p.shape) for stage in stages for name, p in stage.named_parameters()]
    assert found == list(whole.items()), "every parameter on one stage, in the model's order"
    layers = [len(stage.get_submodule("model.layers")._modules) for stage in stages]
    assert sum(layers) == 5
    assert layers == sorted(layers, reverse=True)
    assert max(layers) - min(layers) <= 1
    assert ["model.embed_tokens.weight" in dict(s.named_parameters()) for s in stages] == [
        True,
        *[False] * (pp_size - 1),
    ]
    assert ["lm_head.weight" in dict(stage.named_parameters()) for stage in stages] == [
        *[False] * (pp_size - 1),
        True,
    ]


def test_stages_keep_the_numbers_of_their_layers(tiny: nn.Module) -> None:
    stage = shard_for_rank(tiny, ep_size=8, pp_size=2, pp_rank=1)
    groups = create_moe_param_groups(stage, split_by="expert")
    assert [g["name"] for g in groups if g.get("moe")] == [
        f"ep_size_8_model.layers.{layer}.mlp.expert.0" for layer in (3, 4)
    ]


def test_tied_embeddings_are_on_the_first_and_the_last_stage(tmp_path: Path) -> None:
    model = load_model(write(tmp_path, TINY_MIXTRAL | {"tie_word_embeddings": True}))
    stages = [shard_for_rank(model, pp_size=2, pp_rank=rank) for rank in range(2)]
    assert sum(map(elements, stages)) == elements(model) + 64 * 32


def test_parameters_beside_the_layers_are_on_the_first_stage() -> None:
    model = listed_model()
    model.register_parameter("bias", nn.Parameter(torch.empty(8, device="meta")))
    first, last = (shard_for_rank(model, pp_size=2, pp_rank=rank) for rank in range(2))
    assert "bias" in dict(first.named_parameters())
    assert "bias" not in dict(last.named_parameters())


def test_all_at_once(tiny: nn.Module) -> None:
    """Mixtral by hand: two of five layers, half of the dense part, a quarter of the experts."""
    rank = shard_for_rank(tiny, ep_size=4, tp_size=2, pp_size=2, pp_rank=1)
    attention = 32 * 8 * (4 + 2 + 2 + 4) // 2
    layer = attention + 2 * 32 + 8 * 32 + 2 * 3 * 32 * 48
    assert elements(rank) == 2 * layer + 32 + 64 * 32 // 2


# ---- bad topologies -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ep_size": 3}, r"ep_size=3 does not divide the 8 experts of 'model\.layers\.0\.mlp'"),
        ({"ep_size": 16}, r"ep_size=16 does not divide the 8 experts"),
        ({"pp_size": 6}, r"pp_size=6 is more than the 5 layers of 'model\.layers'"),
        ({"pp_size": 2, "pp_rank": 2}, r"pp_rank=2 is no stage of 2"),
        ({"pp_rank": -1}, r"pp_rank=-1 is no stage of 1"),
    ],
)
def test_bad_topologies(options: dict[str, Any], message: str, tiny: nn.Module) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        shard_for_rank(tiny, **options)


def test_a_model_without_layers_has_no_stages() -> None:
    with pytest.raises(ParameterInputError, match=r"no nn\.ModuleList of layers"):
        shard_for_rank(nn.Linear(2, 2), pp_size=2)


def test_experts_of_unknown_form() -> None:
    model = Tree(ffn=Tree(experts=Tree(mlp=ExpertGLU((16, 4), (16, 4)))))
    with pytest.raises(ParameterInputError, match=r"'ffn\.experts\.mlp' \(ExpertGLU\) holds expe"):
        shard_for_rank(model)
    model = Tree(experts=nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)]))
    with pytest.raises(ParameterInputError, match="'experts' differ in their parameters"):
        shard_for_rank(model)
