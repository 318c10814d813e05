"""Compute reads host memory: the store reads straight into the lease, nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping

from tierstore.contracts import Fence, Lease, ReadRequest, Store
from tierstore.errors import SessionClosedError
from tierstore.events import Recorder
from tierstore.fences import wait_for_end
from tierstore.slots import SLOT_ALIGN, SlotLayout, lay_out
from tierstore.tensors import Unit
from tierstore.trips import TripLog


class LaidAsInFile:
    """What feeds share whose slots hold a unit as it lies in its file, each layout worked out once."""

    def __init__(self) -> None:
        self._layouts: dict[str, tuple[Unit, SlotLayout]] = {}

    def slot_nbytes(self, unit: Unit) -> int:
        """Bytes a lease for ``unit`` must have, padding included."""
        return self._layout(unit).nbytes

    def offsets(self, unit: Unit) -> Mapping[str, int]:
        """Byte offset of each block within a lease for ``unit``."""
        return self._layout(unit).offsets

    def _layout(self, unit: Unit) -> SlotLayout:
        known = self._layouts.get(unit.name)
        if known is None or known[0] is not unit:
            known = self._layouts[unit.name] = (unit, lay_out(unit))
        return known[1]


class DirectFeed(LaidAsInFile):
    """Leases must be aligned to ``SLOT_ALIGN`` (4096) bytes. Records one ``Moved`` per unit, ``nvme->hbm`` or
    ``ram->hbm`` after the store's tier."""

    def __init__(self, store: Store, recorder: Recorder) -> None:
        super().__init__()
        self._store = store
        self._link = f"{store.tier}->hbm"
        self._trips = TripLog(recorder)
        self._closed = False

    def bring(self, unit: Unit, lease: Lease) -> Fence:
        """Start reading ``unit`` into ``lease``, once ``lease.after`` has been waited for."""
        if self._closed:
            raise SessionClosedError(f"unit {unit.name!r} was asked of a closed feed: open a new session")
        layout = self._layout(unit)
        requests = requests_for(unit, layout, lease)
        wait_for_end(lease.after)
        return self._trips.begin(self._store.read(requests), self._link, unit.nbytes)

    def close(self) -> None:
        """Wait for reads under way, so that no lease is written to any more. Idempotent."""
        self._closed = True
        self._trips.drain()


def requests_for(unit: Unit, layout: SlotLayout, lease: Lease) -> list[ReadRequest]:
    """The reads of ``layout`` into ``lease``. Raises ``ValueError`` for a lease that is too small or misaligned."""
    buffer = lease.buffer
    if buffer.numel() < layout.nbytes or (layout.nbytes and buffer.data_ptr() % SLOT_ALIGN):
        raise ValueError(
            f"unit {unit.name!r} needs a lease of {layout.nbytes} bytes aligned to {SLOT_ALIGN}, got "
            f"{buffer.numel()} bytes at address {buffer.data_ptr():#x}: ask for slot_nbytes(unit), align={SLOT_ALIGN}"
        )
    return [
        ReadRequest(read.file, read.extent, buffer[read.at : read.at + read.extent.nbytes]) for read in layout.reads
    ]
