"""Layer and expert number of expert parameters, from their qualified names alone.

For a layout without a model. What :func:`moe_groups.tag_experts` reads off the tree of
modules follows from names if an expert is in a list with "expert" in its name
(``deepspeed/moe/experts.py`` calls it ``deepspeed_experts``), or where one tensor holds all
experts of a layer (AutoEP has ``experts.w1``, ``w2`` and ``w3``).
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from moe_groups.checkpoints.layout import FlatParam
from moe_groups.experts.expert_lists import layer_path
from moe_groups.tags import label_from_path

_DEEPSPEED = re.compile(r"(?:(.*?)\.)?deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\..+")
_LIST = re.compile(r"((?:.*\.)?[^.]*expert[^.]*)\.(\d+)\..+")  # the innermost such list
_AUTO_EP = re.compile(r".*\.experts\.w[123]")
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PEFT = re.compile(
    r"^base_model\.model\.|(?<![^.])(base_layer|original_module|modules_to_save\.[^.]+)\."
)


class ExpertPlace(NamedTuple):
    """What a name says about its expert.

    Attributes:
        layer: the layer's label, if it was given no other.
        number: of the expert among this rank's experts; None where one tensor holds all.
    """

    layer: str
    number: int | None


class ExpertPlaces:
    """Reads the names of one rank's expert parameters.

    Args:
        dense: its other parameters.
        experts: its expert parameters.
    """

    def __init__(self, dense: Iterable[FlatParam], experts: Iterable[FlatParam]) -> None:
        stacked = [p.name for p in experts if p.shape is not None and len(p.shape) == 3]
        others = [param.name for param in dense]
        self._stacks = {_owner(name) for name in stacked}
        # a list with anything but equal experts in it is a list of layers
        self._layers = {path for name in [*others, *stacked] for path in _lists(name)}
        self._peft = bool(others) and all(name.startswith("base_model.model.") for name in others)

    def of(self, name: str) -> ExpertPlace | None:
        """Where an expert parameter belongs; None where its name does not say it."""
        path = _WRAPPERS.sub("", _PEFT.sub("", name) if self._peft else name)
        if match := _DEEPSPEED.fullmatch(path):
            return ExpertPlace(label_from_path(match[1] or "") or "moe", int(match[2]))
        if match := _LIST.fullmatch(path):
            return ExpertPlace(_label(match[1]), int(match[2]))
        if _AUTO_EP.fullmatch(path) or self._is_stack(name):
            return ExpertPlace(_label(_owner(path)), None)
        return None

    def _is_stack(self, name: str) -> bool:
        """Is it among the tensors of all experts of a layer?"""
        owner = _owner(name)
        if owner in self._stacks:
            return True
        return owner.rpartition(".")[2] == "experts" and self._layers.issuperset(_lists(owner))


def _owner(name: str) -> str:
    """The path of the module that holds a parameter."""
    return name.rpartition(".")[0]


def _lists(path: str) -> Iterator[str]:
    """Paths of the lists that are above."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            yield ".".join(parts[:index])


def _label(path: str) -> str:
    return label_from_path(layer_path(path)) or "experts"
