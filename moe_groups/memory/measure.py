"""Exact tensor memory of a step, and of a whole iteration by phase."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch

from moe_groups._common.arguments import checked
from moe_groups._common.garbage import no_garbage_collection
from moe_groups._common.text import text_table
from moe_groups.errors import InvalidArgumentError, MeasurementError
from moe_groups.memory.recorders import CPURecorder, CUDARecorder, Recording, Segment

_Recorder: TypeAlias = CPURecorder | CUDARecorder
_BETWEEN = "(between)"
_HEADERS = ["phase", "before", "peak", "after", "peak - before", ""]

_measuring = False


class MeasuredPhase:
    """Tensor memory over a phase, in bytes; known when the measurement has ended.

    Attributes:
        name: of the phase.
        before: allocated when the phase began.
        peak: the most allocated at any time in it.
        after: allocated when it ended.
    """

    name: str
    before: int
    peak: int
    after: int
    _figures: ClassVar[tuple[str, ...]] = ("before", "peak", "after")

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def transient(self) -> int:
        """T: bytes at the peak on top of those allocated when the phase began."""
        return self.peak - self.before

    def __getattr__(self, name: str) -> Any:
        if name in self._figures:
            raise MeasurementError(
                f"{name!r} of {self.name!r} is known when the measurement has ended without an "
                "error: read it after the with block."
            )
        raise AttributeError(name)

    def _set(self, segment: Segment) -> None:
        self.before, self.peak, self.after = segment


class MeasuredStep(MeasuredPhase):
    """Tensor memory over a step, in bytes; known when the step has ended.

    Attributes:
        held: R, the bytes that were allocated when the step began and were released by its
            end: the gradients.
    """

    held: int
    _figures: ClassVar = (*MeasuredPhase._figures, "held")

    @property
    def kept(self) -> int:
        """Bytes that were allocated in the step and were still there at its end."""
        return self.after - self.before + self.held

    @property
    def step_peak(self) -> int:
        """T + R: the peak above the memory from before that stays."""
        return self.transient + self.held

    def __str__(self) -> str:
        return (
            f"{self.name}: T + R = {self.step_peak:,} bytes (transient T {self.transient:,}, "
            f"held R {self.held:,}); before {self.before:,}, peak {self.peak:,}, "
            f"after {self.after:,}, kept {self.kept:,}"
        )


class MeasuredIteration:
    """Tensor memory of an iteration, in bytes and by phase; known when the iteration has ended."""

    def __init__(self, mark: Callable[[], None]) -> None:
        self._mark = mark
        self._uses = [MeasuredPhase(_BETWEEN)]
        self._open: str | None = None
        self._ended = False

    @checked
    @contextmanager
    def phase(self, name: str) -> Iterator[MeasuredPhase]:
        """Measure a part of the iteration by itself; names may repeat.

        Raises:
            MeasurementError: inside another phase, or after the iteration.
        """
        if self._open is not None:
            raise MeasurementError(
                f"Phase {name!r} begins inside phase {self._open!r}: end that one first."
            )
        if self._ended:
            raise MeasurementError(f"Phase {name!r} begins after the iteration: move it inside.")
        self._open = name
        self._mark()
        use = MeasuredPhase(name)
        self._uses.append(use)
        try:
            yield use
        finally:
            self._open = None
            self._mark()
            self._uses.append(MeasuredPhase(_BETWEEN))

    @property
    def phases(self) -> list[MeasuredPhase]:
        """All phases in the order of time, including those between named phases."""
        return [use for use in self._uses if use.name != _BETWEEN or _busy(use)]

    @property
    def before(self) -> int:
        """Bytes allocated when the iteration began."""
        return self._uses[0].before

    @property
    def peak(self) -> int:
        """The most bytes allocated at any time in the iteration."""
        return self.peak_phase.peak

    @property
    def after(self) -> int:
        """Bytes allocated when the iteration ended."""
        return self._uses[-1].after

    @property
    def peak_phase(self) -> MeasuredPhase:
        """The phase that sets the peak; the first one of several."""
        return max(self.phases or self._uses, key=lambda use: use.peak)

    def __str__(self) -> str:
        top = self.peak_phase
        rows = [
            [use.name]
            + [f"{count:,}" for count in (use.before, use.peak, use.after, use.transient)]
            + ["<- peak" if use is top else ""]
            for use in self.phases
        ]
        return text_table(rows, _HEADERS, range(1, 5))

    def _end(self, segments: list[Segment]) -> None:
        self._ended = True
        for use, segment in zip(self._uses, segments, strict=True):
            use._set(segment)


def _busy(use: MeasuredPhase) -> bool:
    return not use.before == use.peak == use.after


@checked
@contextmanager
def measure_step_memory(device: torch.device | str | None = None) -> Iterator[MeasuredStep]:
    """Exact tensor memory of the code in the block, for example ``engine.step()``.

    Counts what PyTorch's allocator of ``device`` hands out in all threads, including
    temporaries inside C++ kernels, but not what communication libraries allocate themselves.
    The figures for CUDA are those of the allocator's blocks, which are multiples of 512
    bytes; ``torch.cuda.max_memory_allocated`` is reset.

    Args:
        device: "cpu" or a CUDA device; None is the current CUDA device if CUDA is in use,
            else the CPU.

    Raises:
        InvalidArgumentError: another kind of device, or one that is not there.
        MeasurementError: inside another measurement; on the CPU also while a profiler runs, or
            where one ran in the block.

    Example:
        >>> with measure_step_memory() as memory:                         # doctest: +SKIP
        ...     engine.step()
        >>> memory.transient, memory.held, memory.step_peak               # doctest: +SKIP
        (1_048_576, 786_432, 1_835_008)
    """
    memory = MeasuredStep("step")
    with _recording(_recorder(device)) as recordings:
        yield memory
    memory._set(recordings[0].segments[0])
    memory.held = recordings[0].released


@checked
@contextmanager
def measure_iteration_memory(
    device: torch.device | str | None = None,
) -> Iterator[MeasuredIteration]:
    """Exact tensor memory of a whole iteration, and the phase that sets its peak.

    Args:
        device: as for :func:`measure_step_memory`, whose description applies here too.

    Raises:
        InvalidArgumentError: another kind of device, or one that is not there.
        MeasurementError: inside another measurement; on the CPU also while a profiler runs, or
            where one ran in the block.

    Example:
        >>> with measure_iteration_memory() as memory:                    # doctest: +SKIP
        ...     with memory.phase("forward"):
        ...         loss = engine(batch)
        ...     with memory.phase("backward"):
        ...         engine.backward(loss)
        ...     with memory.phase("step"):
        ...         engine.step()
        >>> print(memory)                                                 # doctest: +SKIP
    """
    recorder = _recorder(device)
    memory = MeasuredIteration(recorder.mark)
    with _recording(recorder) as recordings:
        yield memory
    memory._end(recordings[0].segments)


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[list[Recording]]:
    """Record the block; the recording is in the list when it ended without an error."""
    global _measuring
    if _measuring:
        raise MeasurementError(
            "A measurement begins inside another one: measure an iteration by phases, or end the "
            "other one first."
        )
    recordings: list[Recording] = []
    recorder.start()
    _measuring = True
    ended = False
    try:
        yield recordings
        ended = True
    finally:
        _measuring = False
        # What is collected after the last mark was still there in the block.
        with no_garbage_collection():
            if ended:
                recorder.mark()
            recording = recorder.stop()
    if len(recording.segments) != recorder.marks - 1:
        raise MeasurementError(
            "A profiler ran inside the measurement, which ended the recording: run it elsewhere."
        )
    recordings.append(recording)


def _recorder(given: torch.device | str | None) -> _Recorder:
    cuda = torch.cuda.is_available()
    if given is None:
        given = "cuda" if cuda and torch.cuda.is_initialized() else "cpu"
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise InvalidArgumentError(f"device={given!r} is none that PyTorch knows.") from error
    if device.type == "cpu":
        return CPURecorder()
    if device.type != "cuda":
        raise InvalidArgumentError(f"device={given!r} cannot be measured: use 'cpu' or 'cuda'.")
    index = device.index if device.index is not None or not cuda else torch.cuda.current_device()
    if index is None or index >= torch.cuda.device_count():
        raise InvalidArgumentError(f"device={given!r} is not on this machine: use 'cpu'.")
    return CUDARecorder(torch.device("cuda", index))
