"""Copies between host memory and a CUDA device, on streams of their own and ordered with compute by events."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from threading import Lock
from time import perf_counter
from typing import Any, cast

import torch

from tierstore.contracts import Buffer, Fence
from tierstore.copies.cpu import check_sizes
from tierstore.errors import DeviceError

SEGMENT_NBYTES = 256 << 20
"""No copy crosses a multiple of this host address: host memory is pinned in such segments (``CudaRegistrar``)."""
_EVENTS = 64  # of each kind, made ahead; more are made when more fences are held at once

_cuda = cast(Any, torch.cuda)  # torch leaves parts of it untyped

_Span = tuple[torch.cuda.Event, torch.cuda.Event]


class CudaFence:
    """Complete when its event is. The event serves another fence only once nobody holds this one any more: streams
    that were told to wait for it wait for what it stood for then, so that is safe while the work is under way."""

    __slots__ = ("_device", "_event", "_spare")

    def __init__(self, event: torch.cuda.Event, device: torch.device, spare: deque[torch.cuda.Event] | None) -> None:
        self._event = event
        self._device = device
        self._spare = spare

    def done(self) -> bool:
        """Whether the device has come past it, or failed."""
        try:
            return bool(cast(Any, self._event).query())
        except RuntimeError as error:
            # While a graph is captured events cannot be asked. A device that failed does nothing any more.
            return "capture" not in str(error)

    def wait(self) -> None:
        """Block the host. Raises ``DeviceError`` when the device failed."""
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise _failed(self._device, error) from error

    def gate(self) -> None:
        """Make this thread's current stream wait; the host goes on."""
        try:
            torch.cuda.current_stream(self._device).wait_event(self._event)
        except RuntimeError as error:
            raise _failed(self._device, error) from error

    def __del__(self) -> None:
        if self._spare is not None:
            self._spare.append(self._event)


class CudaCopyFence(CudaFence):
    """The fence of a copy. Once it is done, ``started`` and ``finished`` are ``time.perf_counter`` readings in seconds
    of when the device ran it (exact to 1 ms in the first hours of a session; their difference always is)."""

    __slots__ = ("_begin", "_clock", "_spans")

    def __init__(self, span: _Span, clock: _DeviceClock, device: torch.device, spans: deque[_Span]) -> None:
        super().__init__(span[1], device, None)
        self._begin = span[0]
        self._clock = clock
        self._spans = spans

    @property
    def started(self) -> float:
        """When the copy began."""
        return self.finished - float(self._begin.elapsed_time(self._event)) / 1e3

    @property
    def finished(self) -> float:
        """When the last byte was there."""
        return self._clock.reading(self._event)

    def __del__(self) -> None:
        self._spans.append((self._begin, self._event))


class _DeviceClock:
    """Tells host time by the events of a device."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._zero: torch.cuda.Event = _cuda.Event(enable_timing=True)
        self._zero.record(stream)
        self._zero.synchronize()
        self._host = perf_counter()

    def reading(self, event: torch.cuda.Event) -> float:
        """``time.perf_counter`` when the complete ``event`` happened, in seconds."""
        return self._host + float(self._zero.elapsed_time(event)) / 1e3


class CudaCopyEngine:
    """Copies on two streams of high priority, one a direction, so that weights in and pages out overlap.

    ``after`` is waited for by the stream, not the host, wherever its fences come from this engine. Copies from host
    memory that is not pinned are correct, but the host takes part in them. Raises ``DeviceError`` without a GPU.
    """

    unified = False

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise DeviceError(f"copies to {device} need an NVIDIA GPU that torch can use: use device='cpu'")
        self._device = device
        self._up: torch.cuda.Stream = _cuda.Stream(device, priority=-1)
        self._down: torch.cuda.Stream = _cuda.Stream(device, priority=-1)
        self._issuing = Lock()  # events of a span stand around the copies of one call
        self._marks: deque[torch.cuda.Event] = deque()
        self._spans: deque[_Span] = deque()
        for _ in range(_EVENTS):  # the driver makes an event when it is first recorded
            self._marks.append(_recorded(_mark_event(), self._up))
            self._spans.append((_recorded(_span_event(), self._up), _recorded(_span_event(), self._up)))
        self._clock = _DeviceClock(self._up)

    def copy(self, pairs: Sequence[tuple[Buffer, Buffer]], *, after: Sequence[Fence] = ()) -> Fence:
        """Issue one asynchronous copy a pair, all host to device or all device to host.

        Raises ``ValueError`` when sizes differ, ``DeviceError`` when the device failed.
        """
        check_sizes(pairs)
        tensors = [(cast(torch.Tensor, src), cast(torch.Tensor, dst)) for src, dst in pairs if src.numel()]
        down = bool(tensors) and not tensors[0][1].is_cuda
        if any(src.is_cuda is not down or dst.is_cuda is down for src, dst in tensors):
            raise ValueError("one copy goes either to the device or from it: make two calls")
        stream = self._down if down else self._up
        with torch.cuda.stream(stream):
            # Outside the lock: where a fence stands for a copy that is yet to be issued, the host waits here.
            for fence in after:
                fence.gate()
            with self._issuing:
                span = self._spans.pop() if self._spans else (_span_event(), _span_event())
                try:
                    span[0].record(stream)
                    for src, dst in tensors:
                        for source, target in within_segments(src, dst, down):
                            target.copy_(source, non_blocking=True)
                    span[1].record(stream)
                except RuntimeError as error:
                    raise _failed(self._device, error) from error
        return CudaCopyFence(span, self._clock, self._device, self._spans)

    def mark(self) -> Fence:
        """A fence for everything issued so far to this thread's current stream."""
        try:
            event = self._marks.pop()
        except IndexError:
            event = _mark_event()
        try:
            event.record(torch.cuda.current_stream(self._device))
        except RuntimeError as error:
            raise _failed(self._device, error) from error
        return CudaFence(event, self._device, self._marks)

    def close(self) -> None:
        """Wait for every copy that was issued. Idempotent."""
        with suppress(RuntimeError):  # a device that failed has nothing under way
            self._up.synchronize()
            self._down.synchronize()


def _mark_event() -> torch.cuda.Event:
    # A host that waits sleeps: the processor is needed elsewhere.
    return cast(torch.cuda.Event, _cuda.Event(blocking=True))


def _span_event() -> torch.cuda.Event:
    return cast(torch.cuda.Event, _cuda.Event(enable_timing=True, blocking=True))


def _recorded(event: torch.cuda.Event, stream: torch.cuda.Stream) -> torch.cuda.Event:
    event.record(stream)
    return event


def within_segments(src: torch.Tensor, dst: torch.Tensor, down: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The pair, in pieces whose host side lies within one segment."""
    at, nbytes, address = 0, src.numel(), (dst if down else src).data_ptr()
    while at < nbytes:
        end = min(nbytes, at + SEGMENT_NBYTES - (address + at) % SEGMENT_NBYTES)
        yield (src, dst) if end - at == nbytes else (src[at:end], dst[at:end])
        at = end


def _failed(device: torch.device, error: RuntimeError) -> DeviceError:
    return DeviceError(f"{device} failed while work was under way: {error}: start a new process")
