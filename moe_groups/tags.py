"""What an expert parameter knows about itself: set, get and copy its tag.

A tag is kept as plain attributes of the parameter. ``allreduce`` and ``group_name`` are
DeepSpeed's own (``deepspeed/moe/experts.py``); ``expert_group_name`` and
``expert_number`` are ours. Pickling keeps the attributes of a parameter,
``copy.deepcopy`` loses them, hence :func:`copy_expert_tag`.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moe_groups._common.arguments import checked, shown
from moe_groups.errors import TagError

LABELS = ("expert_group_name", "expert_number")
"""Keys of an MoE param group that say whose parameters it holds."""
STEP_OPTIONS = "step_options"
"""Key of a param group for options that hold while it is stepped (``engine/step_options.py``)."""
PARALLEL_GROUP = re.compile(r"ep_size_[1-9]\d*")
_GROUP_NAME = re.compile(r"(ep_size_[1-9]\d*)_.+")
_BAD_IN_LABEL = re.compile(r"[\s\x00-\x1f\x7f]")
EXPERT_RANKS = "expert_ranks"
"""Attribute: ranks to which AutoEP will distribute a tensor, which now holds all experts."""
_ATTRIBUTES = (
    "allreduce",
    "group_name",
    "expert_group_name",
    "expert_number",
    "num_local_experts",
    "fused_experts",
    "expert_layer_id",
    "expert_label_found",
    EXPERT_RANKS,
)


class ExpertTag(NamedTuple):
    """Where an expert parameter belongs.

    Attributes:
        parallel_group: key of its process groups, ``ep_size_<N>``.
        layer: ``expert_group_name`` of its MoE layer; None while the layer has no name.
        expert_number: index among this rank's experts of the layer, or None if one tensor
            holds all of them.
        num_local_experts: this rank's experts of the layer, or None if not known.
        fused: the tensor's first dimension counts experts.
    """

    parallel_group: str
    layer: str | None = None
    expert_number: int | None = None
    num_local_experts: int | None = None
    fused: bool = False

    @property
    def place(self) -> tuple[str, str | None, int | None]:
        """Parallel group, layer and expert number."""
        return self.parallel_group, self.layer, self.expert_number

    @checked
    def global_number(self, ep_rank: int) -> int | None:
        """The expert's number in its layer over all ranks, or None if it has no number."""
        if self.expert_number is None or self.num_local_experts is None:
            return None
        return ep_rank * self.num_local_experts + self.expert_number


_layer_ids = itertools.count()


def new_layer_id() -> int:
    """A value for ``expert_layer_id``, which distinguishes two layers with one label."""
    return next(_layer_ids)


def is_expert_parameter(param: torch.Tensor) -> bool:
    """DeepSpeed's own test, ``is_moe_param`` in ``deepspeed/moe/utils.py``."""
    return not getattr(param, "allreduce", True)


def shape_of(param: torch.Tensor) -> torch.Size:
    """The parameter's shape, also of an empty placeholder of ZeRO-3 (``ds_shape``)."""
    shape: torch.Size = param.__dict__.get("ds_shape", param.shape)
    return shape


def numel_of(param: torch.Tensor) -> int:
    """Number of elements, also of an empty placeholder of ZeRO-3 (``ds_numel``).

    Of a tensor that AutoEP will distribute, a rank's part.
    """
    numel: int = param.__dict__.get("ds_numel", param.numel())
    return numel // int(param.__dict__.get(EXPERT_RANKS, 1))


@checked
def set_expert_tag(param: torch.Tensor, tag: ExpertTag) -> None:
    """Mark ``param`` as an expert parameter, for DeepSpeed and for grouping.

    Raises:
        TagError: the parallel group or the label cannot be used.
    """
    check_parallel_group(tag.parallel_group, "the tag")
    check_number(tag.expert_number, "the tag")
    if tag.layer is not None:
        check_label(tag.layer)
    param.__dict__.update(attributes_of(tag))


def attributes_of(tag: ExpertTag) -> dict[str, Any]:
    """The attributes that a parameter with this tag has, DeepSpeed's two among them."""
    return {
        "allreduce": False,
        "group_name": tag.parallel_group,
        "expert_group_name": tag.layer,
        "expert_number": tag.expert_number,
        "num_local_experts": tag.num_local_experts,
        "fused_experts": tag.fused,
    }


@checked
def get_expert_tag(param: torch.Tensor, name: str = "") -> ExpertTag | None:
    """The tag of ``param``, or None if it is a dense parameter.

    Args:
        name: the parameter's name, for error messages.

    Raises:
        TagError: the parameter has ``allreduce = False`` but no usable ``group_name``.
    """
    if getattr(param, "allreduce", True):
        return None
    attributes = param.__dict__
    parallel_group = attributes.get("group_name")
    check_parallel_group(parallel_group, name or f"expert parameter {tuple(param.shape)}")
    assert isinstance(parallel_group, str)
    check_number(attributes.get("expert_number"), name or f"expert {tuple(param.shape)}")
    return ExpertTag(
        parallel_group,
        attributes.get("expert_group_name"),
        attributes.get("expert_number"),
        attributes.get("num_local_experts"),
        attributes.get("fused_experts", False),
    )


@checked
def copy_expert_tag(source: torch.Tensor, target: torch.Tensor) -> None:
    """Give ``target`` the tag of ``source``; does nothing if there is none."""
    for attribute in _ATTRIBUTES:
        if attribute in source.__dict__:
            setattr(target, attribute, source.__dict__[attribute])


def check_parallel_group(value: object, owner: str) -> None:
    """Refuse what DeepSpeed could not use as the key of a process group.

    ``_get_max_expert_size`` (``deepspeed/utils/groups.py``) reads the expert-parallel
    size from the key when a checkpoint is saved, so any other form fails there.
    """
    if not isinstance(value, str) or not PARALLEL_GROUP.fullmatch(value):
        raise TagError(
            f"{owner} has allreduce=False and group_name={shown(value)}; DeepSpeed's expert "
            "process groups are called 'ep_size_<N>'. Set param.group_name = f'ep_size_{N}' with "
            "the expert-parallel size N of its layer."
        )


def parallel_group_of(name: str) -> str:
    """``ep_size_<N>`` from the name of an MoE param group; any other name unchanged."""
    match = _GROUP_NAME.fullmatch(name)
    return match[1] if match else name


def check_number(value: object, owner: str) -> None:
    """Refuse an ``expert_number`` that is not a count.

    Raises:
        TagError: neither None nor an integer of at least 0.
    """
    if value is not None and (type(value) is not int or value < 0):
        raise TagError(
            f"{owner} has expert_number={shown(value)}: use the expert's number on this rank, from "
            "0 up, or None where one tensor holds all experts."
        )


def check_label(label: object) -> None:
    """Refuse an ``expert_group_name`` that cannot be part of a process-group key.

    Raises:
        TagError: not a string, empty, or with white space or control characters.
    """
    if not isinstance(label, str) or not label or _BAD_IN_LABEL.search(label):
        raise TagError(
            f"expert_group_name={shown(label)} cannot be part of a process-group key: use a "
            "non-empty string without white space or control characters, as in "
            "'layers.3.moe'."
        )


def label_from_path(path: str) -> str:
    """A usable label out of a qualified module name (``ModuleDict`` keys may hold spaces)."""
    return _BAD_IN_LABEL.sub("_", path)


def addresses(name: str, tag: ExpertTag | None, path: str, inner: str) -> list[str]:
    """What patterns are compared with: the name, and the expert by label and by module path.

    Args:
        name: qualified name, "" where not known.
        path: module path of the expert's layer, "" where not known.
        inner: name inside the expert.
    """
    found = [name] if name else []
    if tag is not None:
        number = "" if tag.expert_number is None else f".expert.{tag.expert_number}"
        end = f".{inner}" if inner else ""
        found += [f"{base}{number}{end}" for base in (tag.layer, path) if base]
    return list(dict.fromkeys(found))


def layers_around(
    names: Sequence[str], labels: Sequence[str | None], wanted: Sequence[bool]
) -> list[str | None]:
    """For each parameter that is ``wanted``, the label of the MoE layer that it is inside of.

    Args:
        names: qualified names.
        labels: of their layers, for experts; None for others.
    """
    paths = {
        name.partition(".experts.")[0].removesuffix(".deepspeed_moe"): label
        for name, label in zip(names, labels, strict=True)
        if label and ".experts." in name
    }
    found: list[str | None] = [None] * len(names)
    for row, name in enumerate(names):
        while wanted[row] and labels[row] is None and name and found[row] is None:
            name = name.rpartition(".")[0]
            found[row] = paths.get(name)
    return found
