"""Cells from the page store to a device of its own memory: disk to staging memory to HBM, both hops behind compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread

from tierstore.contracts import Buffer, CellRead, CopyEngine, Fence, PageRun
from tierstore.errors import SessionClosedError
from tierstore.fences import Promise, wait_for_end
from tierstore.paging.slots import Slots
from tierstore.trips import TripLog

Stretch = tuple[PageRun, int, int]
"""Cells ``[first, first + count)`` of a run."""


@dataclass(slots=True)
class _Bring:
    """Cells on their way, one behind the other in a slot of staging memory, each to one of ``targets``."""

    stretches: Sequence[Stretch]
    targets: Sequence[Buffer]
    after: Sequence[Fence]
    promise: Promise = field(default_factory=Promise)
    slot: int = -1
    read: Fence | None = None


class StagedReads:
    """One thread reads in the order of ``bring`` as far as ``slots`` has room, and issues each copy to the device as
    soon as its bytes are there. ``targets`` are filled in order, each by as many bytes as it has.

    Others may take slots too, and give them back at once with the fence of what they do with them."""

    def __init__(
        self,
        slots: Slots,
        cell_nbytes: int,
        read: Callable[[Sequence[CellRead]], Fence],
        engine: CopyEngine,
        trips: TripLog,
    ) -> None:
        self._slots = slots
        self._cell_nbytes = cell_nbytes
        self._read = read
        self._engine = engine
        self._trips = trips
        self._closed = False
        self._asked: SimpleQueue[_Bring | None] = SimpleQueue()
        self._reading: deque[_Bring] = deque()
        self._thread = Thread(target=self._work, name="tierstore-page-staging", daemon=True)
        self._thread.start()

    def bring(self, stretches: Sequence[Stretch], targets: Sequence[Buffer], after: Sequence[Fence]) -> Fence:
        """Start both hops; ``targets`` are written once ``after`` is complete."""
        if self._closed:
            raise SessionClosedError("pages were asked of a pager that was shut: open a new session")
        bring = _Bring(stretches, targets, after)
        self._asked.put(bring)
        return bring.promise

    def close(self) -> None:
        """End the thread: what was not read yet fails, what was is copied. Idempotent."""
        if not self._closed:
            self._closed = True
            self._asked.put(None)
            self._thread.join()

    def _work(self) -> None:
        while True:
            bring = self._next()
            if bring is not None:
                self._begin(bring)
            elif self._reading:
                self._finish(self._reading.popleft())
            else:
                return
            del bring  # an idle thread keeps no buffer alive

    def _next(self) -> _Bring | None:
        """What to read next; None while the first of what is being read has to make room, and at the end."""
        idle = not self._reading
        if not idle and not self._slots.free:
            return None
        try:
            return self._asked.get(block=idle and not self._closed)
        except Empty:
            return None

    def _begin(self, bring: _Bring) -> None:
        taken = self._slots.take(block=not self._reading)
        while taken is None:  # another thread was faster
            if self._reading:
                self._finish(self._reading.popleft())
            taken = self._slots.take(block=not self._reading)
        bring.slot, after = taken
        try:
            if self._closed:
                raise SessionClosedError("the pager was shut before its pages were read: open a new session")
            wait_for_end(after)
            bring.read = self._trips.begin(self._read(self._requests(bring)), "nvme->ram", self._nbytes(bring))
            self._reading.append(bring)
        except Exception as error:  # it comes out of the promise, and the thread goes on
            self._slots.give_back(bring.slot, after)
            bring.promise.keep((), error)

    def _requests(self, bring: _Bring) -> list[CellRead]:
        requests, at = [], 0
        for run, first, count in bring.stretches:
            nbytes = count * self._cell_nbytes
            requests.append(CellRead(run, first, count, self._slots.part(bring.slot, at, nbytes)))
            at += nbytes
        return requests

    def _finish(self, bring: _Bring) -> None:
        copied: Fence | None = None
        try:
            if bring.read is None:
                raise AssertionError("what was begun is being read")
            bring.read.wait()
            copied = self._copy(bring)
            bring.promise.keep((copied,))
        except Exception as error:  # it comes out of the promise, and the thread goes on
            bring.promise.keep(() if copied is None else (copied,), error)
        self._slots.give_back(bring.slot, () if copied is None else (copied,))

    def _copy(self, bring: _Bring) -> Fence:
        pairs, at = [], 0
        for target in bring.targets:
            pairs.append((self._slots.part(bring.slot, at, target.numel()), target))
            at += target.numel()
        return self._trips.begin(self._engine.copy(pairs, after=bring.after), "ram->hbm", at)

    def _nbytes(self, bring: _Bring) -> int:
        return sum(count for _, _, count in bring.stretches) * self._cell_nbytes
