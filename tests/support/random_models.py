"""Random MoE models for Hypothesis, with the expected group of each parameter."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from moe_groups import ExpertTag, set_expert_tag, tag_experts

DTYPES = (torch.float32, torch.bfloat16)
FORMS = ("module", "params", "named", "groups")
# Names that could collide with each other, with ours, or with process-group keys.
GIVEN_NAMES = (
    "a", "a", "b c", "b_c", "", None, 7, "dense", "dense.tile.0", "ep_size_2",
    "ep_size_2_layers.0", "ep_size_2_experts", "group.1", "no_decay", "float32",
)  # fmt: skip

Place = tuple[str, str, int | None]
"""Parallel group, layer and expert number."""


@dataclass
class Row:
    """A parameter, and its place, known from how it was made."""

    name: str
    param: nn.Parameter
    place: Place | None = None
    source: int = 0

    @property
    def grouped(self) -> bool:
        return self.param.requires_grad and self.param.numel() > 0

    def key(self, split_by: str) -> Any:
        """The key that all parameters in this one's group must have."""
        depth = {"parallel_group": 1, "module": 2, "expert": 3}[split_by]
        return self.source, self.param.dtype, self.place and self.place[:depth]

    def __repr__(self) -> str:  # for Hypothesis' report, without values
        frozen = "" if self.param.requires_grad else " frozen"
        return f"<{self.name} {self.param.numel()} {self.param.dtype}{frozen} {self.place}>"


@dataclass
class Case:
    """A model, its parameters in the model's order, and one form of passing them."""

    rows: list[Row]
    form: str
    given: Any = field(repr=False)
    groups: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    model: nn.Module = field(default_factory=nn.Module, repr=False)

    @property
    def grouped(self) -> list[Row]:
        return [row for row in self.rows if row.grouped]


@st.composite
def cases(
    draw: st.DrawFn,
    forms: tuple[str, ...] = FORMS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    min_layers: int = 0,
) -> Case:
    model = nn.Module()
    rows: list[Row] = []

    def parameter(owner: nn.Module, path: str, name: str, fused: int = 0) -> Row:
        numel = draw(st.integers(0, 9))
        shape = (fused, numel, 1) if fused else (numel,)
        param = nn.Parameter(torch.zeros(shape, dtype=draw(st.sampled_from(dtypes))))
        param.requires_grad_(draw(st.integers(0, 4)) > 0)
        owner.register_parameter(name, param)
        return Row(f"{path}{name}", param)

    def tie(owner: nn.Module, candidates: list[Row]) -> None:
        if draw(st.booleans()):
            owner.register_parameter("tied", draw(st.sampled_from(candidates)).param)

    rows += [parameter(model, "", f"w{i}") for i in range(draw(st.integers(1, 4)))]
    tie(model, rows)
    model.layers = nn.ModuleList()
    for index in range(draw(st.integers(min_layers, 3))):
        layer = nn.Module()
        model.layers.append(layer)
        rows += _draw_layer(draw, layer, f"layers.{index}", parameter, tie)
    # No trainable parameter, and none in any expert, are errors, which other tests cover.
    for first in (rows[0], next((row for row in rows if row.place), rows[0])):
        first.param.requires_grad_()
        first.param.data = torch.zeros(first.param.numel() or 3, dtype=first.param.dtype)
    return _draw_form(draw, draw(st.sampled_from(forms)), model, rows)


def _draw_layer(
    draw: st.DrawFn, layer: nn.Module, path: str, parameter: Any, tie: Any
) -> list[Row]:
    """A gate and experts: hand-made, hand-made with labels, or fused in one tensor."""
    kind = draw(st.sampled_from(("plain", "labelled", "fused")))
    parallel_group = f"ep_size_{draw(st.sampled_from((1, 2, 2, 4, 16)))}"
    label = f"my.{path}" if kind == "labelled" else path
    rows: list[Row] = [parameter(layer, f"{path}.", "gate")]
    experts: list[Row] = []
    if kind == "fused":
        layer.experts = nn.Module()
        for name in ("w0", "w1")[: draw(st.integers(1, 2))]:
            experts.append(parameter(layer.experts, f"{path}.experts.", name, fused=2))
            experts[-1].place = (parallel_group, label, None)
    else:
        layer.experts = nn.ModuleList()
        for number in range(draw(st.integers(1, 3))):
            expert = nn.Module()
            layer.experts.append(expert)
            for name in ("w0", "w1")[: draw(st.integers(1, 2))]:
                inner = f"{path}.experts.{number}."
                experts.append(parameter(expert, inner, name))
                experts[-1].place = (parallel_group, label, number)
            tie(expert, experts)
    for row in experts:
        if kind == "labelled":
            assert row.place is not None
            set_expert_tag(row.param, ExpertTag(*row.place))
        else:  # only the attributes that DeepSpeed sets
            row.param.allreduce = False  # type: ignore[attr-defined]
            row.param.group_name = parallel_group  # type: ignore[attr-defined]
    return rows + experts


def _draw_form(draw: st.DrawFn, form: str, model: nn.Module, rows: list[Row]) -> Case:
    if form == "module":
        return Case(rows, form, model, model=model)
    tag_experts(model)  # parameters do not name their layer
    if form == "params":
        params = [row.param for row in rows]
        again = draw(st.lists(st.sampled_from(params), max_size=2))  # tied parameters appear twice
        return Case(rows, form, params + again, model=model)
    if form == "named":
        return Case(rows, form, [(row.name, row.param) for row in rows], model=model)
    count = draw(st.integers(1, 4))
    for row in rows:
        row.source = draw(st.integers(0, count - 1))
    groups, dicts = [], []
    for source in range(count):
        options = draw(_options(source))
        mine = [row for row in rows if row.source == source]
        named = draw(st.booleans())
        members: Any = [(r.name, r.param) if named else r.param for r in mine]
        groups.append(options)
        dicts.append({"params": members, **options})
    rows = sorted(rows, key=lambda row: row.source)
    return Case(rows, form, dicts, groups, model)


@st.composite
def _options(draw: st.DrawFn, source: int) -> dict[str, Any]:
    """Hyperparameters of one of the caller's groups; some keys are missing."""
    values = {
        "name": draw(st.sampled_from(GIVEN_NAMES)),
        "lr": draw(st.sampled_from((0.1, 0.2, torch.tensor(0.1)))),
        "weight_decay": draw(st.sampled_from((0.0, 0.5))),
        "betas": (0.9, 0.9 + source / 100),
        "custom": draw(st.sampled_from((None, "x", source))),
    }
    return {key: value for key, value in values.items() if draw(st.booleans())}
