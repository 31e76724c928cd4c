"""PyTorch's private parts that report its CPU allocations: a profiler, and symbols of c10."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._C import _autograd
from torch._C._profiler import RecordScope, _EventType

from moe_groups.errors import MeasurementError


def start_profiler() -> None:
    """Begin to record what the CPU allocator does.

    Raises:
        MeasurementError: a profiler is running.
    """
    # The first knows torch.profiler's in all threads, the second every kind in this one.
    # PyTorch itself does not check, and crashes.
    if torch.autograd.profiler._is_profiler_enabled or _autograd._profiler_enabled():
        raise MeasurementError(
            "A profiler is running, and CPU memory is measured with PyTorch's profiler, of "
            "which one can run at a time: end it first, or measure in a run of its own."
        )
    settings = torch.autograd.profiler.profile(profile_memory=True, use_kineto=True)
    config, activities = settings.config(), settings.kineto_activities
    _autograd._prepare_profiler(config, activities)
    # Only the user's scope: memory is reported anyway, and without recording every operator this
    # is about ten times cheaper.
    _autograd._enable_profiler(config, activities, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]


def stop_profiler() -> list[tuple[int, int, int]]:
    """Its events since the start, in the order of time.

    Returns:
        Address and size of each block, the size of a freed one negative, and the sum of all
        blocks after it. Those freed are there only if their size was known.
    """
    events: list[Any] = list(_autograd._disable_profiler().experimental_event_tree())
    found = []
    while events:
        event = events.pop()
        events += event.children
        tag, block = event.typed
        if tag == _EventType.Allocation and block.device.type == "cpu":
            found.append((event.start_time_ns, block.ptr, block.alloc_size, block.total_allocated))
    return [event[1:] for event in sorted(found)]


class Reporter(NamedTuple):
    """The allocator's own functions, which it calls for each block.

    Attributes:
        new: a block of so many bytes is handed out at this address.
        delete: the block at this address is taken back.
        all_threads: keep sizes and sum also in threads without a profiler.
    """

    new: Callable[[int, int], None]
    delete: Callable[[int], None]
    all_threads: ctypes.c_bool


@functools.cache
def reporter() -> Reporter:
    """Look them up.

    Raises:
        MeasurementError: this build of PyTorch does not have them.
    """
    library = ctypes.CDLL(torch._C.__file__)  # names are looked up in what it links to, as c10
    try:
        get = library["_ZN3c1025profiledCPUMemoryReporterEv"]
        new = library["_ZN3c1025ProfiledCPUMemoryReporter3NewEPvm"]
        delete = library["_ZN3c1025ProfiledCPUMemoryReporter6DeleteEPv"]
        flag = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage")
    except (AttributeError, ValueError) as error:
        raise MeasurementError(
            f"PyTorch {torch.__version__} lacks c10::ProfiledCPUMemoryReporter as it is used here: "
            "measure CPU memory with PyTorch 2.13 on Linux."
        ) from error
    get.restype = ctypes.c_void_p
    new.argtypes, new.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], None
    delete.argtypes, delete.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    this = get()
    return Reporter(functools.partial(new, this), functools.partial(delete, this), flag)
