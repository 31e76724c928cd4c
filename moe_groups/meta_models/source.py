"""A model to plan for, on meta: from a Hugging Face config, a model type or a function.

Nothing is downloaded and no weight is allocated, so a model of any size is built in seconds.
``transformers`` is imported only for a config or a model type.
"""

import contextlib
import difflib
import importlib
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from moe_groups._common.arguments import need
from moe_groups.errors import InvalidArgumentError

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PROCESS_GROUPS = ("deepspeed.comm", "deepspeed.utils.groups", "deepspeed.moe", "torch.distributed")
_FIRST_MAPPINGS = (  # whole models before their language parts, heads before bare stacks
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)
_ANY_MODEL = "A 'module:function' can build any model."
_DEFAULTS = "The defaults of this model type may be incomplete: name a config.json."
_LONGEST_REASON = 300


def load_model(source: str) -> nn.Module:
    """Build the model that ``source`` names, on the meta device.

    Parameters have the config's dtype, or bfloat16 if it names none that is trained in: a
    quantized checkpoint is trained in bfloat16. Modules that ``transformers`` does not build,
    such as DeepSeek-V3's multi-token prediction, are missing here too.

    Args:
        source: one of

            * the path of a Hugging Face ``config.json``, or of a directory with one;
            * a model type of the installed ``transformers``, such as ``"mixtral"``: the model
              of that type's default config (for Mixtral the 8x7B);
            * ``"package.module:function"``: called without arguments under
              ``torch.device("meta")``; the module may be in the current directory. It returns
              one rank's model, with DeepSpeed MoE layers or tagged experts.

    Raises:
        InvalidArgumentError: there is no such file, model type or function, or it cannot be
            read or built; the message is one line.
    """
    if names_function(source):
        return _call(source)
    need("transformers", "cli", "Hugging Face configs and model types")
    config = _config(source)
    kind = _model_class(config, source)
    with (
        _one_line(
            f"transformers cannot build {kind.__name__} from {source!r}",
            _ANY_MODEL if os.path.exists(source) else _DEFAULTS,
        ),
        torch.device("meta"),
    ):
        model: nn.Module = kind(config)
    return model.to(_dtype(config))


def names_function(source: str) -> bool:
    """Is ``source`` a ``"module:function"``, which returns one rank's model?"""
    return bool(_FUNCTION.fullmatch(source)) and not os.path.exists(source)


@contextlib.contextmanager
def _one_line(what: str, advice: str = "") -> Iterator[None]:
    """Refuse with one line what the code of others does not do."""
    try:
        yield
    except (Exception, SystemExit) as error:  # models and scripts may raise anything
        if _wants_process_groups(error):
            advice = (
                "It needs process groups, and there are none while planning: build the model "
                "alone, with ep_size given to its MoE layers; deepspeed.initialize makes the "
                "groups."
            )
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        if len(reason) > _LONGEST_REASON:
            reason = reason[: _LONGEST_REASON - 3] + "..."
        raise InvalidArgumentError(f"{what}: {reason}{advice and f'. {advice}'}") from error


def _wants_process_groups(error: BaseException) -> bool:
    """Did code raise the error that looks up or uses process groups?"""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return module.startswith(_PROCESS_GROUPS) or "process group" in str(error).lower()


def _closest(name: str, known: Iterable[str]) -> str:
    """The end of a message: names similar to ``name``, if there are any."""
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else "."


# ---- Hugging Face ---------------------------------------------------------------------


def _config(source: str) -> Any:
    """The transformers config of a file, a directory or a model type."""
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    path = os.path.join(source, "config.json") if os.path.isdir(source) else source
    if os.path.isfile(path):
        with _one_line(f"transformers cannot use the config {path!r}", _ANY_MODEL):
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not source or path != source or re.search(r"[/\\:]|\.json$", source):
        what = f"{path!r} does not exist" if source else "the model's source is empty"
        raise InvalidArgumentError(
            f"{what}: name a Hugging Face config.json (for a model of the hub, download it "
            "first) or a directory with one, a model type of transformers such as 'mixtral', "
            "or 'module:function'."
        )
    if source not in CONFIG_MAPPING:
        raise InvalidArgumentError(
            f"model type {source!r} is unknown to transformers {__version__}"
            + _closest(source, CONFIG_MAPPING.keys())
        )
    with _one_line(f"transformers has no default config for {source!r}", _DEFAULTS):
        return AutoConfig.for_model(source)


def _model_class(config: Any, source: str) -> Any:
    """The class that transformers trains with this config."""
    from transformers.models.auto import modeling_auto

    others = (name for name in vars(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING", name))
    for name in (*_FIRST_MAPPINGS, *others):
        mapping = getattr(modeling_auto, name, {})
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise InvalidArgumentError(
        f"transformers has no model of its own for {source!r} ({type(config).__name__}): name "
        "the model that it is part of, or a 'module:function' that builds it."
    )


def _dtype(config: Any) -> torch.dtype:
    """The dtype in the config or in the config of its language part; otherwise bfloat16."""
    for part in (config, config.get_text_config()):
        name = str(getattr(part, "dtype", None)).removeprefix("torch.")
        if name in _DTYPES:
            return _DTYPES[name]
    return torch.bfloat16


# ---- module:function ------------------------------------------------------------------


def _call(source: str) -> nn.Module:
    with _current_directory_first():
        function = _find_function(source)
        with _one_line(f"{source!r} failed"), torch.device("meta"):
            model = function()
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"{source!r} returned {type(model).__name__}: it must return the model, an nn.Module."
        )
    return model


@contextlib.contextmanager
def _current_directory_first() -> Iterator[None]:
    """Make modules of the current directory importable, as under ``python -m``."""
    entry = os.getcwd()
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _find_function(source: str) -> Any:
    module_name, _, name = source.partition(":")
    with _one_line(f"{source!r}: module {module_name!r} cannot be imported"):
        module = importlib.import_module(module_name)
    try:
        function = operator.attrgetter(name)(module)
    except AttributeError as error:
        callables = (key for key, value in vars(module).items() if callable(value))
        raise InvalidArgumentError(
            f"module {module_name!r} has no function {name!r}" + _closest(name, callables)
        ) from error
    if not callable(function):
        raise InvalidArgumentError(f"{source!r} is no function but {type(function).__name__}.")
    return function
