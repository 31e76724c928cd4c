"""What AutoEP packs from each layout that it knows, unpacked into the same again."""

from typing import Any

import pytest
import torch
from torch import nn

from moe_groups._deepspeed.autoep.source_layers import _source_layer

base = pytest.importorskip(
    "deepspeed.module_inject.auto_ep_presets.base", reason="DeepSpeed before 0.19.2 has no AutoEP"
)
EXPERTS, HIDDEN, INNER = 4, 8, 6


def fused(**shapes: tuple[int, int]) -> nn.Module:
    experts = nn.Module()
    for name, shape in shapes.items():
        experts.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *shape)))
    return experts


def numbered() -> nn.Module:
    def expert() -> nn.Module:
        up, down = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(INNER, HIDDEN, bias=False)
        gate = nn.Linear(HIDDEN, INNER, bias=False)
        return nn.ModuleDict({"gate_proj": gate, "up_proj": up, "down_proj": down})

    return nn.ModuleList(expert() for _ in range(EXPERTS))


SPLIT = "gate_proj", "down_proj", "up_proj"
BOTH = "gate_up_proj", "down_proj", None
LAYOUTS: dict[str, tuple[nn.Module, tuple[str, str, str | None]]] = {
    "both in one": (fused(gate_up_proj=(2 * INNER, HIDDEN), down_proj=(HIDDEN, INNER)), BOTH),
    "transposed": (fused(gate_up_proj=(HIDDEN, 2 * INNER), down_proj=(INNER, HIDDEN)), BOTH),
    "apart": (
        fused(gate_proj=(INNER, HIDDEN), down_proj=(HIDDEN, INNER), up_proj=(INNER, HIDDEN)),
        SPLIT,
    ),
    "numbered": (numbered(), SPLIT),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str) -> None:
    from deepspeed.moe.ep_repack import repack_expert_weights

    experts, names = LAYOUTS[layout]
    fields: dict[str, Any] = dict.fromkeys(base.MoELayerSpec.__dataclass_fields__)
    fields |= {"router_name": "gate", "experts_name": "experts", "num_experts": EXPERTS}
    fields |= dict(zip(("expert_w1_name", "expert_w2_name", "expert_w3_name"), names, strict=True))
    fields["expert_storage"] = "module_list" if layout == "numbered" else "fused_3d"
    spec = base.MoELayerSpec(**fields)
    layer = nn.ModuleDict({"experts": experts})
    parts = [repack_expert_weights(experts, spec, rank, 2) for rank in range(2)]
    packed = {
        name: torch.cat(own)
        for name, own in zip(("w1", "w2", "w3"), zip(*parts, strict=True), strict=True)
    }
    found = _source_layer(layer, spec).unpack(packed)
    wanted = layer.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
