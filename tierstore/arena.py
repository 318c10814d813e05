"""An integer allocator that owns no memory."""

from __future__ import annotations

from bisect import bisect_left

from tierstore.extents import Extent, align_up


class Arena:
    """First fit over ``[0, nbytes)``: gaps sorted by offset, merged with their neighbours when freed.

    Every extent begins on a multiple of ``granularity`` bytes and occupies whole multiples of it
    (the last one of the arena may be cut short by its end). An extent of zero bytes occupies
    nothing, always fits, and is freed like any other.
    """

    def __init__(self, nbytes: int, granularity: int = 64) -> None:
        if nbytes < 0:
            raise ValueError(f"an arena needs nbytes >= 0, got {nbytes}")
        _check_power_of_two("granularity", granularity)
        self.nbytes = nbytes
        self.granularity = granularity
        # Two parallel lists, so that bisect needs no key function.
        self._starts: list[int] = [0] if nbytes else []
        self._ends: list[int] = [nbytes] if nbytes else []
        self._occupied: dict[int, tuple[int, int]] = {}  # offset -> (nbytes asked for, end of what it occupies)
        self._empties = 0  # extents of zero bytes that are live; all of them are Extent(0, 0)

    @property
    def free_nbytes(self) -> int:
        """Bytes in all gaps together."""
        return sum(self._ends) - sum(self._starts)

    @property
    def largest_gap(self) -> int:
        """Bytes of the largest gap: the most that one ``alloc`` can get."""
        return max((end - start for start, end in zip(self._starts, self._ends, strict=True)), default=0)

    @property
    def live(self) -> int:
        """Extents handed out and not freed, empty ones included."""
        return len(self._occupied) + self._empties

    def alloc(self, nbytes: int, align: int = 64) -> Extent | None:
        """The first extent of ``nbytes`` at a multiple of ``align`` (a power of two), or None when no gap fits."""
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes: a size is never negative")
        _check_power_of_two("align", align)
        if nbytes == 0:
            self._empties += 1
            return Extent(0, 0)
        for index, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            offset = align_up(start, align)  # gaps begin on multiples of granularity, so this is one too
            if offset + nbytes <= end:
                taken_end = min(align_up(offset + nbytes, self.granularity), self.nbytes)
                self._carve(index, offset, taken_end)
                self._occupied[offset] = (nbytes, taken_end)
                return Extent(offset, nbytes)
        return None

    def free(self, extent: Extent) -> None:
        """Make ``extent`` free again. Raises ``ValueError`` when it is not one that is live here."""
        if extent == Extent(0, 0) and self._empties:
            self._empties -= 1
            return
        nbytes, end = self._occupied.get(extent.offset, (-1, -1))
        if nbytes != extent.nbytes:
            raise ValueError(f"{extent} is not live in this arena: freed twice, or another arena's")
        del self._occupied[extent.offset]
        self._merge(extent.offset, end)

    def _carve(self, index: int, offset: int, end: int) -> None:
        """Take ``[offset, end)`` out of gap ``index``, leaving what lies before and after it."""
        start, gap_end = self._starts[index], self._ends[index]
        left = [(start, offset)] if start < offset else []
        right = [(end, gap_end)] if end < gap_end else []
        self._starts[index : index + 1] = [gap[0] for gap in left + right]
        self._ends[index : index + 1] = [gap[1] for gap in left + right]

    def _merge(self, start: int, end: int) -> None:
        """Put the gap ``[start, end)`` in, merged with the gaps that touch it."""
        index = bisect_left(self._starts, start)
        first = last = index
        if index > 0 and self._ends[index - 1] == start:
            first, start = index - 1, self._starts[index - 1]
        if index < len(self._starts) and self._starts[index] == end:
            last, end = index + 1, self._ends[index]
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]


def _check_power_of_two(what: str, value: int) -> None:
    if value < 1 or value & (value - 1):
        raise ValueError(f"{what} must be a power of two, got {value}")
