"""Plan which tensor of a checkpoint goes where: checks everything, copies nothing."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from moe_groups._deepspeed.parts import Part
from moe_groups.errors import InvalidArgumentError
from moe_groups.weights.local_experts import LocalExperts, dense_tensors
from moe_groups.weights.names import Piece, StoredLayer, find_stored_layers, match_layers
from moe_groups.weights.safetensors_files import SafetensorsFiles, StoredTensor

_SHARED = re.compile(r"\.shared_experts(_gate)?\.")
"""AutoEP's name of what Qwen2-MoE and Qwen3.5-MoE call ``shared_expert``."""


class NamesGiven(NamedTuple):
    """Names that the caller knows.

    Attributes:
        layers: path of a layer in the model to the prefix in the checkpoint; ``{}`` for a number.
        matrices: name in the model's expert to the name in the checkpoint's.
        router: name of the router below the checkpoint's prefix.
    """

    layers: Mapping[str, str] | None
    matrices: Mapping[str, str]
    router: str


@dataclass
class LoadPlan:
    """Copies to make, and problems.

    Attributes:
        copies: ``(part of the model, where its values are)``.
        filled: names in the model that the copies fill.
        not_filled: names in the model for which the checkpoint has nothing.
        used: names in the checkpoint that some rank reads.
        problems: one line for each reason not to load the checkpoint.
    """

    copies: list[tuple[Part, Piece]] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    not_filled: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def plan_load(
    files: SafetensorsFiles, model: nn.Module, layers: list[LocalExperts], given: NamesGiven
) -> LoadPlan:
    """Find the tensor of the checkpoint for every tensor of the model.

    Every rank checks the experts of all ranks, so that all ranks find the same problems.

    Raises:
        InvalidArgumentError: a name in ``given`` does not exist.
    """
    stored = find_stored_layers(files.tensors)
    prefixes = match_layers([layer.path for layer in layers], stored, given.layers)
    planner = _Planner(files.tensors, given, LoadPlan())
    if layers and stored and not prefixes:
        planner.plan.problems.append(
            f"the MoE layers {_some([layer.path for layer in layers])} are none of the "
            f"checkpoint's {_some([*stored])}: say which is which with layers={{...}}"
        )
    for layer in layers:
        prefix = prefixes.get(layer.path)
        planner.add_experts(layer, stored[prefix] if prefix else None)
        planner.add_router(layer, prefix)
    for names, tensor in dense_tensors(model, layers):
        planner.add_dense(names, tensor)
    planner.check_given()
    return planner.plan


class _Planner:
    """One search through a model and a checkpoint."""

    def __init__(
        self, tensors: Mapping[str, StoredTensor], given: NamesGiven, plan: LoadPlan
    ) -> None:
        self.tensors, self.given, self.plan = tensors, given, plan
        self.matrices: set[str] = set()

    def add_experts(self, layer: LocalExperts, stored: StoredLayer | None) -> None:
        """The same for each expert of the layer; copies for those that are here."""
        self.matrices.update(layer.experts[0])
        if stored is None:
            self.plan.not_filled += self._names(layer, layer.experts[0])
            return
        if problem := _wrong_number(layer, stored):
            self.plan.problems.append(problem)
            return
        for matrix, like in layer.experts[0].items():
            wanted = self.given.matrices.get(matrix, matrix)
            pieces = [stored.piece(number, wanted) for number in range(layer.total)]
            if not any(pieces):
                self.plan.not_filled += self._names(layer, [matrix])
                continue
            self.plan.filled += self._names(layer, [matrix])
            for number, piece in enumerate(pieces):
                name = f"{layer.path}, expert {number}, {matrix}"
                if piece is None:
                    lacks = f"{name}: the checkpoint's {stored.prefix} has it for others only"
                    self.plan.problems.append(lacks)
                elif self._fits(name, like, piece) and number in layer.numbers:
                    own = layer.experts[number - layer.first][matrix]
                    self.plan.copies.append((own, piece))

    def _names(self, layer: LocalExperts, matrices: Iterable[str]) -> Iterator[str]:
        return (f"{layer.path}.experts.*.{matrix}" for matrix in matrices)

    def add_router(self, layer: LocalExperts, prefix: str | None) -> None:
        for name, part in layer.router.items():
            stored = f"{prefix}.{self.given.router}.{name}"
            self._add(f"{layer.path}.router.{name}", stored if prefix else None, part)

    def add_dense(self, names: list[str], tensor: torch.Tensor) -> None:
        names = [*names, *(_SHARED.sub(r".shared_expert\1.", name) for name in names)]
        found = next((name for name in names if name in self.tensors), None)
        self.plan.used.update(name for name in names if name in self.tensors)
        self._add(names[0], found, Part.whole(tensor))

    def _add(self, name: str, stored: str | None, part: Part) -> None:
        if stored is None or stored not in self.tensors:
            self.plan.not_filled.append(name)
            return
        self.plan.filled.append(name)
        piece = Piece(stored, (), self.tensors[stored].shape)
        if self._fits(name, part, piece):
            self.plan.copies.append((part, piece))

    def _fits(self, name: str, part: Part, piece: Piece) -> bool:
        self.plan.used.add(piece.tensor)
        stored = self.tensors[piece.tensor]
        where = f"{piece.tensor}{list(piece.part) if piece.part else ''}"
        if piece.shape != part.shape:
            problem = f"has shape {piece.shape}, the model's is {part.shape}"
        elif not stored.fits(part.tensor.dtype):
            problem = f"is {stored.dtype}, which does not become {part.tensor.dtype} by a copy"
            if stored.dtype.startswith("F8"):
                problem += ": a quantized checkpoint has to be converted to bfloat16 first"
        elif part.tensor.is_meta:
            problem = "cannot be copied to the meta device: give the model memory (to_empty) first"
        else:
            return True
        self.plan.problems.append(f"{name}: {where} {problem}")
        return False

    def check_given(self) -> None:
        """Refuse names of matrices that no expert has."""
        if unknown := sorted(set(self.given.matrices) - self.matrices):
            raise InvalidArgumentError(
                f"matrices names {unknown[0]!r}, which no expert of the model has: theirs are "
                f"{sorted(self.matrices)}."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:2] + ["..."] * (len(names) > 2))


def _wrong_number(layer: LocalExperts, stored: StoredLayer) -> str | None:
    if missing := stored.missing():
        return f"{layer.path}: the checkpoint's {stored.prefix} lacks the experts {missing}"
    if len(stored.numbers) != layer.total:
        return (
            f"{layer.path}: it has {layer.total} experts, the checkpoint's {stored.prefix} has "
            f"{len(stored.numbers)}"
        )
    return None
