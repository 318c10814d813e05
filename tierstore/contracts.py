"""The protocols that the floors agree on. Read this file first.

Deciders return data; doers carry it out, each ending in a ``Fence``. A ``Buffer`` is, in practice,
a 1-D ``torch.uint8`` tensor; floors 0 and 1 need no torch, so only its shape is named here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tierstore.extents import Extent
from tierstore.tensors import Piece, TensorSpec, Unit


class Buffer(Protocol):
    """Bytes in memory of one tier: a 1-D uint8 tensor. Slices share memory."""

    def data_ptr(self) -> int: ...
    def numel(self) -> int: ...
    def __getitem__(self, index: slice, /) -> Any: ...


@runtime_checkable
class Fence(Protocol):
    """A point after which some work is complete. Errors of the work are raised by ``wait`` and ``gate``."""

    def done(self) -> bool:
        """Whether the work is complete (also when it failed). Never blocks."""
        ...

    def wait(self) -> None:
        """Block the host until the work is complete; raise what it raised. May be called often."""
        ...

    def gate(self) -> None:
        """Make compute issued from now on wait for the work; the host need not block."""
        ...


class Lease(Protocol):
    """The right to use an extent of a pool, until it is given back."""

    @property
    def extent(self) -> Extent: ...

    @property
    def buffer(self) -> Buffer:
        """Exactly ``extent.nbytes`` bytes of the pool's memory."""
        ...

    @property
    def after(self) -> Sequence[Fence]:
        """What must be complete before the first byte is written: earlier users of this memory."""
        ...

    def give_back(self, fence: Fence) -> None:
        """End the lease; the memory may be written again once ``fence`` is complete. Once only."""
        ...


class Pool(Protocol):
    """An arena over real memory of one tier. Nothing is allocated after construction."""

    @property
    def capacity(self) -> int:
        """Bytes the pool can lease at most."""
        ...

    def lease(self, nbytes: int, *, align: int = 64) -> Lease | None:
        """A lease of ``nbytes`` at an address aligned to ``align`` (a power of two up to 4096), or
        None when no gap is large enough. ``nbytes == 0`` is legal."""
        ...

    def close(self) -> None:
        """Release the memory. Idempotent. Leases still out become invalid."""
        ...


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Bytes ``extent`` of file number ``file``, to go to ``into``: exactly ``extent.nbytes`` of host memory."""

    file: int
    extent: Extent
    into: Buffer


class Store(Protocol):
    """Named bytes at rest. Readers cannot write."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor by name."""
        ...

    @property
    def tier(self) -> str:
        """``"nvme"`` or ``"ram"``: the near end of the link that reads cross."""
        ...

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Where the bytes of tensor ``name`` lie. Raises ``KeyError``."""
        ...

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        """Start reading; order among requests is the store's. Errors come out of the fence:
        ``StoreReadError``, ``ChecksumError``. The buffers must stay valid until the fence is done.
        Dropping the fence does not cancel the reads."""
        ...

    def close(self) -> None:
        """End every thread and file handle; reads still queued fail their fence. Idempotent."""
        ...


class WritableStore(Store, Protocol):
    """A store that takes back changed bytes."""

    def write(self, name: str, data: Buffer) -> None:
        """Replace the bytes of tensor ``name``, durably and all or nothing. ``data`` is in host memory.
        Raises ``StoreFullError``."""
        ...


class PageRun(Protocol):
    """Cells of KV pages that were put into a ``PageStore`` together, numbered from 0. Equal to itself only."""

    @property
    def cells(self) -> int:
        """How many cells were put."""
        ...

    @property
    def fence(self) -> Fence:
        """Complete when the cells are written and the buffer they came from is free again.
        Raises ``StoreFullError`` when the disk was full, else ``StoreError``: then none of the cells was put down."""
        ...


@dataclass(frozen=True, slots=True)
class CellRead:
    """Cells ``[first, first + count)`` of ``run``, to go to ``into``: exactly their bytes, in host memory."""

    run: PageRun
    first: int
    count: int
    into: Buffer


class PageStore(Protocol):
    """Cells of KV pages at rest, each of ``cell_nbytes`` that never change. One thread at a time calls it."""

    @property
    def cell_nbytes(self) -> int:
        """Bytes of each cell."""
        ...

    @property
    def capacity_nbytes(self) -> int:
        """Bytes the store takes at most, what runs are rounded up to included."""
        ...

    @property
    def written_nbytes(self) -> int:
        """Bytes of cells written so far, whatever became of them since."""
        ...

    def put(self, cells: int, data: Buffer, *, after: Sequence[Fence] = ()) -> PageRun:
        """Start writing ``cells`` cells, one behind the other in ``data`` (host memory), once ``after`` is complete.

        ``data`` must not change until the run's fence is done. Raises ``StoreFullError`` at once when
        ``capacity_nbytes`` leaves no room, and then nothing has changed. Every cell of the run is to be freed
        once, also when its fence raised."""
        ...

    def read(self, requests: Sequence[CellRead]) -> Fence:
        """Start reading cells of runs whose fence is done; ``StoreError`` at once for others and for freed cells.

        The fence raises ``PageLostError`` when cells are missing or changed: their bytes in ``into`` are then
        anything, all other cells have arrived. The buffers must stay valid until the fence is done."""
        ...

    def free(self, run: PageRun, cell: int) -> None:
        """Forget a cell, also while it is written or read. Its space is used anew when nothing under way uses it,
        but for what it shares a block with: such bytes come free with the last cell of the block."""
        ...

    def close(self) -> None:
        """Forget everything, end every thread, delete what is on disk. What is queued fails its fence. Idempotent."""
        ...


class CopyEngine(Protocol):
    """The only thing that moves bytes between host memory and the compute device."""

    @property
    def unified(self) -> bool:
        """Whether compute reads host memory in place, so that no copy is needed."""
        ...

    def copy(self, pairs: Sequence[tuple[Buffer, Buffer]], *, after: Sequence[Fence] = ()) -> Fence:
        """Start copying each ``(src, dst)`` of equal size, once every fence of ``after`` is complete.

        The host does not block. Neither side may be touched until the fence is done."""
        ...

    def mark(self) -> Fence:
        """A fence that is complete when all compute issued so far by this thread is."""
        ...

    def close(self) -> None:
        """Wait for everything issued, then release streams. Idempotent."""
        ...


class Feed(Protocol):
    """Brings a unit's bytes from where they rest into a lease on the compute device."""

    def slot_nbytes(self, unit: Unit) -> int:
        """Bytes a lease for ``unit`` must have, padding included."""
        ...

    def offsets(self, unit: Unit) -> Mapping[str, int]:
        """Byte offset of each block within a lease for ``unit``."""
        ...

    def bring(self, unit: Unit, lease: Lease) -> Fence:
        """Start filling ``lease``, after ``lease.after``. The fence is done when the unit may be used."""
        ...
