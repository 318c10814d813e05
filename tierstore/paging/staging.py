"""Cells from the page store to a device of its own memory: disk to staging memory to HBM, both hops behind compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread

from tierstore.contracts import Buffer, CellRead, CopyEngine, Fence
from tierstore.errors import SessionClosedError
from tierstore.fences import Promise, wait_for_end
from tierstore.paging.groups import places_in_slot
from tierstore.paging.places import Cell
from tierstore.paging.slots import Slots
from tierstore.paging.stretches import Stretch, joined, stretches
from tierstore.trips import TripLog


@dataclass(slots=True)
class _Bring:
    """Cells on their way: ``reads`` to a slot of staging memory, ``copies`` from there to ``target``."""

    reads: Sequence[Stretch]
    copies: Sequence[tuple[int, int, int]]
    target: Buffer
    nbytes: int
    after: Sequence[Fence]
    promise: Promise = field(default_factory=Promise)
    slot: int = -1
    read: Fence | None = None


class StagedReads:
    """One thread reads in the order of ``bring`` as far as ``slots`` has room, and issues each copy to the device as
    soon as its bytes are there.

    Others may take slots too, and give them back at once with the fence of what they do with them."""

    def __init__(
        self,
        slots: Slots,
        frame_nbytes: int,
        read: Callable[[Sequence[CellRead]], Fence],
        engine: CopyEngine,
        trips: TripLog,
    ) -> None:
        self._slots = slots
        self._frame_nbytes = frame_nbytes
        self._read = read
        self._engine = engine
        self._trips = trips
        self._closed = False
        self._asked: SimpleQueue[_Bring | None] = SimpleQueue()
        self._reading: deque[_Bring] = deque()
        self._thread = Thread(target=self._work, name="tierstore-page-staging", daemon=True)
        self._thread.start()

    def bring(self, cells: Sequence[Cell], target: Buffer, offsets: Sequence[int], after: Sequence[Fence]) -> Fence:
        """Start both hops for cells of the store, to ``offsets`` of ``target`` once ``after`` is complete."""
        if self._closed:
            raise SessionClosedError("pages were asked of a pager that was shut: open a new session")
        # worked out now: a cell that is freed meanwhile does not know any more where it was
        places = places_in_slot(cells, self._frame_nbytes, self._slots.nbytes)
        reads = stretches(cells, places, self._frame_nbytes)
        copies = joined(places, offsets, self._frame_nbytes)
        bring = _Bring(reads, copies, target, len(cells) * self._frame_nbytes, after)
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
            bring.read = self._trips.begin(self._read(self._requests(bring)), "nvme->ram", bring.nbytes)
            self._reading.append(bring)
        except Exception as error:  # it comes out of the promise, and the thread goes on
            self._slots.give_back(bring.slot, after)
            bring.promise.keep((), error)

    def _requests(self, bring: _Bring) -> list[CellRead]:
        return [
            CellRead(run, first, count, self._slots.part(bring.slot, at, count * self._frame_nbytes))
            for run, first, count, at in bring.reads
        ]

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
        pairs = [
            (self._slots.part(bring.slot, at, nbytes), bring.target[to : to + nbytes])
            for at, to, nbytes in bring.copies
        ]
        return self._trips.begin(self._engine.copy(pairs, after=bring.after), "ram->hbm", bring.nbytes)
