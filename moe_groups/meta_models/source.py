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
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from moe_groups._common.json_file import read_json
from moe_groups.errors import InvalidArgumentError

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_QUANTIZATION = ("quantization_config", "compression_config")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PROCESS_GROUPS = ("deepspeed.comm", "deepspeed.utils.groups", "deepspeed.moe", "torch.distributed")
_MAPPINGS = (  # whole models before their language parts, heads before bare stacks
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)
_LONGEST_REASON = 300


def load_model(source: str, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the model that ``source`` names, on the meta device.

    Quantization in a Hugging Face config is ignored, because training uses ``dtype``. Modules
    that ``transformers`` does not build, such as DeepSeek-V3's multi-token prediction, are
    missing here too.

    Args:
        source: one of

            * the path of a Hugging Face ``config.json``, or of a directory with one;
            * a model type of the installed ``transformers``, such as ``"mixtral"``: the model
              of that type's default config (for Mixtral the 8x7B);
            * ``"package.module:function"``: called without arguments under
              ``torch.device("meta")``; the module may be in the current directory. It returns
              one rank's model, with DeepSpeed MoE layers or tagged experts.
        dtype: of the parameters; None is the config's, or bfloat16 if the config has none.
            A function chooses its own.

    Raises:
        InvalidArgumentError: there is no such file, model type or function, or it cannot be
            read or built; the message is one line.
    """
    if names_function(source):
        return _call(source)
    values = _read(source)
    config = _config(values, source)
    return _build(config, source).to(dtype or _dtype(values))


def names_function(source: str) -> bool:
    """Is ``source`` a ``"module:function"``, which returns one rank's model?"""
    return bool(_FUNCTION.fullmatch(source)) and not os.path.exists(source)


# ---- Hugging Face ---------------------------------------------------------------------


def _read(source: str) -> dict[str, Any]:
    """The values of the config file; for a model type only ``model_type``."""
    path = os.path.join(source, "config.json") if os.path.isdir(source) else source
    if os.path.isfile(path):
        return _read_json(path)
    if not source or path != source or re.search(r"[/\\:]|\.json$", source):
        what = f"{path!r} does not exist" if source else "the model's source is empty"
        raise InvalidArgumentError(
            f"{what}: name a Hugging Face config.json (for a model of the hub, download it "
            "first) or a directory with one, a model type of transformers such as 'mixtral', "
            "or 'module:function'."
        )
    return {"model_type": source}


def _read_json(path: str) -> dict[str, Any]:
    values = read_json(Path(path), InvalidArgumentError)
    if not isinstance(values.get("model_type"), str):
        raise InvalidArgumentError(
            f"{path!r} is not a Hugging Face config: it has no model_type, such as "
            '"model_type": "mixtral".'
        )
    return values


def _config(values: dict[str, Any], source: str) -> Any:
    """The transformers config with these values."""
    transformers = _transformers()
    model_type = values["model_type"]
    known = transformers.CONFIG_MAPPING
    if model_type not in known:
        raise InvalidArgumentError(
            f"model type {model_type!r} is unknown to transformers {transformers.__version__}"
            + _closest(model_type, known.keys())
        )
    try:
        return known[model_type].from_dict(_without_quantization(values))
    except Exception as error:
        raise InvalidArgumentError(
            f"transformers cannot use the config {source!r}: {_reason(error)}"
        ) from error


def _build(config: Any, source: str) -> nn.Module:
    transformers = _transformers()
    mappings = (getattr(transformers, name) for name in _MAPPINGS)
    kinds = next((found[type(config)] for found in mappings if type(config) in found), None)
    if kinds is None:
        raise InvalidArgumentError(
            f"transformers has no model of its own for {source!r} ({type(config).__name__}): name "
            "the model that it is part of, or a 'module:function' that builds it."
        )
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    try:
        with torch.device("meta"):
            model: nn.Module = kind(config)
    except Exception as error:
        raise InvalidArgumentError(
            f"transformers cannot build {kind.__name__} from {source!r}: {_reason(error)}"
        ) from error
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InvalidArgumentError(
            "Hugging Face configs and model types need transformers, which cannot be imported "
            f"({_reason(error)}): pip install 'moe-groups[hf]'."
        ) from error
    return transformers


def _without_quantization(values: Any) -> Any:
    """A copy without quantization, also in nested configs: the plan is for training."""
    if not isinstance(values, dict):
        return values
    return {k: _without_quantization(v) for k, v in values.items() if k not in _QUANTIZATION}


def _dtype(values: dict[str, Any]) -> torch.dtype:
    """The dtype in the config or in the config of its language part; otherwise bfloat16."""
    text = values.get("text_config")
    for part in (values, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key)).removeprefix("torch.")
            if name in _DTYPES:
                return _DTYPES[name]
    return torch.bfloat16


# ---- module:function ------------------------------------------------------------------


def _call(source: str) -> nn.Module:
    with _current_directory_first():
        function = _find_function(source)
        try:
            with torch.device("meta"):
                model = function()
        except (Exception, SystemExit) as error:
            _refuse_call(source, error)
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
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        raise InvalidArgumentError(
            f"{source!r}: module {module_name!r} cannot be imported: {_reason(error)}"
        ) from error
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


def _refuse_call(source: str, error: BaseException) -> NoReturn:
    """Raise with the reason of the failure, and advice if the function needs process groups."""
    advice = ""
    if _wants_process_groups(error):
        advice = (
            " It needs process groups, and there are none while planning: build the model "
            "alone, with ep_size given to its MoE layers; deepspeed.initialize makes the groups."
        )
    raise InvalidArgumentError(f"{source!r} failed: {_reason(error)}{advice}") from error


def _wants_process_groups(error: BaseException) -> bool:
    """Did code raise the error that looks up or uses process groups?"""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return module.startswith(_PROCESS_GROUPS) or "process group" in str(error).lower()


# ---- texts ----------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    """Type and message of an error in one short line."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def _closest(name: str, known: Iterable[str]) -> str:
    """The end of a message: names similar to ``name``, if there are any."""
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else "."
