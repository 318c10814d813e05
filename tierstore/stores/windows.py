"""Which windows of some files were found right, and the checks of those that were not looked at yet.

Only sums on what is read already: who reads is somebody else.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tierstore.contracts import ReadRequest
from tierstore.extents import Extent
from tierstore.stores.checksums import crc32c

Window = tuple[int, int]
"""Number of a file, and number of a window in it."""
Spans = Mapping[int, Sequence[tuple[int, int, int]]]
"""By file: bytes ``[start, end)`` and the host address where they stand; in order, no byte twice."""


class Windows:
    """Windows of ``window_nbytes`` of files of ``sizes``, with CRC32C ``crcs``. Only one thread calls ``check``."""

    def __init__(self, sizes: Sequence[int], crcs: Sequence[Sequence[int]], window_nbytes: int) -> None:
        self._sizes, self._crcs, self._nbytes = sizes, crcs, window_nbytes
        self._right = [bytearray(len(each)) for each in crcs]
        self._left = sum(len(each) for each in crcs)

    def extent(self, window: Window) -> Extent:
        """The bytes of ``window`` in its file."""
        start = window[1] * self._nbytes
        return Extent(start, min(self._nbytes, self._sizes[window[0]] - start))

    def unchecked(self, requests: Iterable[ReadRequest]) -> list[Window]:
        """Windows that ``requests`` touch and that are not known to be right, in order."""
        if not self._left:
            return []
        found: set[Window] = set()
        for request in requests:
            if request.extent.nbytes and 0 <= request.file < len(self._right):
                right = self._right[request.file]
                last = (request.extent.end - 1) // self._nbytes + 1
                at = right.find(0, request.extent.offset // self._nbytes, last)
                while at >= 0:
                    found.add((request.file, at))
                    at = right.find(0, at + 1, last)
        return sorted(found)

    def gaps(self, windows: Iterable[Window], spans: Spans) -> Iterator[tuple[int, Extent]]:
        """File and bytes of ``windows`` that are in none of ``spans``."""
        for window in windows:
            for start, end, address in self._walk(window, spans):
                if address is None:
                    yield window[0], Extent(start, end - start)

    def check(self, window: Window, spans: Spans) -> tuple[int, int] | None:
        """Look at a window that ``spans`` cover: None when it is right, else the CRC32C it has and should have."""
        file, number = window
        crc = 0
        for start, end, address in self._walk(window, spans):
            assert address is not None
            crc = crc32c(address, end - start, crc)
        if crc != self._crcs[file][number]:
            return crc, self._crcs[file][number]
        self._left -= 1 - self._right[file][number]
        self._right[file][number] = 1
        return None

    def _walk(self, window: Window, spans: Spans) -> Iterator[tuple[int, int, int | None]]:
        """The window from start to end: runs of bytes, each with its address or None."""
        extent, have = self.extent(window), spans.get(window[0], ())
        at = extent.offset
        for start, end, address in have[bisect_right(have, at, key=lambda span: span[1]) :]:
            if start >= extent.end:
                break
            if at < start:
                yield at, start, None
                at = start
            stop = min(end, extent.end)
            yield at, stop, address + at - start
            at = stop
        if at < extent.end:
            yield at, extent.end, None


def spans_of(requests: Iterable[ReadRequest]) -> Spans:
    """What ``requests`` bring into memory; of bytes that come twice, one place."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for request in sorted(requests, key=lambda request: (request.file, request.extent)):
        spans = found.setdefault(request.file, [])
        start = max(request.extent.offset, spans[-1][1] if spans else 0)
        if start < request.extent.end:
            spans.append((start, request.extent.end, request.into.data_ptr() + start - request.extent.offset))
    return found
