"""Names of MoE layers in Hugging Face checkpoints, and which part of a tensor is one matrix.

Two styles exist. Per expert, as most checkpoints on the hub have it::

    model.layers.0.block_sparse_moe.experts.3.w1.weight      Mixtral
    model.layers.0.mlp.experts.3.gate_proj.weight            Qwen3-MoE, DeepSeek-V3

and one tensor for all experts, as transformers 5 has it in memory and writes with
``save_original_format=False``::

    model.layers.0.mlp.experts.gate_up_proj                  (experts, 2 * inner, hidden)
    model.layers.0.mlp.experts.down_proj                     (experts, hidden, inner)
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from moe_groups.errors import CheckpointError, InvalidArgumentError
from moe_groups.weights.safetensors_files import Index, SafetensorsFiles, StoredTensor


def match_layers(
    paths: list[str], prefixes: Iterable[str], given: Mapping[str, str] | None
) -> dict[str, str]:
    """Path of each layer in the model to its prefix in the checkpoint, if it has one.

    Without ``given``: the same path, or the only layer with the same number in its path.

    Raises:
        InvalidArgumentError: a key or a prefix of ``given`` belongs to no layer.
    """
    stored = list(prefixes)
    if given is not None:
        found = expand(paths, given)
        for path, prefix in found.items():
            if prefix not in stored:
                raise InvalidArgumentError(
                    f"layers says that {path!r} is {prefix!r} in the checkpoint, but its MoE "
                    f"layers are {stored}."
                )
        return found
    of_number, here = _by_number(stored), _by_number(paths)
    found = {path: path for path in paths if path in stored}
    for number, same in here.items():
        others = of_number.get(number, [])
        if len(same) == len(others) == 1 and same[0] not in found:
            found[same[0]] = others[0]
    return found


def expand(paths: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """The layers that ``given`` names, each with its own prefix; ``{}`` is a number in both.

    Raises:
        InvalidArgumentError: a key belongs to no layer, or two layers get one prefix.
    """
    found: dict[str, str] = {}
    for key, value in given.items():
        pattern = re.compile(re.escape(key).replace(r"\{\}", r"(\d+)"))
        matches = [match for match in map(pattern.fullmatch, paths) if match]
        if not matches:
            raise InvalidArgumentError(f"layers names {key!r}, but the MoE layers are {paths}.")
        if value.count("{}") > key.count("{}"):
            raise InvalidArgumentError(f"layers: {value!r} has more numbers than {key!r}.")
        for match in matches:
            numbers = iter(match.groups())
            found[match[0]] = re.sub(r"\{\}", lambda _: next(numbers), value)  # noqa: B023
    if twice := [path for path, prefix in found.items() if [*found.values()].count(prefix) > 1]:
        raise InvalidArgumentError(f"layers gives {twice} the same name {found[twice[0]]!r}.")
    return found


def layer_number(path: str) -> str | None:
    """The one number in a path; None where there is none, or more than one."""
    numbers = [part for part in path.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None


def _by_number(paths: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        number = layer_number(path)
        if number is not None:
            found.setdefault(number, []).append(path)
    return found


_LIKE_MIXTRAL = ("mixtral", "minimax", "minimax_m2")
FAMILIES = (
    *_LIKE_MIXTRAL,
    *("qwen3_moe", "qwen2_moe", "qwen3_next", "deepseek_v3", "deepseek_v2", "deepseek_v32"),
    *("dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "mellum"),
    *("olmoe", "solar_open"),
)
"""Model types of transformers with the names of Mixtral, and of Qwen3-MoE."""

ROUTER = "gate"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_NUMBERED = ("w1", "w3", "w2")
_SAME = {
    f"{name}.weight": (f"{name}.weight", f"{other}.weight")
    for one, two in zip(_PROJECTIONS, _NUMBERED, strict=True)
    for name, other in ((one, two), (two, one))
}
_PER_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\..+")
_FUSED = re.compile(r"(.+)\.experts\.[^.]*[^.\d][^.]*")


class Piece(NamedTuple):
    """One matrix of one expert in a checkpoint.

    Attributes:
        tensor: the name of the tensor that holds it.
        part: its index in that tensor.
        shape: the shape of the matrix.
    """

    tensor: str
    part: Index
    shape: tuple[int, ...]


@dataclass
class StoredLayer:
    """The experts of one MoE layer in a checkpoint.

    Attributes:
        prefix: with which the names of all its tensors begin, as "model.layers.0.mlp".
        tensors: the tensors of its experts.
        numbers: the numbers of its experts, in tensors of their own or in fused ones.
    """

    prefix: str
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    numbers: set[int] = field(default_factory=set)

    def missing(self) -> list[int]:
        """Missing experts below the highest number."""
        return sorted(set(range(max(self.numbers, default=-1) + 1)) - self.numbers)

    def piece(self, number: int, matrix: str) -> Piece | None:
        """Where the matrix of an expert is; None if the checkpoint lacks it.

        Args:
            number: global number of the expert.
            matrix: its name inside the expert, such as "w1.weight" or "gate_proj.weight", in
                the words of any family.
        """
        for name in _SAME.get(matrix, (matrix,)):
            own = f"{self.prefix}.experts.{number}.{name}"
            if own in self.tensors:
                return Piece(own, (), self.tensors[own].shape)
            for fused, index, shape in self._fused(number, name.removesuffix(".weight")):
                if fused in self.tensors:
                    return Piece(fused, index, shape)
        return None

    def _fused(self, number: int, name: str) -> Iterable[tuple[str, Index, tuple[int, ...]]]:
        whole = f"{self.prefix}.experts.{name}"
        if whole in self.tensors:
            yield whole, (number,), self.tensors[whole].shape[1:]
        both = f"{self.prefix}.experts.gate_up_proj"
        if name in _PROJECTIONS[:2] and len(self._shape(both)) == 3:
            _, rows, width = self._shape(both)
            half = rows // 2
            first = half * _PROJECTIONS.index(name)
            yield both, (number, slice(first, first + half)), (half, width)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape if name in self.tensors else ()


def find_stored_layers(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredLayer]:
    """All MoE layers of a checkpoint by prefix, without shared experts, which are dense."""
    layers: dict[str, StoredLayer] = {}
    for name, tensor in tensors.items():
        own, fused = _PER_EXPERT.fullmatch(name), _FUSED.fullmatch(name)
        match = own or fused
        if match is None or (fused and not tensor.shape):
            continue
        layer = layers.setdefault(match[1], StoredLayer(match[1]))
        layer.tensors[name] = tensor
        layer.numbers.update([int(own[2])] if own else range(tensor.shape[0]))
    return layers


class FamilyNames(NamedTuple):
    """The names that experts get.

    Attributes:
        prefix: with which those of an MoE layer begin; ``{}`` is the number of the decoder layer.
        matrices: of the three matrices of an expert.
    """

    prefix: str
    matrices: tuple[str, ...]

    def matrix(self, name: str) -> str:
        """The family's name of a matrix inside of an expert; any other name unchanged."""
        same = _SAME.get(name, (name,))
        return next((word for word in same if word.partition(".")[0] in self.matrices), name)


def names_of(family: str | Path) -> FamilyNames:
    """The names of a family, or those in a checkpoint.

    Raises:
        InvalidArgumentError: neither a known family nor a directory.
        CheckpointError: the directory holds no checkpoint with experts.
    """
    if family in _LIKE_MIXTRAL:
        return FamilyNames("model.layers.{}.block_sparse_moe", _NUMBERED)
    if family in FAMILIES:
        return FamilyNames("model.layers.{}.mlp", _PROJECTIONS)
    if not isinstance(family, str | Path) or not Path(family).is_dir():
        raise InvalidArgumentError(
            f"family={family!r} is unknown: use one of {', '.join(map(repr, FAMILIES))}, or the "
            "directory of a safetensors checkpoint that has the names."
        )
    with SafetensorsFiles(family) as files:
        layers = find_stored_layers(files.tensors)
    for prefix, layer in layers.items():
        if number := layer_number(prefix):
            words = {word for name in layer.tensors for word in name.split(".")}
            matrices = _NUMBERED if words.issuperset(_NUMBERED) else _PROJECTIONS
            parts = ("{}" if part == number else part for part in prefix.split("."))
            return FamilyNames(".".join(parts), matrices)
    raise CheckpointError(f"{family} has no experts with the number of a layer in their names.")


def layer_prefixes(
    paths: list[str], names: FamilyNames, layers: Mapping[str, str] | None
) -> dict[str, str]:
    """What each MoE layer is called in the checkpoint.

    Raises:
        InvalidArgumentError: it is not known for one, or the same for two.
    """
    found = {}
    for path in paths:
        number = layer_number(path)
        if number is not None:
            found[path] = names.prefix.format(number)
    found |= expand(paths, layers or {})
    if without := [path for path in paths if path not in found]:
        raise InvalidArgumentError(
            f"the path of the MoE layer {without[0]!r} has no number: say with layers={{...}} what "
            "it is called in the checkpoint."
        )
    if len(set(found.values())) < len(found):
        raise InvalidArgumentError(
            f"two MoE layers would have the same name: {found}. Say with layers={{...}} what each "
            "is called in the checkpoint."
        )
    return found
