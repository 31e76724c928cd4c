"""Find the experts of a whole model, as Hugging Face keeps them.

The experts of a layer are tensors with one dimension more (``gate_up_proj`` of shape
``(experts, 2 * inner, hidden)``) or, in older versions, a list of modules.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_groups.errors import ParameterInputError
from moe_groups.hand_made import layer_path
from moe_groups.module_names import ModuleNode, named_parameters
from moe_groups.tags import label_from_path

EXPERTS = "experts"
_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer of a whole model.

    Attributes:
        path: of the layer.
        owner: the module that holds what follows.
        parts: its children that hold experts, with their names there: one list of expert
            modules, or modules that hold the tensors of all experts.
        fused: the parts hold tensors of all experts.
    """

    path: str
    owner: nn.Module
    parts: dict[str, nn.Module]
    fused: bool

    def params(self) -> list[nn.Parameter]:
        return [param for part in self.parts.values() for param in part.parameters()]

    def experts(self) -> list[dict[str, nn.Parameter]]:
        """Parameters of each expert by name; a layer of fused experts is one entry."""
        if self.fused:
            prefixes = {slot: "" if len(self.parts) == 1 else f"{slot}." for slot in self.parts}
            named = (
                (prefixes[slot] + name, param)
                for slot, part in self.parts.items()
                for name, param in part.named_parameters()
            )
            return [dict(named)]
        (children,) = self.parts.values()
        found = (dict(child.named_parameters()) for child in children.children())
        return [params for params in found if params]  # a list may hold an activation too

    def count(self) -> int:
        """Number of experts.

        Raises:
            ParameterInputError: the tensors or experts are not alike.
        """
        experts = self.experts()
        if self.fused:
            counts = {name: param.shape[0] for name, param in experts[0].items()}
            if len(set(counts.values())) > 1:
                raise ParameterInputError(
                    f"the tensors of {self.path!r} hold different numbers of experts: {counts}."
                )
            return next(iter(counts.values()))
        shapes = [{name: param.shape for name, param in expert.items()} for expert in experts]
        if any(shape != shapes[0] for shape in shapes):
            raise ParameterInputError(f"the experts of {self.path!r} differ in their parameters.")
        return len(experts)


def find_expert_layers(nodes: list[ModuleNode]) -> list[ExpertLayer]:
    """All layers with experts in the model's order; shared experts are dense.

    Raises:
        ParameterInputError: a module of experts holds neither of the known forms.
    """
    fused: dict[int, dict[str, nn.Module]] = {}
    layers: list[tuple[int, ExpertLayer]] = []
    for index, node in _candidates(nodes):
        if isinstance(node.module, _LISTS):
            owner = nodes[node.parent].module
            layer = ExpertLayer(_label(node.path), owner, {node.slot: node.module}, fused=False)
            layers.append((index, layer))
        else:
            _check_fused(node)
            fused.setdefault(node.parent, {})[node.slot] = node.module
    for parent, parts in fused.items():
        path = _label(f"{nodes[parent].path}.{EXPERTS}".lstrip("."))
        layers.append((parent, ExpertLayer(path, nodes[parent].module, parts, fused=True)))
    return [layer for _, layer in sorted(layers, key=lambda found: found[0])]


def _label(path: str) -> str:
    return label_from_path(layer_path(path))


def _candidates(nodes: list[ModuleNode]) -> Iterator[tuple[int, ModuleNode]]:
    """Lists of experts, and modules of experts that own matrices."""
    stop = 1  # the root has no owner
    for index, node in enumerate(nodes):
        name = f"{node.slot} {type(node.module).__name__}".lower()
        if index < stop or "expert" not in name:
            continue
        if "shared" in name:
            stop = node.stop
        elif isinstance(node.module, _LISTS) and "expert" in node.slot:
            stop = node.stop
            if any(True for _ in named_parameters(nodes[index:stop])):
                yield index, node
        elif not isinstance(node.module, nn.Linear) and any(p.dim() > 1 for _, p in node.params):
            yield index, node


def _check_fused(node: ModuleNode) -> None:
    """Refuse experts in matrices, as DBRX has them: which rows are whose is not known."""
    if not any(param.dim() == 3 for _, param in node.params):
        shapes = {name.rpartition(".")[2]: tuple(param.shape) for name, param in node.params}
        raise ParameterInputError(
            f"{node.path!r} ({type(node.module).__name__}) holds experts in a form that is not "
            f"known: {shapes}. Known are tensors of shape (experts, ..., ...) and lists of modules."
        )
