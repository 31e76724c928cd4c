"""All storages of tensors that are alive."""

import gc
from collections.abc import Iterator

import torch


def live_storages(device: torch.device | str) -> list[torch.UntypedStorage]:
    """Each storage on ``device`` that a tensor known to Python uses, if it has memory.

    One for each address. A device without an index stands for all of its type. Gradients are
    included; tensors that only C++ holds, such as those that a graph saved for its backward
    pass, are not. Objects that ``gc.freeze`` put aside, which Python does not list, are tracked
    again.
    """
    device = torch.device(device)
    gc.unfreeze()
    found: dict[int, torch.UntypedStorage] = {}
    with torch._C.DisableTorchFunctionSubclass():  # subclasses may answer as they like
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor):  # isinstance would ask proxies
                for tensor in _parts(thing):
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
