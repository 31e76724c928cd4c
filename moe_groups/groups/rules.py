"""Rules that give parameters hyperparameters of their own: weight decay and overrides."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch

from moe_groups._common.arguments import check, checked, shown
from moe_groups.errors import InvalidArgumentError, OverrideError
from moe_groups.groups.hyperparameters import RESERVED, check_hyperparameters
from moe_groups.tags import is_expert_parameter, shape_of

NoDecay: TypeAlias = Callable[[str, torch.Tensor], bool]
"""``(qualified name, parameter) -> True`` where weight decay is to be 0."""

Overrides: TypeAlias = Sequence[tuple[str, Mapping[str, Any]]] | Mapping[str, Mapping[str, Any]]
"""Glob pattern to the options of the parameters it selects."""

_NORM = re.compile(r"(^|\.)(\w*norm\d*|ln(_\w+|\d+)?)(\.|$)")


@checked
def is_norm_or_bias(name: str, param: torch.Tensor) -> bool:
    """The usual ``no_decay`` rule: True for biases, norms and 1-D parameters.

    Fused experts have one dimension more: a tensor of shape ``(experts, features)`` is the
    bias or the norm of all experts. For ZeRO-3 placeholders ``ds_shape`` counts.

    Args:
        name: qualified name; with "" only the shape counts.
        param: the parameter; its values are not read.

    Example:
        >>> is_norm_or_bias("experts.down_proj_bias", torch.empty(8, 64))
        True
        >>> is_norm_or_bias("experts.down_proj", torch.empty(8, 64, 32))
        False
    """
    own_dims = len(shape_of(param)) - bool(getattr(param, "fused_experts", False))
    leaf = name.rpartition(".")[2].lower()
    is_bias = leaf.endswith("bias") or leaf.startswith("bias_")
    owner = ".".join(name.lower().split(".")[-2:])
    is_norm = is_expert_parameter(param) and own_dims == 2 and _NORM.search(owner)
    return own_dims <= 1 or is_bias or bool(is_norm)


class Variant(NamedTuple):
    """What distinguishes one part of a caller's group from its other parts.

    Attributes:
        source: index of the caller's group.
        no_decay: the decay rule made its weight decay 0.
        overrides: indices of the overrides that apply.
    """

    source: int
    no_decay: bool = False
    overrides: tuple[int, ...] = ()


@dataclass(slots=True)
class Rules:
    """Decay rule and overrides, applied to one parameter after the other.

    Raises:
        InvalidArgumentError: an override sets a key that the grouping sets.
    """

    weight_decay: float | None = None
    no_decay: NoDecay | None = None
    overrides: Overrides = ()
    _overrides: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list, init=False)
    _patterns: list[re.Pattern[str]] = field(default_factory=list, init=False)
    _matched: set[int] = field(default_factory=set, init=False)
    _agree: set[tuple[int, ...]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        items = self.overrides
        self._overrides = list(items.items() if isinstance(items, Mapping) else items)
        for pattern, options in self._overrides:
            if reserved := [key for key in options if key in RESERVED]:
                raise InvalidArgumentError(
                    f"override {pattern!r} sets {reserved}, which the grouping itself sets: "
                    "override hyperparameters only."
                )
            self._patterns.append(compile_pattern(pattern))

    @property
    def active(self) -> bool:
        return self.no_decay is not None or bool(self._overrides)

    def variant(
        self,
        source: int,
        options: Mapping[str, Any],
        name: str,
        param: torch.Tensor,
        names: Sequence[str],
    ) -> Variant:
        """The variant of ``options`` (the caller's group) that ``param`` belongs to.

        ``names`` are its :func:`addresses`.
        """
        matched = self._matching(names)
        self._matched.update(matched)
        self._check_conflict(matched, name, param)
        no_decay = False
        if self.no_decay is not None and "weight_decay" not in options:
            no_decay = self.no_decay(name, param)
            check(f"no_decay({name!r}, ...)", no_decay, bool)
        return Variant(source, no_decay, matched)

    def check_options(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse options of overrides that neither an optimizer nor the caller's groups have."""
        own = {key for group in groups for key in group}
        for pattern, options in self._overrides:
            check_hyperparameters(f"override {pattern!r}", options, own)

    def options(self, variant: Variant, given: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the groups of ``variant``: override over caller's group over defaults."""
        options = {key: value for key, value in given.items() if key not in RESERVED}
        if variant.no_decay:
            options["weight_decay"] = 0.0
        elif self.weight_decay is not None:
            options.setdefault("weight_decay", self.weight_decay)
        for index in variant.overrides:
            options.update(self._overrides[index][1])
        return options

    def check_all_matched(self, examples: Sequence[str]) -> None:
        """Raise OverrideError for patterns that selected nothing."""
        missing = [p for i, (p, _) in enumerate(self._overrides) if i not in self._matched]
        if missing:
            shown = ", ".join(map(repr, dict.fromkeys(examples))) or "parameters without names"
            raise OverrideError(
                f"override pattern(s) {', '.join(map(repr, missing))} match no trainable "
                "parameter. A pattern is compared with the qualified name and the modules above, "
                "and for experts with '<layer>.expert.<number on this rank>'; here these are for "
                f"example: {shown}."
            )

    def _matching(self, names: Sequence[str]) -> tuple[int, ...]:
        return tuple(
            index
            for index, pattern in enumerate(self._patterns)
            if any(map(pattern.fullmatch, names))
        )

    def _check_conflict(self, matched: tuple[int, ...], name: str, param: torch.Tensor) -> None:
        if len(matched) < 2 or matched in self._agree:
            return
        by_key: dict[str, int] = {}
        for index in matched:
            for key, value in self._overrides[index][1].items():
                other = by_key.setdefault(key, index)
                before = self._overrides[other][1][key]
                if before != value:
                    raise OverrideError(
                        f"overrides {self._overrides[other][0]!r} ({key}={before!r}) and "
                        f"{self._overrides[index][0]!r} ({key}={value!r}) both select parameter "
                        f"{name or tuple(shape_of(param))}: make one of the patterns narrower."
                    )
        self._agree.add(matched)


def describe_source(index: int, group: Mapping[str, Any]) -> str:
    """How error messages call one of the caller's groups."""
    name = group.get("name")
    return f"group {index}" + (f" ({shown(name)})" if name is not None else "")


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A glob pattern as a regular expression, for ``fullmatch`` with :func:`addresses`.

    A pattern that matches a module selects everything in it.
    """
    return re.compile(f"{fnmatch.translate(pattern)}|{fnmatch.translate(pattern + '.*')}")
