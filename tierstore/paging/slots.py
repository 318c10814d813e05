"""Equal slots of one buffer, taken and given back from several threads, each free once a fence is over."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Condition
from typing import cast

from tierstore.contracts import Buffer, Fence
from tierstore.fences import Over


class Slots:
    """``count`` slots of ``nbytes`` in ``buffer``. Fences given back with a slot may fail: they only end its use."""

    def __init__(self, buffer: Buffer, count: int, nbytes: int) -> None:
        self.buffer = buffer
        self.count = count
        self.nbytes = nbytes
        self._free: deque[tuple[int, Fence | None]] = deque((slot, None) for slot in range(count))
        self._returned = Condition()

    @property
    def free(self) -> int:
        """Slots that can be taken."""
        return len(self._free)

    def part(self, slot: int, at: int, nbytes: int) -> Buffer:
        """``nbytes`` of a slot, from byte ``at`` on."""
        start = slot * self.nbytes + at
        return cast(Buffer, self.buffer[start : start + nbytes])

    def take_idle(self) -> int | None:
        """A slot that can be written to at once, if there is one."""
        with self._returned:
            return self._idle()

    def take(self, *, block: bool = False) -> tuple[int, tuple[Fence, ...]] | None:
        """A slot, and what must be over before it is written to: one that is idle, else the first that will be.

        None where all are taken, unless ``block``: then somebody is to give one back."""
        with self._returned:
            while not self._free:
                if not block:
                    return None
                self._returned.wait()
            idle = self._idle()
            if idle is not None:
                return idle, ()
            slot, fence = self._free.popleft()
            return slot, () if fence is None else (fence,)

    def give_back(self, slot: int, fences: Sequence[Fence]) -> None:
        """End the use of a slot; it can be written to once ``fences`` are over, well or not. Work that failed may not
        have waited for what ``take`` named: name that again then."""
        with self._returned:
            self._free.append((slot, Over(tuple(fences)) if fences else None))
            self._returned.notify()

    def _idle(self) -> int | None:
        for _ in range(len(self._free)):
            slot, fence = self._free[0]
            if fence is None or fence.done():
                self._free.popleft()
                return slot
            self._free.rotate(-1)
        return None
