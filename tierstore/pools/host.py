"""Host memory of exact size, registered with a GPU driver in segments as far as that pins."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Protocol

import torch

from tierstore.budget import format_nbytes
from tierstore.errors import BudgetError, CapacityError
from tierstore.extents import Extent, align_up
from tierstore.pools.region import RegionPool

HUGE_PAGE_NBYTES = 2 << 20


class Registrar(Protocol):
    """Tells a GPU driver which host memory stays in place, so that copies from it need no bounce buffer."""

    @property
    def segment_nbytes(self) -> int:
        """Registered ranges begin and end at multiples of this address (a power of two, pages or more)."""
        ...

    def register(self, address: int, nbytes: int) -> bool:
        """Pin ``nbytes`` at ``address``; False when the driver refuses."""
        ...

    def unregister(self, address: int) -> None:
        """Unpin what ``register(address, ...)`` pinned."""
        ...


class HostPool(RegionPool):
    """``nbytes`` of anonymous memory, rounded up to pages; a page costs nothing until it is first written.

    With ``huge_pages`` a disk fills it in larger requests, for which its first use may take longer: for memory that
    is filled again and again, not for what is filled once (docs/performance.md).
    With ``registrar`` a segment is pinned when a buffer in it is first used: pinning takes longer than reading what
    goes there, and would delay the first token if it came first. Where the driver refuses, that segment and those not
    pinned by then stay pageable, and ``notes`` says so. Raises ``CapacityError`` when the system refuses the range.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        registrar: Registrar | None = None,
        huge_pages: bool = False,
        name: str = "the host pool",
    ) -> None:
        if nbytes < 0:
            raise BudgetError(f"{name} was asked to hold {nbytes} bytes: give 0 or more")
        self.notes: list[str] = []
        region = _anonymous(nbytes, name, pinned=registrar is not None, huge_pages=huge_pages)
        super().__init__(region, name=name)
        self._registrar = registrar
        self._segment = registrar.segment_nbytes if registrar is not None else 0
        self._address = region.data_ptr()
        self._tried: set[int] = set()  # segment numbers: address // segment_nbytes
        self._pinned: set[int] = set()

    def is_pinned(self, extent: Extent) -> bool:
        """Whether the driver pinned every byte of ``extent``."""
        return self._registrar is not None and self._pinned.issuperset(self._segments(extent))

    @property
    def pinned_nbytes(self) -> int:
        """Bytes that are pinned now."""
        return sum(end - start for start, end in map(self._bounds, self._pinned))

    def close(self) -> None:
        """Unpin, then release the memory: at once, or with the last lease or view of it. Idempotent."""
        super().close()
        with self._lock:
            pinned, self._pinned, registrar, self._registrar = self._pinned, set(), self._registrar, None
        if registrar is not None:
            for number in pinned:
                registrar.unregister(self._bounds(number)[0])

    def _prepare(self, extent: Extent) -> None:
        segments = self._segments(extent)
        if self._tried.issuperset(segments):
            return
        with self._lock:
            for number in segments:
                if number not in self._tried and self._registrar is not None:
                    self._pin(number, self._registrar)

    def _pin(self, number: int, registrar: Registrar) -> None:
        start, end = self._bounds(number)
        self._tried.add(number)
        if registrar.register(start, end - start):
            self._pinned.add(number)
            return
        # What refused once would refuse, slowly, for every segment to come.
        self._tried.update(self._segments(Extent(0, self.capacity)))
        self.notes.append(
            f"{self.name}: the driver pinned {format_nbytes(self.pinned_nbytes)} of {format_nbytes(self.capacity)}; "
            "the rest is pageable and copies from it are slower"
        )

    def _segments(self, extent: Extent) -> range:
        """The numbers of the segments that hold ``extent``; none without a registrar."""
        if not self._segment or not extent.nbytes:
            return range(0)
        first = self._address + extent.offset
        return range(first // self._segment, (first + extent.nbytes - 1) // self._segment + 1)

    def _bounds(self, number: int) -> tuple[int, int]:
        """The first address of a segment and the first one after it: whole pages, none but this pool's."""
        end = self._address + align_up(self.capacity, mmap.PAGESIZE)
        return max(number * self._segment, self._address), min((number + 1) * self._segment, end)


def _anonymous(nbytes: int, name: str, *, pinned: bool, huge_pages: bool) -> torch.Tensor:
    """Private zeroed memory, uint8 of shape ``(nbytes,)``, unmapped with its last view."""
    with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
        return _mapped(nbytes, name, pinned, huge_pages) if nbytes else torch.empty(0, dtype=torch.uint8)


def _mapped(nbytes: int, name: str, pinned: bool, huge_pages: bool) -> torch.Tensor:
    align = HUGE_PAGE_NBYTES if huge_pages and nbytes >= HUGE_PAGE_NBYTES else mmap.PAGESIZE
    try:
        # room to begin at a multiple of `align`; what is never touched takes no memory
        memory = mmap.mmap(
            -1, align_up(nbytes, mmap.PAGESIZE) + align - mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"{name} needs {format_nbytes(nbytes)} of RAM, the system refuses: {error}: lower Budget.ram or Budget.hbm"
        ) from error
    if pinned and hasattr(mmap, "MADV_DONTFORK"):
        with suppress(OSError):  # a fork would make pinned pages copy on write, away from where the device sees them
            memory.madvise(mmap.MADV_DONTFORK)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    region = torch.frombuffer(memory, dtype=torch.uint8)
    start = -region.data_ptr() % align
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=start)
