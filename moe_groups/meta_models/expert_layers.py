"""Find the experts of a whole model in Hugging Face's forms.

The experts of a layer are fused tensors (``gate_up_proj`` of shape
``(experts, 2 * inner, hidden)``) or, in older versions, a list of modules.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moe_groups.errors import ParameterInputError
from moe_groups.experts.expert_lists import layer_path
from moe_groups.experts.module_tree import ModuleNode, named_parameters
from moe_groups.tags import label_from_path

EXPERTS = "experts"
_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer of a whole model.

    Attributes:
        path: the layer's path.
        owner: the module that has ``parts`` as children.
        parts: the children with experts, by their names: one list of expert modules, or
            modules with tensors of all experts.
        fused: the parts have tensors of all experts.
    """

    path: str
    owner: nn.Module
    parts: dict[str, nn.Module]
    fused: bool

    def params(self) -> list[nn.Parameter]:
        """The parameters of all experts."""
        if self.fused:
            return list(self.tensors().values())
        return [param for expert in self.experts() for param in expert.parameters()]

    def tensors(self) -> dict[str, nn.Parameter]:
        """The fused tensors by name; what all experts have in common, as a norm, is none."""
        named = {
            name if len(self.parts) == 1 else f"{slot}.{name}": param
            for slot, part in self.parts.items()
            for name, param in part.named_parameters()
        }
        counts = {param.shape[0] for param in named.values() if param.dim() == 3}
        return {name: param for name, param in named.items() if param.shape[0] in counts}

    def experts(self) -> list[nn.Module]:
        """The modules of a list that are experts; there may also be an activation."""
        (part,) = self.parts.values()
        return [child for child in part.children() if any(True for _ in child.parameters())]

    def counts(self) -> list[int]:
        """Number of experts, the largest first; fused tensors may differ in it.

        LongCat's ``gate_up_proj`` has a row for experts that do nothing too.

        Raises:
            ParameterInputError: the experts in a list differ.
        """
        if self.fused:
            return sorted({param.shape[0] for param in self.tensors().values()}, reverse=True)
        shapes = [{n: p.shape for n, p in expert.named_parameters()} for expert in self.experts()]
        if any(shape != shapes[0] for shape in shapes):
            raise ParameterInputError(f"the experts of {self.path!r} differ in their parameters.")
        return [len(shapes)]

    def indivisible(self, ep_size: int) -> int | None:
        """A number of experts that ``ep_size`` does not divide, if there is one."""
        return next((count for count in self.counts() if count % ep_size), None)


def find_expert_layers(nodes: list[ModuleNode]) -> list[ExpertLayer]:
    """All layers with experts, in the model's order; shared experts count as dense.

    Raises:
        ParameterInputError: a module of experts has neither of the known forms.
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
    """Lists of experts, and modules of experts that have matrices of their own."""
    stop = 1  # the root has no owner
    for index, node in enumerate(nodes):
        if index < stop:
            continue
        if "shared" in node.slot:
            stop = node.stop
        elif "expert" not in f"{node.slot} {type(node.module).__name__}".lower():
            continue
        elif isinstance(node.module, _LISTS) and "expert" in node.slot:
            stop = node.stop
            if any(True for _ in named_parameters(nodes[index:stop])):
                yield index, node
        elif not isinstance(node.module, nn.Linear) and any(p.dim() > 1 for _, p in node.params):
            yield index, node


def _check_fused(node: ModuleNode) -> None:
    """Refuse experts in 2-D matrices, as in DBRX: the rows of each expert are not known."""
    if not any(param.dim() == 3 for _, param in node.params):
        shapes = {name.rpartition(".")[2]: tuple(param.shape) for name, param in node.params}
        raise ParameterInputError(
            f"{node.path!r} ({type(node.module).__name__}) holds experts in a form that is not "
            f"known: {shapes}. Known are tensors of shape (experts, ..., ...) and lists of modules."
        )
