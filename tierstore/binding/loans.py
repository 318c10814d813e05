"""Lends units' memory to operations on ghosts, and keeps what they write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition, get_ident
from typing import Protocol, cast

import torch
from torch import Tensor

from tierstore.binding.slot import Slot
from tierstore.binding.uninterrupted import Uninterrupted
from tierstore.contracts import Lease
from tierstore.errors import CapacityError, TierstoreError
from tierstore.prefetch import Prefetcher
from tierstore.tensors import Unit

_SLOTS_KEPT = 32
_PATIENCE_SECONDS = 10.0  # how long one thread waits for the memory that others use

LOOKED_UP_FROM = 1 << 20
"""Embedding tables from this size on, in bytes, are read row by row."""


class Rows(Protocol):
    """Reads single rows of a block, for embedding tables."""

    def can_read_rows(self, block: str) -> bool:
        """Whether the block rests where single rows can be read."""
        ...

    def read_rows(self, block: str, row_nbytes: int, rows: Sequence[int], into: Tensor) -> None:
        """Fill ``into`` (1-D uint8 on the compute device) with the rows, one after the other."""
        ...


@dataclass(eq=False)
class Stay:
    """A unit that is kept in memory between its uses, by the thread in ``threads``."""

    loans: Loans
    name: str
    threads: list[int]

    def end(self) -> None:
        """Idempotent: it may also have made room for something else."""
        self.loans.end_stay(self)


class Loans:
    """The home of every ghost of one session.

    ``keep(unit, block, data)`` stores changed bytes (1-D uint8, still in the slot) where the unit
    rests. ``step_aside()`` asks turns to give up memory that no operation is using; whether any did.
    """

    def __init__(
        self,
        prefetcher: Prefetcher,
        units: Mapping[str, Unit],
        offsets: Callable[[Unit], Mapping[str, int]],
        keep: Callable[[str, str, Tensor], None],
        rows: Rows,
    ) -> None:
        self.prefetcher = prefetcher
        self._units = units
        self._offsets = offsets
        self._keep = keep
        self._rows = rows
        self._unit_of = {block.name: unit.name for unit in units.values() for block in unit.blocks}
        self._nbytes = {block.name: block.nbytes for unit in units.values() for block in unit.blocks}
        self._slots: dict[str, dict[int, Slot]] = {}
        self._users: list[list[int]] = []
        self._waiting: set[int] = set()
        self._releases = 0
        self._changed = Condition()
        self._stays: list[Stay] = []
        self.step_aside: Callable[[], bool] = lambda: False

    def unit_of(self, block: str) -> str:
        """The unit that a block is fetched with."""
        return self._unit_of[block]

    def acquire(self, names: Sequence[str], threads: list[int]) -> list[Slot]:
        """Slots of units, in memory until ``release``. Where there is no room, waits for other threads' uses to end.

        ``threads`` are those that use the units, as long as they do: the list may change meanwhile."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with self._changed:
            self._users.append(threads)  # before the memory is theirs, so that who lacks it sees whom to wait for
        try:
            while True:
                seen = self._releases
                try:
                    leases = self.prefetcher.acquire(names)
                    break
                except CapacityError:
                    if not self._end_stays() and not self.step_aside() and not self._wait_for_others(seen, deadline):
                        raise
        except BaseException:
            self._end_use(threads)
            raise
        return [self._slot(name, lease) for name, lease in zip(names, leases, strict=True)]

    def release(self, names: Sequence[str], threads: list[int]) -> None:
        """End what ``acquire`` began; ``threads`` is the same list."""
        self.prefetcher.release(names)
        self._end_use(threads)

    def _end_use(self, threads: list[int]) -> None:
        with self._changed:
            self._users = [users for users in self._users if users is not threads]
            self._releases += 1
            self._changed.notify_all()

    def detain(self, name: str) -> None:
        """Keep a unit that is in use for those who still see it; nobody waits for its end, which is ``let_go``."""
        self.prefetcher.acquire([name])

    def let_go(self, name: str) -> None:
        """End a ``detain``."""
        self.prefetcher.release([name])

    def stay(self, name: str) -> Stay | None:
        """Keep a unit in memory between its uses, for as long as nothing else needs the room; None where that cannot
        be, for whatever reason: those who use it are told."""
        threads = [get_ident()]
        try:
            self.acquire([name], threads)
        except TierstoreError:
            return None
        stay = Stay(self, name, threads)
        self._stays.append(stay)
        return stay

    def end_stay(self, stay: Stay) -> bool:
        """End a ``stay``; whether it had not ended before."""
        with self._changed:
            if stay not in self._stays:
                return False
            self._stays.remove(stay)
        self.release([stay.name], stay.threads)
        return True

    def _end_stays(self) -> bool:
        return any([self.end_stay(stay) for stay in list(self._stays)])

    def _wait_for_others(self, seen: int, deadline: float) -> bool:
        """Wait for a release since ``seen``; False when no other thread uses anything, or all of them wait as well."""
        me = get_ident()
        with self._changed:
            self._waiting.add(me)
            self._changed.notify_all()
            try:
                while self._releases == seen:
                    others = {thread for users in self._users for thread in users} - self._waiting
                    if not others or time.monotonic() > deadline:
                        return False
                    self._changed.wait(_PATIENCE_SECONDS)
                return True
            finally:
                self._waiting.discard(me)

    @contextmanager
    def loan(self, blocks: Sequence[str], *, written: Sequence[str]) -> Iterator[Mapping[str, Slot]]:
        names = list(dict.fromkeys(self._unit_of[block] for block in blocks))
        threads = [get_ident()]
        slots: dict[str, Slot] = {}
        try:
            with Uninterrupted():
                slots = dict(zip(names, self.acquire(names, threads), strict=True))
            yield {block: slots[self._unit_of[block]] for block in blocks}
            with Uninterrupted():
                for block in written:
                    self.keep(block, slots[self._unit_of[block]])
        finally:
            if slots:
                with Uninterrupted():
                    self.release(names, threads)

    def keep(self, block: str, slot: Slot) -> None:
        """Store a block that was changed in its slot. When that fails the change is undone, and the error comes out."""
        unit = self._unit_of[block]
        try:
            self._keep(unit, block, slot.block_bytes(block, self._nbytes[block]))
        except BaseException:
            self._slots.pop(unit, None)
            self.prefetcher.spoil(unit)
            raise

    def has_rows(self, block: str) -> bool:
        """Whether single rows of the block are read, as a table's, where an operation needs no more."""
        return self._nbytes[block] >= LOOKED_UP_FROM and self._rows.can_read_rows(block)

    def lookup(self, block: str, meta: Tensor, indices: Tensor) -> tuple[Tensor, Tensor] | None:
        if meta.dim() != 2 or not meta.is_contiguous() or meta.storage_offset() or not indices.numel():
            return None
        if not self.has_rows(block):
            return None
        if self.prefetcher.holds(self._unit_of[block]):
            return None
        rows, inverse = torch.unique(indices, return_inverse=True)
        row_nbytes = meta.size(1) * meta.itemsize
        if rows.numel() * row_nbytes * 8 > self._nbytes[block] or rows[0] < 0 or rows[-1] >= meta.size(0):
            return None
        with Uninterrupted():
            table = self._read_rows(block, row_nbytes, rows.tolist())
        return None if table is None else (table.view(meta.dtype).view(rows.numel(), meta.size(1)), inverse)

    def _read_rows(self, block: str, row_nbytes: int, rows: Sequence[int]) -> Tensor | None:
        """The rows' bytes, one after the other, in memory of their own; None when the ring has no room for them."""
        nbytes = len(rows) * row_nbytes
        lease = self.prefetcher.borrow(nbytes)
        if lease is None:
            return None
        try:
            memory = cast(Tensor, lease.buffer)
            self._rows.read_rows(block, row_nbytes, rows, memory)
            return memory.clone()
        finally:
            self.prefetcher.give_back(lease, nbytes)

    def close(self) -> None:
        """Let go of every view of the pools."""
        self._slots.clear()

    def _slot(self, name: str, lease: Lease) -> Slot:
        known = self._slots.setdefault(name, {})
        slot = known.get(lease.extent.offset)
        if slot is None:
            if len(known) >= _SLOTS_KEPT:
                known.clear()
            with torch.inference_mode(False):
                slot = Slot(cast(Tensor, lease.buffer), self._offsets(self._units[name]))
            known[lease.extent.offset] = slot
        return slot
