"""Disk straight to device memory: one hop, past the host."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

from tierstore.contracts import Fence, Lease, ReadRequest
from tierstore.errors import SessionClosedError
from tierstore.events import Recorder
from tierstore.feeds.direct import LaidAsInFile, requests_for
from tierstore.fences import Promise, wait_for_end
from tierstore.tensors import Unit
from tierstore.trips import TripLog


class DeviceReads(Protocol):
    """Reads that land in device memory, such as ``copies.gds.GdsReads``."""

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        """Start filling each request's buffer, which is device memory."""
        ...


class GdsFeed(LaidAsInFile):
    """Units lie on the device as they do in the file, with every block at its alignment.

    ``reads`` numbers files as the units' pieces do. The read of a unit starts once ``lease.after`` is complete; a
    thread waits for that, so that neither the host nor compute does. Leases must be aligned to ``SLOT_ALIGN`` (4096)
    bytes. Records ``Moved("nvme->hbm")``.
    """

    def __init__(self, reads: DeviceReads, recorder: Recorder) -> None:
        super().__init__()
        self._reads = reads
        self._trips = TripLog(recorder)
        self._closed = False
        self._queue: SimpleQueue[tuple[Unit, Lease, Sequence[ReadRequest], Promise] | None] = SimpleQueue()
        self._thread = Thread(target=self._start_all, name="tierstore-gds-read", daemon=True)
        self._thread.start()

    def bring(self, unit: Unit, lease: Lease) -> Fence:
        """Start reading ``unit`` into ``lease`` when its earlier users are through; never blocks on them."""
        if self._closed:
            raise SessionClosedError(f"unit {unit.name!r} was asked of a closed feed: open a new session")
        promise = Promise()
        self._queue.put((unit, lease, requests_for(unit, self._layout(unit), lease), promise))
        return promise

    def close(self) -> None:
        """End the thread: what was not issued fails, what was is waited for. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._trips.drain()

    def _start_all(self) -> None:
        while (item := self._queue.get()) is not None:
            unit, lease, requests, promise = item
            try:
                if self._closed:
                    raise SessionClosedError(f"the session was closed before unit {unit.name!r} was read")
                wait_for_end(lease.after)
                promise.keep([self._trips.begin(self._reads.read(requests), "nvme->hbm", unit.nbytes)])
            except Exception as error:  # it comes out of the promise, and the thread goes on
                promise.keep((), error)
            del item, unit, lease, requests, promise  # an idle thread keeps no memory alive
