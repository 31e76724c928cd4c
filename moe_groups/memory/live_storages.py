"""All storages of tensors that are alive."""

import gc
import inspect
import sys
from collections.abc import Iterator
from types import FrameType

import torch


def live_storages(device: torch.device | str) -> list[torch.UntypedStorage]:
    """Each storage on ``device`` that a tensor known to Python uses, if it has memory.

    One for each address. A device without an index stands for all of its type. Gradients are
    included; tensors that only C++ holds, such as those that a graph saved for its backward
    pass, are not.
    """
    device = torch.device(device)
    found: dict[int, torch.UntypedStorage] = {}
    with torch._C.DisableTorchFunctionSubclass():  # subclasses may answer as they like
        for thing in _objects():
            if issubclass(type(thing), torch.Tensor):  # isinstance would ask proxies
                for tensor in _parts(thing):  # type: ignore[arg-type]
                    storage = _storage(tensor, device)
                    if storage is not None:
                        found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def _parts(tensor: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The tensor, its gradients, and the parts of sparse tensors."""
    while tensor is not None:
        if tensor.layout == torch.sparse_coo:
            yield from (tensor._indices(), tensor._values())
        else:
            yield tensor
        tensor = tensor.grad if tensor.is_leaf or tensor.retains_grad else None


def _storage(tensor: torch.Tensor, device: torch.device) -> torch.UntypedStorage | None:
    if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
        return None
    try:
        storage = tensor.untyped_storage()
        real = storage.device.type == device.type  # a fake tensor's is on meta
        return storage if real and storage.nbytes() and storage.data_ptr() else None
    except (RuntimeError, NotImplementedError):  # wrapped or opaque: no memory of its own
        return None


def _objects() -> list[object]:
    """All objects that the garbage collector tracks."""
    objects: list[object] = gc.get_objects()
    if not gc.get_freeze_count():
        return objects
    # Those that gc.freeze put aside are not listed: follow references to them.
    roots = [sys.modules, *_locals()]
    seen = set(map(id, objects))
    found = [*objects, roots]
    while found:
        referents = {id(thing): thing for thing in gc.get_referents(*found)}
        found = [t for key, t in referents.items() if key not in seen and gc.is_tracked(t)]
        seen.update(map(id, found))
        objects += found
    return objects


def _locals() -> Iterator[object]:
    """The local variables of all functions that are running."""
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_globals is not globals():  # our own would lead to the list we make
                variables = frame.f_locals
                yield from list(variables.values())
                # Up to Python 3.12 a function's are a copy, which the frame would keep alive.
                if frame.f_code.co_flags & inspect.CO_OPTIMIZED and isinstance(variables, dict):
                    variables.clear()
            frame = frame.f_back
