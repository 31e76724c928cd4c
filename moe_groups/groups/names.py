"""Unique, readable names of groups; for experts valid process-group keys."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from moe_groups.groups.keys import Key
from moe_groups.tags import PARALLEL_GROUP, label_from_path


def given_name(name: object) -> str | None:
    """The caller's name of a group as text; None where it has none."""
    return str(name) if name else None


class GroupNames:
    """Makes the names of one plan.

    ``dense`` or the caller's name, for experts ``ep_size_<N>``, followed by what distinguishes
    the group from its neighbours: layer, expert, the caller's group, decay, overrides, dtype and
    mesh (if a neighbour has another one) and tile, as in
    ``ep_size_2_blocks.1.moe.expert.3.no_decay.tile.0``.

    Args:
        given: names of the caller's groups; None for a group without a name.
        keys: keys of all groups.
    """

    def __init__(self, given: Sequence[object], keys: Iterable[Key]) -> None:
        names = list(map(given_name, given))
        self.given = [
            label_from_path(name) if name and names.count(name) == 1 else None for name in names
        ]
        self.dtypes: dict[Any, set[torch.dtype]] = {}
        self.meshes: dict[Any, list[Any]] = {}
        for key in keys:
            self.dtypes.setdefault(key[:3], set()).add(key.dtype)
            meshes = self.meshes.setdefault(key[:3], [])
            if key.mesh not in meshes:
                meshes.append(key.mesh)
        self.last: Key | None = None
        self.prefix = self.suffix = ""
        self.used: set[str] = set()

    def of(self, key: Key, expert_number: int | None, tile: int | None = None) -> str:
        """The name of the group, or of one of its tiles."""
        if key is not self.last:  # neighbours mostly differ in the expert only
            self.last, self.prefix, self.suffix = key, self._prefix(key), self._suffix(key)
        expert = "" if expert_number is None else f".expert.{expert_number}"
        name = f"{self.prefix}{expert}{self.suffix}"
        if tile is not None:
            name = f"{name}.tile.{tile}"
        if name == self.prefix and key.layer is None and key.parallel_group is not None:
            name = key.parallel_group  # DeepSpeed's own name
        if name in self.used:
            name = self._unused(name)
        self.used.add(name)
        return name

    def _prefix(self, key: Key) -> str:
        """The process groups, or ``dense`` or the caller's name, and the layer."""
        if key.parallel_group is None:
            layer = f".{key.layer}" if key.layer else ""
            return (self.given[key.variant.source] or "dense") + layer
        return f"{key.parallel_group}_{key.layer or 'experts'}"

    def _suffix(self, key: Key) -> str:
        """What distinguishes the group from others of the same layer and expert."""
        variant = key.variant
        own = self.given[variant.source]
        parts = [] if len(self.given) < 2 else [own or f"group.{variant.source}"]
        if own and key.parallel_group is None:
            parts = []  # the name begins with it
        parts += ["no_decay"] * variant.no_decay
        parts += [f"override.{index}" for index in variant.overrides]
        if len(self.dtypes[key[:3]]) > 1:
            parts.append(str(key.dtype).removeprefix("torch."))
        meshes = self.meshes[key[:3]]
        if len(meshes) > 1:
            parts.append(f"mesh.{meshes.index(key.mesh)}")
        return "".join(f".{part}" for part in parts)

    def _unused(self, name: str) -> str:
        mark = "_" if PARALLEL_GROUP.fullmatch(name) else "."  # ep_size_2.2 is no key
        count = 2
        while f"{name}{mark}{count}" in self.used:
            count += 1
        return f"{name}{mark}{count}"
