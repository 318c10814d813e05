"""Disk to staging memory to device: two hops, each under way while compute works on something else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Condition, Thread

import torch

from tierstore.budget import format_nbytes
from tierstore.contracts import Buffer, CopyEngine, Fence, Lease, Pool, Store
from tierstore.errors import CapacityError, SessionClosedError
from tierstore.events import Recorder
from tierstore.extents import align_up
from tierstore.feeds.direct import requests_for
from tierstore.feeds.kept import KeptUnit
from tierstore.feeds.parts import MIN_ROOM, SECTOR, Part, cut, whole
from tierstore.fences import Promise, nothing, wait_for_end
from tierstore.ledger import Ledger
from tierstore.slots import SLOT_ALIGN, PackedLayout, pack
from tierstore.tensors import Unit
from tierstore.trips import TripLog


@dataclass(slots=True)
class _Bring:
    """A unit on its way. Its copies and its error are the uploading thread's, until the promise is kept."""

    unit: Unit
    parts: tuple[Part, ...]
    lease: Lease
    promise: Promise = field(default_factory=Promise)
    copies: list[Fence] = field(default_factory=list)
    error: BaseException | None = None


@dataclass(slots=True)
class _Hop:
    """A part that is being read into ``staging`` (a kept unit's own memory when ``kept``), or why there is none."""

    bring: _Bring
    last: bool
    part: Part | None = None
    staging: Lease | None = None
    read: Fence | None = None
    kept: KeptUnit | None = None
    error: BaseException | None = None


class StagedFeed:
    """Device slots are packed at 256 bytes. ``stores`` gives each unit's store by the unit's name.

    One thread reads in the order of ``bring`` as far as ``staging`` has room, another issues each copy as soon
    as its bytes are there; staging memory is used again once its copy is complete. A unit larger than half of
    it goes through in parts. Units of ``keep`` take their share of ``staging`` now, stay there after their
    first read, and need no store from then on. Nobody else leases from ``staging``.

    Records ``Moved("nvme->ram")`` (or ``"ram->ram"``, after the store's tier) and ``Moved("ram->hbm")``. Raises
    ``CapacityError`` when ``keep`` does not fit, or for a unit that would stream through too little.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        staging: Pool,
        engine: CopyEngine,
        recorder: Recorder,
        *,
        keep: Collection[Unit] = (),
    ) -> None:
        self._stores = stores
        self._staging = staging
        self._engine = engine
        self._record = recorder
        self._trips = TripLog(recorder)
        self._ledger = Ledger(staging.capacity, "ram")
        self._known: dict[str, tuple[Unit, PackedLayout, tuple[Part, ...]]] = {}
        self._kept: dict[str, KeptUnit] = {}
        self._keep_all(keep)
        self._room = staging.capacity // SECTOR * SECTOR - sum(
            align_up(kept.part.layout.nbytes, SLOT_ALIGN) for kept in self._kept.values()
        )
        self._closed = False
        self._returned = Condition()  # guards `_out` and leasing from the ring
        self._out = 0  # ring leases that will be given back
        self._to_read: SimpleQueue[_Bring | None] = SimpleQueue()
        self._to_upload: SimpleQueue[_Hop | None] = SimpleQueue()
        self._threads = [
            Thread(target=self._read_all, name="tierstore-staged-read", daemon=True),
            Thread(target=self._upload_all, name="tierstore-staged-upload", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def slot_nbytes(self, unit: Unit) -> int:
        """Bytes a lease for ``unit`` must have, padding included."""
        return self._layout(unit)[1].nbytes

    def offsets(self, unit: Unit) -> Mapping[str, int]:
        """Byte offset of each block within a lease for ``unit``."""
        return self._layout(unit)[1].offsets

    @property
    def peak_staging_nbytes(self) -> int:
        """The most weight bytes that were ever in staging memory at once."""
        return self._ledger.peak

    def bring(self, unit: Unit, lease: Lease) -> Fence:
        """Start both hops; never blocks on a link."""
        if self._closed:
            raise SessionClosedError(f"unit {unit.name!r} was asked of a closed feed: open a new session")
        _, packed, parts = self._layout(unit)
        if lease.extent.nbytes < packed.nbytes:
            raise ValueError(
                f"unit {unit.name!r} needs a lease of {packed.nbytes} bytes, got {lease.extent.nbytes}: "
                "ask for slot_nbytes(unit)"
            )
        kept = self._kept.get(unit.name)
        if kept is not None:
            with kept.lock:
                if not kept.queued and kept.ready():  # no link to wait for, so no thread to pass through
                    return self._upload_kept(kept, lease)
                kept.queued += 1
        bring = _Bring(unit, parts, lease)
        self._to_read.put(bring)
        return bring.promise

    def kept(self, unit: Unit, block: str) -> torch.Tensor:
        """The bytes of a block of a unit of ``keep`` where they are, uint8; they are read first if need be."""
        return self._kept_unit(unit).view(block, self._trips)

    def write(self, unit: Unit, block: str, data: Buffer) -> None:
        """Replace a block of a unit of ``keep``: uploads from now on bring the new bytes."""
        self._kept_unit(unit).write(block, data, self._trips)

    def close(self) -> None:
        """End the threads: what was not issued fails, what was is waited for. Idempotent."""
        if self._closed:
            return
        with self._returned:
            self._closed = True
            self._returned.notify_all()
        self._to_read.put(None)
        for thread in self._threads:
            thread.join()
        self._trips.drain()
        self._let_go()

    def _kept_unit(self, unit: Unit) -> KeptUnit:
        if self._closed:
            raise SessionClosedError(f"unit {unit.name!r} was kept in RAM until the session closed: use it before")
        return self._kept[unit.name]

    def _let_go(self) -> None:
        while self._kept:
            self._kept.popitem()[1].lease.give_back(nothing())

    def _keep_all(self, units: Collection[Unit]) -> None:
        for unit in units:
            part = whole(unit, pack(unit))
            lease = self._staging.lease(part.layout.nbytes, align=SLOT_ALIGN)
            if lease is None:
                self._let_go()
                need = sum(align_up(whole(each, pack(each)).layout.nbytes, SLOT_ALIGN) for each in units)
                raise CapacityError(
                    f"{len(units)} units kept in RAM need {format_nbytes(need)} with padding, staging memory has "
                    f"{format_nbytes(self._staging.capacity)}: keep fewer units or raise Budget.ram"
                )
            self._kept[unit.name] = KeptUnit(unit, part, lease, self._stores[unit.name])
            self._ledger.take(unit.nbytes)

    def _layout(self, unit: Unit) -> tuple[Unit, PackedLayout, tuple[Part, ...]]:
        known = self._known.get(unit.name)
        if known is None or known[0] is not unit:
            packed, kept = pack(unit), self._kept.get(unit.name)
            known = self._known[unit.name] = (unit, packed, (kept.part,) if kept else self._cut(unit, packed))
        return known

    def _cut(self, unit: Unit, packed: PackedLayout) -> tuple[Part, ...]:
        # Half, so that one part is read while the one before it is uploaded.
        room = self._room // 2 // SECTOR * SECTOR
        if room < MIN_ROOM and unit.nbytes:
            raise CapacityError(
                f"unit {unit.name!r} streams through RAM, and {format_nbytes(self._room)} of staging memory are left "
                f"beside the units that stay there: {format_nbytes(2 * MIN_ROOM)} are the least, raise Budget.ram"
            )
        return cut(unit, packed, max(room, MIN_ROOM))

    def _upload_kept(self, kept: KeptUnit, lease: Lease) -> Fence:
        """With ``kept.lock`` held."""
        copied = self._copy(kept.part, kept.lease, lease)
        kept.uploads = [upload for upload in kept.uploads if not upload.done()] + [copied]
        return self._trips.begin(copied, "ram->hbm", kept.part.nbytes)

    def _copy(self, part: Part, staging: Lease, lease: Lease) -> Fence:
        src, dst = staging.buffer, lease.buffer
        pairs = [(src[at : at + nbytes], dst[to : to + nbytes]) for at, to, nbytes in part.copies]
        return self._engine.copy(pairs, after=lease.after)

    def _read_all(self) -> None:
        while (bring := self._to_read.get()) is not None:
            for part in bring.parts:
                hop = _Hop(bring, last=part is bring.parts[-1], part=part, kept=self._kept.get(bring.unit.name))
                try:
                    self._start_read(hop, part)
                except Exception as error:  # it comes out of the promise, and the thread goes on
                    hop.error, hop.last = error, True
                self._to_upload.put(hop)
                if hop.last:
                    break
            del bring  # an idle thread keeps no lease alive
        self._to_upload.put(None)

    def _start_read(self, hop: _Hop, part: Part) -> None:
        if self._closed or hop.bring.error is not None:
            raise hop.bring.error or SessionClosedError(
                f"the session was closed before unit {hop.bring.unit.name!r} was read: open a new one"
            )
        if hop.kept is not None:
            hop.staging, hop.read = hop.kept.lease, hop.kept.read(self._trips)
            return
        hop.staging = self._lease_ring(hop.bring.unit, part)
        wait_for_end(hop.staging.after)
        store = self._stores[hop.bring.unit.name]
        read = store.read(requests_for(hop.bring.unit, part.layout, hop.staging))
        hop.read = self._trips.begin(read, f"{store.tier}->ram", part.nbytes)

    def _lease_ring(self, unit: Unit, part: Part) -> Lease:
        """Room for a part; waits for its turn. Everything out comes back, and then a part fits by construction."""
        with self._returned:
            while (lease := self._staging.lease(part.layout.nbytes, align=SLOT_ALIGN)) is None:
                if self._closed:
                    raise SessionClosedError(f"the session was closed before unit {unit.name!r} was read")
                if not self._out:
                    raise CapacityError(
                        f"unit {unit.name!r} needs {format_nbytes(part.layout.nbytes)} of staging memory, and nothing "
                        "that is out will come back: lease from it by this feed only"
                    )
                self._returned.wait()
            self._out += 1
        self._ledger.take(part.nbytes)
        return lease

    def _upload_all(self) -> None:
        while (hop := self._to_upload.get()) is not None:
            bring, copied = hop.bring, None
            try:
                if hop.read is not None:
                    hop.read.wait()
                bring.error = bring.error or hop.error
                if bring.error is None:
                    copied = self._issue(hop)
            except Exception as error:  # it comes out of the promise, and the thread goes on
                bring.error = bring.error or error
            if hop.kept is not None:
                with hop.kept.lock:
                    hop.kept.queued -= 1
            elif hop.staging is not None:
                self._return(hop, hop.staging, copied or nothing())
            if hop.last:
                bring.promise.keep(bring.copies, bring.error)
            del hop, bring, copied  # an idle thread keeps no lease alive

    def _issue(self, hop: _Hop) -> Fence | None:
        """The copy of a part that was read; None for a kept unit, whose memory is not given back."""
        if hop.kept is not None:
            with hop.kept.lock:
                hop.bring.copies.append(self._upload_kept(hop.kept, hop.bring.lease))
            return None
        if hop.part is None or hop.staging is None:
            raise AssertionError("a part that was not read says why")
        copied = self._copy(hop.part, hop.staging, hop.bring.lease)
        hop.bring.copies.append(self._trips.begin(copied, "ram->hbm", hop.part.nbytes))
        return copied

    def _return(self, hop: _Hop, staging: Lease, end: Fence) -> None:
        staging.give_back(end)
        self._ledger.give(hop.part.nbytes if hop.part is not None else 0)
        with self._returned:
            self._out -= 1
            self._returned.notify()
