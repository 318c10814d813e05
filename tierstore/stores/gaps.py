"""The free bytes of a file, in ints alone: whatever is free can be had, in one piece or in several."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from tierstore.extents import Extent


class Gaps:
    """What is free of ``[0, nbytes)``: gaps that never touch. The largest serve first, so that pieces are few."""

    def __init__(self, nbytes: int) -> None:
        self.free_nbytes = 0
        """Bytes of all gaps together."""
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._largest: list[tuple[int, int]] = []  # (-bytes, start) of every gap, and of some that are gone
        if nbytes:
            self.give_back(Extent(0, nbytes))

    def take(self, nbytes: int) -> tuple[Extent, ...] | None:
        """``nbytes`` in the fewest pieces, in order; None where less is free."""
        if nbytes > self.free_nbytes:
            return None
        pieces = []
        while nbytes:
            size, start = heappop(self._largest)
            if self._ends.get(start) != start - size:
                continue  # it is gone, or has become another one
            taken = min(-size, nbytes)
            self._remove(start, start - size)
            if taken < -size:
                self._add(start + taken, start - size)
            pieces.append(Extent(start, taken))
            nbytes -= taken
        return tuple(sorted(pieces))

    def give_back(self, extent: Extent) -> None:
        """``extent`` is free again, as part of the gap that it touches."""
        start, end = extent.offset, extent.end
        before, after = self._starts.get(start), self._ends.get(end)
        if before is not None:
            self._remove(before, start)
            start = before
        if after is not None:
            self._remove(end, after)
            end = after
        self._add(start, end)

    def _add(self, start: int, end: int) -> None:
        self.free_nbytes += end - start
        self._ends[start], self._starts[end] = end, start
        heappush(self._largest, (start - end, start))
        if len(self._largest) > 2 * len(self._ends) + 64:
            self._largest = [(start - end, start) for start, end in self._ends.items()]
            heapify(self._largest)

    def _remove(self, start: int, end: int) -> None:
        self.free_nbytes -= end - start
        del self._ends[start], self._starts[end]
