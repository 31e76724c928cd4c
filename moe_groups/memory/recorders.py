"""Record what the allocator of a device does, in segments; ``measure`` uses it.

Both recorders have the same methods: :meth:`start`, then :meth:`mark` at the end of each segment,
then :meth:`stop`. On CUDA the allocator keeps the figures. On the CPU it keeps none, but it can
report each block that it hands out or takes back to PyTorch's profiler, and the figures are sums
of these reports.
"""

import ctypes
import gc
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moe_groups._common.garbage import no_garbage_collection
from moe_groups.memory.cpu_allocator import reporter, start_profiler, stop_profiler


class Segment(NamedTuple):
    """Tensor memory between two marks, in bytes.

    Attributes:
        begin: allocated at the first mark.
        peak: the most allocated at any time between the marks.
        end: allocated at the second mark.
    """

    begin: int
    peak: int
    end: int


class Recording(NamedTuple):
    """What a recorder found.

    Attributes:
        segments: in the order of time, one less than there were marks.
        released: bytes of what was allocated at the first mark and released by the last.
    """

    segments: list[Segment]
    released: int


_SETTLE = 0.05
"""Seconds within which gloo's threads release the buckets that they have reduced."""


class CPURecorder:
    """Follows the blocks of PyTorch's CPU allocator, also those inside C++ kernels.

    While a profiler runs in the thread, the allocator keeps the sizes and the sum of the blocks
    that it hands out, and reports them. Two things are added through c10's own symbols
    (``ProfiledCPUMemoryReporter`` in c10/core/CPUAllocator.cpp): every storage that Python can
    reach is announced when recording starts, as if it were handed out then; and a flag makes the
    allocator keep the sum in all threads, because either this thread or one of gloo's may
    release a gradient bucket.
    """

    def __init__(self) -> None:
        self._reporter = reporter()
        self._mark = ctypes.create_string_buffer(1)  # an address that no tensor has
        self._address = ctypes.addressof(self._mark)
        self._old: dict[int, tuple[int, StorageWeakRef]] = {}
        self.marks = 0

    def start(self) -> None:
        """Begin the first segment.

        Raises:
            MeasurementError: a profiler is running.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            time.sleep(_SETTLE)
        start_profiler()
        try:
            self._reporter.all_threads.value = True
            self._announce()
            self.mark()
        except BaseException:
            self.stop()
            raise

    def _announce(self) -> None:
        """Add the blocks that exist to the allocator's table.

        Blocks that are released meanwhile do not count as released in the first segment: garbage,
        and blocks of other threads.
        """
        with no_garbage_collection():
            for storage in live_storages("cpu"):
                address, size = storage.data_ptr(), storage.nbytes()
                self._old[address] = size, StorageWeakRef(storage)
                self._reporter.new(address, size)
        self._old = {key: old for key, old in self._old.items() if not old[1].expired()}

    def mark(self) -> None:
        """End a segment and begin the next."""
        self.marks += 1
        self._reporter.new(self._address, 1)
        self._reporter.delete(self._address)

    def stop(self) -> Recording:
        """What was found; to be called right after the last mark."""
        gone = {address for address, (_, storage) in self._old.items() if storage.expired()}
        try:
            segments, freed, left = replay(stop_profiler(), self._address)
            # What another thread freed was no event; but not all that lose their storage were
            # freed: some have another one, or came from outside as numpy's.
            gone -= self._still_known(gone - freed)
            for address in left - gone:  # else later blocks there would be taken for these
                self._reporter.delete(address)
        finally:
            self._reporter.all_threads.value = False
        return Recording(
            segments, sum(self._old[key][0] for key in self._old.keys() & (gone | freed))
        )

    def _still_known(self, addresses: set[int]) -> set[int]:
        """Those whose blocks the allocator has not taken back; it forgets them."""
        if not addresses:
            return set()
        start_profiler()
        for address in addresses:
            self._reporter.delete(address)
        return {address for address, _, _ in stop_profiler()}


class CUDARecorder:
    """Reads the statistics of PyTorch's caching allocator, and resets its peak at each mark.

    Args:
        device: with an index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._segments: list[Segment] = []
        self.marks = 0

    def start(self) -> None:
        """Begin the first segment."""
        self._storages = {
            storage.data_ptr(): StorageWeakRef(storage) for storage in live_storages(self._device)
        }
        self._blocks = self._allocated_blocks()
        self._begin()

    def mark(self) -> None:
        """End a segment and begin the next."""
        end = torch.cuda.memory_allocated(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        self._segments.append(Segment(self._allocated, peak, end))
        self._begin()

    def stop(self) -> Recording:
        """What was found; to be called right after the last mark."""
        blocks = self._allocated_blocks()
        # Another block may have the address of a released one: then the old storage shows it.
        released = sum(
            size
            for address, size in self._blocks.items()
            if address not in blocks
            or (address in self._storages and self._storages[address].expired())
        )
        return Recording(self._segments, released)

    def _begin(self) -> None:
        self.marks += 1
        self._allocated = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def _allocated_blocks(self) -> dict[int, int]:
        """Sizes by address, as the statistics count them: rounded up by the allocator."""
        return {
            block["address"]: block["size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == self._device.index
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        }


def replay(
    events: Iterable[tuple[int, int, int]], mark: int
) -> tuple[list[Segment], set[int], set[int]]:
    """Read allocator events.

    Args:
        events: of blocks in the order of time, address, size and the sum of all blocks after
            it; the size of a freed one is negative.
        mark: the address whose allocation ends a segment. What comes before the first mark
            was there when the first segment began.

    Returns:
        The segments, the addresses that were allocated at the first mark and freed since, and
        those that still are at the end.
    """
    segments: list[Segment] = []
    blocks: set[int] = set()
    old: set[int] = set()
    freed: set[int] = set()
    base: int | None = None
    begin = peak = 0
    for address, size, total in events:
        base = total - size if base is None else base
        level = total - base
        if address == mark:
            if size > 0:
                level -= size
                segments.append(Segment(begin, max(peak, level), level))
                begin = peak = level
                old = old if segments[1:] else set(blocks)
            continue
        # Between two events other threads change the sum; so it may be highest before one.
        peak = max(peak, level, level - size)
        (blocks.add if size > 0 else blocks.discard)(address)
        if address in old:  # and if it is handed out again, then another thread freed it
            old.discard(address)
            freed.add(address)
    return segments[1:], freed, blocks


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
    with torch._C.DisableTorchFunctionSubclass():  # subclasses may return anything
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
