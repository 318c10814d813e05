"""What calls that wait hold goes to host memory, and is back on the device when their turn comes.

Memory changes hands in place: the bytes of a storage are copied, its device memory is given back, and later it gets
other memory with the same bytes. So whoever holds its tensors need not know, as long as nobody looks in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, UntypedStorage

from tierstore.contracts import Fence
from tierstore.extents import align_up
from tierstore.waiting_plan import ALIGN, LEAVING, WaitingPlan, moves

if TYPE_CHECKING:
    from tierstore.backends import Backend

PIECE_ALIGN = 64
"""Storages begin at multiples of this in their place."""

LEAST_PART = 64
"""Storages of less than one part in so many of a place stay where they are: a copy each takes longer than its bytes."""


class Waits(Protocol):
    """What is done about the storages that calls hold while they wait. Calls are numbers from 0."""

    least_nbytes: int
    """Smaller storages are left alone."""

    def begin(self, calls: int) -> Sequence[bool]:
        """So many calls are going to take turns; what each of them holds is of interest where it says so."""
        ...

    def leave(self, call: int, storages: Sequence[UntypedStorage]) -> None:
        """A call waits from now on, and holds ``storages``, which are nobody else's."""
        ...

    def come(self, call: int) -> None:
        """It is this call's turn soon."""
        ...

    def back(self, call: int) -> None:
        """It is this call's turn: what compute is issued from now on finds its storages as they were."""
        ...

    def end(self) -> None:
        """No call waits any more. To be called again after an error."""
        ...


class Counted:
    """Nothing moves: ``most_nbytes`` is what a call held at most, ``all_nbytes`` what it held at all its waits."""

    least_nbytes = 1

    def __init__(self) -> None:
        self.most_nbytes = self.all_nbytes = 0

    def begin(self, calls: int) -> Sequence[bool]:
        return (True,) + (False,) * (calls - 1)

    def leave(self, call: int, storages: Sequence[UntypedStorage]) -> None:
        nbytes = sum(align_up(each.nbytes(), PIECE_ALIGN) for each in storages)
        self.most_nbytes = max(self.most_nbytes, nbytes)
        self.all_nbytes += nbytes

    def come(self, call: int) -> None:
        pass

    def back(self, call: int) -> None:
        pass

    def end(self) -> None:
        pass


@dataclass(eq=False)
class _Away:
    """Bytes of storages, each as a tensor over it and one over its place, that are on their way or there with
    ``there``. ``freed``: their device memory was given back. ``here`` is complete when they are back."""

    pairs: list[tuple[Tensor, Tensor]]
    there: Fence
    freed: bool = False
    here: Fence | None = None

    @property
    def nbytes(self) -> int:
        return sum(place.numel() for _, place in self.pairs)


class Aside:
    """Host memory of ``backend`` for those calls that ``plan`` moves, taken now and given back by ``close``.

    What does not fit in a call's place stays on the device. One thread at a time uses it. Raises ``CapacityError``
    where the system refuses the memory.
    """

    def __init__(self, backend: Backend, plan: WaitingPlan) -> None:
        self.plan, self.least_nbytes = plan, max(plan.place_nbytes // LEAST_PART, 1)
        self.moved_nbytes = 0
        """Bytes that went to the host so far, and those that came back."""
        self.host_nbytes = self.peak_host_nbytes = 0
        """Bytes that wait on the host, now and at most."""
        self._engine = backend.engine
        self._closing = ExitStack()
        pool = backend.host_pool(plan.host_nbytes)
        self._closing.callback(pool.close)
        self._places: list[Tensor] = []
        for _ in range(plan.moving):
            lease = pool.lease(plan.place_nbytes, align=ALIGN)
            assert lease is not None, "the pool has room for all places"
            self._places.append(cast(Tensor, lease.buffer))
        self._place_of: dict[int, int] = {}
        self._away: dict[int, _Away] = {}
        self._leaving: deque[_Away] = deque()

    def begin(self, calls: int) -> Sequence[bool]:
        moving = moves(calls, self.plan.on_device)
        numbers = [call for call, goes in enumerate(moving) if goes][: len(self._places)]
        self._place_of = {call: place for place, call in enumerate(numbers)}
        return [call in self._place_of for call in range(calls)]

    def leave(self, call: int, storages: Sequence[UntypedStorage]) -> None:
        pairs = _placed(storages, self._places[self._place_of[call]])
        if not pairs:
            return
        # compute has made what is copied, and has waited for what was in the place before
        there = self._engine.copy(pairs, after=[self._engine.mark()])
        self._away[call] = _Away(pairs, there)
        self._moved(self._away[call].nbytes, +1)
        self._leaving.append(self._away[call])
        self._free()

    def come(self, call: int) -> None:
        away = self._away.get(call)
        if away is None or away.here is not None:
            return
        if not away.freed:  # it is still there; but what compute writes must not be what is copied
            self._leaving.remove(away)
            away.here = away.there
            return
        for raw, place in away.pairs:
            raw.untyped_storage().resize_(place.numel())
        # the memory may have had another use, whose compute was issued before
        back = [(place, raw) for raw, place in away.pairs]
        away.here = self._engine.copy(back, after=[self._engine.mark()])
        self._moved(away.nbytes, 0)

    def back(self, call: int) -> None:
        self.come(call)
        away = self._away.pop(call, None)
        if away is not None and away.here is not None:
            self.host_nbytes -= away.nbytes
            away.here.gate()

    def end(self) -> None:
        for away in self._away.values():
            if away.here is not None:
                away.here.wait()
        self._away.clear()
        self.host_nbytes = 0
        while self._leaving:
            self._leaving[0].there.wait()
            self._leaving.popleft()

    def close(self) -> None:
        """Wait for what is under way, and give the memory back. Idempotent."""
        with self._closing:
            try:
                self.end()
                self._engine.mark().wait()  # and so for what came back last
            finally:
                self._places.clear()

    def _moved(self, nbytes: int, stays: int) -> None:
        self.moved_nbytes += nbytes
        self.host_nbytes += stays * nbytes
        self.peak_host_nbytes = max(self.peak_host_nbytes, self.host_nbytes)

    def _free(self) -> None:
        """Give back device memory whose bytes have left; wait until those of ``LEAVING`` calls are on their way."""
        while self._leaving and (len(self._leaving) > LEAVING or self._leaving[0].there.done()):
            away = self._leaving[0]
            away.there.wait()  # before this, the copy still reads what would be given to somebody else
            away.freed = True
            for raw, _ in away.pairs:
                raw.untyped_storage().resize_(0)
            self._leaving.popleft()


def _placed(storages: Sequence[UntypedStorage], place: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The bytes of each storage as a tensor, and those of ``place`` that are for it; without those that do not fit."""
    pairs, at = [], 0
    with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
        for storage in storages:
            end = at + storage.nbytes()
            if end <= place.numel():
                raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                pairs.append((raw, place[at:end]))
                at = align_up(end, PIECE_ALIGN)
    return pairs
