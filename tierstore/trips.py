"""Crossings of a link: each is a fence that tells the recorder once, when it is first seen complete."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from threading import Lock
from time import perf_counter

from tierstore.contracts import Fence
from tierstore.events import Moved, Recorder


class Trip:
    """``fence``, and the record of the ``nbytes`` that it says have crossed ``link``.

    Where the fence has clock readings ``started`` and ``finished`` (``time.perf_counter``, 0.0 for unknown)
    the record has these; otherwise it runs from when the move was asked for to when it was seen complete.
    """

    __slots__ = ("_asked", "_fence", "_link", "_lock", "_nbytes", "_recorder")

    def __init__(self, fence: Fence, link: str, nbytes: int, recorder: Recorder) -> None:
        self._fence = fence
        self._link = link
        self._nbytes = nbytes
        self._recorder: Recorder | None = recorder
        self._asked = perf_counter()
        self._lock = Lock()

    def done(self) -> bool:
        """Whether the bytes have arrived, or failed to."""
        if not self._fence.done():
            return False
        self._record()
        return True

    def wait(self) -> None:
        """Block until they have; the record is made before this returns."""
        self._fence.wait()
        self._record()

    def gate(self) -> None:
        """Make compute issued from now on wait for them."""
        self._fence.gate()
        self.done()

    def _record(self) -> None:
        with self._lock:  # held until the record is made: whoever waits may count on it
            recorder, self._recorder = self._recorder, None
            if recorder is None:
                return
            end = perf_counter()
            with suppress(Exception):  # what failed did not cross
                self._fence.wait()
                start = getattr(self._fence, "started", 0.0) or self._asked
                end = getattr(self._fence, "finished", 0.0) or end
                recorder(Moved(self._link, self._nbytes, start, max(start, end)))


class TripLog:
    """The trips of one feed that are not known to be complete. Thread-safe."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._open: deque[Trip] = deque()
        self._lock = Lock()

    def begin(self, fence: Fence, link: str, nbytes: int) -> Trip:
        """A trip that ends with ``fence``; earlier trips that have ended are recorded."""
        trip = Trip(fence, link, nbytes, self._recorder)
        with self._lock:
            while self._open and self._open[0].done():
                self._open.popleft()
            self._open.append(trip)
        return trip

    def drain(self) -> None:
        """Wait until every trip has ended, well or not."""
        with self._lock:
            trips = list(self._open)
            self._open.clear()
        for trip in trips:
            with suppress(Exception):  # told to whoever waits for the unit
                trip.wait()
