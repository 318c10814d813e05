"""Runs a plan ahead of compute: brings units in before they are used, and lets them go after."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from threading import RLock

from tierstore.budget import format_nbytes
from tierstore.contracts import Feed, Fence, Lease, Pool
from tierstore.errors import CapacityError, SessionClosedError, TierstoreError
from tierstore.events import Missed, Recorder, Stalled
from tierstore.fences import Over
from tierstore.ledger import Ledger
from tierstore.order import Order
from tierstore.tensors import Unit

_SLOT_ALIGN = 4096  # what feeds ask of a lease


class _Held:
    """A unit that has a lease: bytes on their way, or there."""

    __slots__ = ("arrived", "fence", "lease", "marks", "spoiled", "users")

    def __init__(self, lease: Lease, fence: Fence) -> None:
        self.lease = lease
        self.fence = fence
        self.arrived = False
        self.users = 0
        self.spoiled = False
        self.marks: list[Fence] = []  # where uses ended that are not known to be over, one a thread at least

    def mark(self, fence: Fence) -> None:
        """Note that a use ends with ``fence``."""
        self.marks = [mark for mark in self.marks if not mark.done()]
        self.marks.append(fence)


class Prefetcher:
    """Holds the resident units and a ring of streamed ones within a hard bound of weight bytes.

    ``order`` says which units come next. When there is no room, the unit whose next use is farthest
    gives way (Belady's rule, exact for a known order); units in use never do. ``mark`` gives a fence
    for the compute issued so far, after which a slot may be written again.
    """

    def __init__(
        self,
        units: Mapping[str, Unit],
        order: Sequence[str],
        residents: Collection[str],
        *,
        feed: Feed,
        pools: Mapping[str, Pool],
        ledgers: Mapping[str, Ledger],
        ring: Pool,
        ledger: Ledger,
        mark: Callable[[], Fence],
        recorder: Recorder,
    ) -> None:
        self._units = units
        self._order = Order(order)
        self._residents = frozenset(residents)
        self._feed = feed
        self._pools = pools
        self._ledgers = ledgers
        self._ring = ring
        self._ledger = ledger
        self._mark = mark
        self._record = recorder
        self._held: dict[str, _Held] = {}
        self._lock = RLock()
        self._closed = False

    @property
    def progress(self) -> tuple[int, int]:
        """Units passed in the pass under way, and units in a pass."""
        return self._order.cursor, len(self._order.sequence)

    def start(self) -> None:
        """Begin to bring in what comes first."""
        with self._lock:
            self._advance()

    def acquire(self, names: Sequence[str]) -> list[Lease]:
        """Leases of units, all together in memory and ready to compute with, until ``release(names)``.

        Raises ``CapacityError`` when they do not fit together beside what is in use, and whatever
        the transfer raised; then nothing stays acquired.
        """
        with self._lock:
            if self._closed:
                raise SessionClosedError("the session is closed: its weights are no longer brought in")
            for name in names:
                self._visit(name)
            held = self._hold(names)
        try:
            for name, unit in zip(names, held, strict=True):
                if not unit.arrived:
                    self._arrive(name, unit)
                elif not unit.fence.done():
                    unit.fence.gate()  # arrived for another stream's compute, perhaps not for this one's
        except BaseException:
            with self._lock:
                self._unhold(names)
                for name, unit in zip(names, held, strict=True):
                    if not unit.arrived and not unit.users and self._held.get(name) is unit:
                        self._drop(name)
            raise
        return [unit.lease for unit in held]

    def release(self, names: Iterable[str]) -> None:
        """End the use of units by the compute issued so far; bring in what comes next."""
        with self._lock:
            if self._closed:
                return
            self._unhold(names)
            self._advance()

    def borrow(self, nbytes: int) -> Lease | None:
        """A lease of ``nbytes`` weight bytes in the ring for a short use, or None when there is no room;
        its earlier users are through. End it with ``give_back`` here, not on the lease."""
        with self._lock:
            lease = None if self._closed else self._make_room(self._ring, self._ledger, nbytes, nbytes, 0)
        if lease is not None:
            for fence in lease.after:
                fence.wait()
        return lease

    def give_back(self, lease: Lease, nbytes: int) -> None:
        """End a ``borrow``."""
        with self._lock:
            if not self._closed:
                lease.give_back(self._mark())
                self._ledger.give(nbytes)

    def resident(self, name: str) -> Lease:
        """The lease of a resident unit, which it keeps; brought in now if need be. Says nothing about the order."""
        with self._lock:
            (held,) = self._hold([name])
        try:
            held.fence.wait()  # for the compute of every stream, from now on
            held.arrived = True
        finally:
            with self._lock:
                self._unhold([name])
        return held.lease

    def spoil(self, name: str) -> None:
        """The bytes of a streamed unit in memory are not the true ones: its next use brings them anew."""
        with self._lock:
            held = self._held.get(name)
            if held is not None and name not in self._residents:
                held.spoiled = True
                if not held.users:
                    self._drop(name)

    def holds(self, name: str) -> bool:
        """Whether the unit is in memory or on its way."""
        return name in self._held

    def settle(self) -> None:
        """The residents are in and will not be asked for again: leave them out of the order."""
        with self._lock:
            self._order = Order([name for name in self._order.sequence if name not in self._residents])
            self._advance()

    def end_pass(self) -> None:
        """One pass over the model is over; the order is learnt from it if it differed."""
        with self._lock:
            self._order.end_pass()
            if not self._closed:
                self._advance()

    def drop_pass(self) -> None:
        """The pass broke off: nothing is learnt from it."""
        with self._lock:
            self._order.drop_pass()
            if not self._closed:
                self._advance()

    def close(self) -> None:
        """Wait for what is on its way and give every lease back. Idempotent."""
        with self._lock:
            self._closed = True
            for name in list(self._held):
                Over([self._held[name].fence]).wait()
                self._drop(name)

    def _visit(self, name: str) -> None:
        expected = self._order.visit(name)
        if not expected and name not in self._residents:
            self._record(Missed(name))

    def _hold(self, names: Sequence[str]) -> list[_Held]:
        """Use every unit of ``names``; all or none. A second try packs them into an emptied ring."""
        for last_try in (False, True):
            taken: list[_Held] = []
            try:
                for name in names:
                    held = self._usable(name) or self._bring(name, must=True)
                    if held is None:
                        break
                    held.users += 1
                    taken.append(held)
                else:
                    return taken
            except BaseException:
                for held in taken:
                    held.users -= 1
                raise
            for held in taken:
                held.users -= 1
            if last_try:
                raise self._too_much(names)
            for name in [n for n, h in self._held.items() if not h.users and n not in self._residents]:
                self._drop(name)
        raise AssertionError("unreachable")

    def _usable(self, name: str) -> _Held | None:
        """The unit if it is here or on its way; one whose early transfer failed is dropped, to be tried again."""
        held = self._held.get(name)
        if held is not None and not held.arrived and not held.users and held.fence.done():
            try:
                held.fence.wait()
            except TierstoreError:
                self._drop(name)
                return None
        return held

    def _unhold(self, names: Iterable[str]) -> None:
        mark: Fence | None = None
        for name in names:
            held = self._held[name]
            held.users -= 1
            if name not in self._residents:
                mark = mark or self._mark()
                held.mark(mark)
                if held.spoiled and not held.users:
                    self._drop(name)

    def _arrive(self, name: str, held: _Held) -> None:
        start = time.perf_counter()
        held.fence.gate()
        held.arrived = True
        self._record(Stalled(name, time.perf_counter() - start))

    def _advance(self) -> None:
        """Bring units in, in order, until one does not fit."""
        for name in self._order.upcoming():
            if name not in self._held and self._bring(name, must=False) is None:
                return

    def _bring(self, name: str, *, must: bool) -> _Held | None:
        unit = self._units[name]
        pool = self._pools.get(name, self._ring)
        ledger = self._ledgers.get(name, self._ledger)
        distance = -1 if must else self._order.distance(name)
        lease = self._make_room(pool, ledger, self._feed.slot_nbytes(unit), unit.nbytes, distance)
        if lease is None:
            return None
        try:
            held = self._held[name] = _Held(lease, self._feed.bring(unit, lease))
        except BaseException:
            lease.give_back(self._mark())
            ledger.give(unit.nbytes)
            raise
        return held

    def _make_room(self, pool: Pool, ledger: Ledger, slot_nbytes: int, nbytes: int, distance: int) -> Lease | None:
        """A lease, taken from units used later than ``distance`` steps ahead if need be."""
        while True:
            if ledger.take(nbytes):
                lease = pool.lease(slot_nbytes, align=_SLOT_ALIGN)
                if lease is not None:
                    return lease
                ledger.give(nbytes)
            victim = self._farthest(distance) if pool is self._ring else None
            if victim is None:
                return None
            self._drop(victim)

    def _farthest(self, distance: int) -> str | None:
        """The unused ring unit whose next use is farthest, if farther than ``distance``."""
        farthest: str | None = None
        for name, held in self._held.items():
            if not held.users and name not in self._residents:
                ahead = self._order.distance(name)
                if ahead > distance:
                    farthest, distance = name, ahead
        return farthest

    def _drop(self, name: str) -> None:
        held = self._held.pop(name)
        # not yet gated by compute: the transfer itself is the last user of the memory
        held.lease.give_back(Over(held.marks if held.arrived and held.marks else [held.fence]))
        self._ledgers.get(name, self._ledger).give(self._units[name].nbytes)

    def _too_much(self, names: Sequence[str]) -> CapacityError:
        need = sum(self._units[name].nbytes for name in names)
        busy = {n: self._units[n].nbytes for n, h in self._held.items() if h.users and n not in self._residents}
        beside = f" beside {', '.join(busy)} ({format_nbytes(sum(busy.values()))}) in use" if busy else ""
        short = need + sum(busy.values()) - self._ledger.limit
        return CapacityError(
            f"{', '.join(names)} need {format_nbytes(need)} at once{beside}, the streaming part of hbm has "
            f"{format_nbytes(self._ledger.limit)}: raise Budget.hbm by at least {format_nbytes(max(short, 1))}"
        )
