"""Measure the step peak T + R without the library, to check its measurements."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile, record_function

_STEP = "the optimizer step"


def step_peak_bytes(backward: Callable[[], None], step: Callable[[], None]) -> int:
    """Peak tensor memory during ``step()`` minus the memory after it, in bytes.

    Runs ``backward()`` too, because it must record the allocation of gradients that the step
    releases. Do not measure the first step of a run, in which the optimizer creates its state.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        backward()
        with record_function(_STEP):
            step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    begin, end = next((e.start_ns(), e.end_ns()) for e in events if e.name() == _STEP)
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() > end:
            break
        if event.start_ns() >= begin:
            peak = max(peak, held)
        held += event.nbytes()
    return max(peak, held) - held
