"""Stores around a store: slower, failing, counting. For tests, simulations and accounts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

from tierstore.contracts import Fence, ReadRequest, Store
from tierstore.errors import StoreError, StoreReadError
from tierstore.stores.workers import ReadFence, Workers
from tierstore.tensors import Piece, TensorSpec

Clock = Callable[[], float]
"""Seconds since some moment."""


class _Wrapped:
    """Passes everything on to ``inner``, which it owns: ``close`` closes both."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self.inner.specs

    @property
    def tier(self) -> str:
        return self.inner.tier

    def pieces(self, name: str) -> tuple[Piece, ...]:
        return self.inner.pieces(name)

    def close(self) -> None:
        self.inner.close()


class SlowStore(_Wrapped):
    """A store behind a link of ``bytes_per_second``: reads share it in the order they were asked for.

    A read is done no earlier than the link lets it; the caller of ``read`` never waits. ``clock`` gives seconds;
    ``wait(event, seconds)`` returns early (True) when the store closes. Both may be virtual.
    """

    def __init__(
        self,
        inner: Store,
        bytes_per_second: float,
        *,
        clock: Clock = perf_counter,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        super().__init__(inner)
        if not bytes_per_second > 0:
            raise StoreError(f"bytes_per_second is {bytes_per_second}: a link needs a speed above 0")
        self._rate, self._clock, self._wait = bytes_per_second, clock, wait
        self._free_at = clock()
        self._order = threading.Lock()
        self._closing = threading.Event()
        self._link = Workers(1)

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        """Start reading; the fence is done once the link has carried the bytes."""
        with self._order:
            inner = self.inner.read(requests)
            fence = ReadFence(sum(request.extent.nbytes for request in requests), requests)
            self._free_at = max(self._free_at, self._clock()) + fence.nbytes / self._rate
            self._link.submit(fence, [_Late(fence, inner, self, self._free_at)])
        return fence

    def hold(self, until: float) -> None:
        """Block this thread until the clock says ``until``, or the store closes (then ``StoreReadError``)."""
        while (seconds := until - self._clock()) > 0:
            if self._wait(self._closing, seconds):
                raise StoreReadError("the store was closed while its link carried the bytes: read before closing")

    def close(self) -> None:
        """Close the inner store; reads that the link still carries fail. Idempotent."""
        self._closing.set()
        self.inner.close()
        self._link.close()


class _Late:
    def __init__(self, fence: ReadFence, inner: Fence, store: SlowStore, until: float) -> None:
        self.fence, self._inner, self._store, self._until = fence, inner, store, until

    def run(self, scratch: memoryview, address: int) -> None:
        self._inner.wait()
        self._store.hold(self._until)


class FailingStore(_Wrapped):
    """Fails each read in which ``fail_on`` says so of a request; the other bytes are read, the fence fails."""

    def __init__(self, inner: Store, fail_on: Callable[[ReadRequest], bool]) -> None:
        super().__init__(inner)
        self._fail_on = fail_on

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        """Start reading; the fence raises ``StoreReadError`` when a request was to fail."""
        failed = next((request for request in requests if self._fail_on(request)), None)
        fence = self.inner.read(requests)
        return fence if failed is None else _Failed(fence, failed)


class _Failed:
    def __init__(self, inner: Fence, request: ReadRequest) -> None:
        self._inner = inner
        self._file, self._extent = request.file, request.extent
        self.done = inner.done

    def wait(self) -> None:
        self._inner.wait()
        raise StoreReadError(
            f"reading file number {self._file} at byte {self._extent.offset}: wanted {self._extent.nbytes}, got 0: "
            "this store was told to fail here: change fail_on"
        )

    gate = wait


class CountingStore(_Wrapped):
    """Counts what is asked for: ``reads`` (calls), ``requests``, ``nbytes``, and bytes ``by_file`` and ``by_name``.

    A byte counts for each tensor whose pieces hold it. Counting is exact from any number of threads.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.reads = self.requests = self.nbytes = 0
        self.by_file: Counter[int] = Counter()
        self.by_name: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._held: dict[int, list[tuple[int, int, str]]] = {}
        for name in inner.specs:
            for piece in inner.pieces(name):
                self._held.setdefault(piece.file, []).append((piece.extent.offset, piece.extent.end, name))

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        """Start reading, and count it once the inner store has taken it."""
        fence = self.inner.read(requests)
        with self._counting:
            self.reads += 1
            for request in requests:
                start, end = request.extent.offset, request.extent.end
                self.requests += 1
                self.nbytes += request.extent.nbytes
                self.by_file[request.file] += request.extent.nbytes
                for first, last, name in self._held.get(request.file, ()):
                    if first < end and start < last:
                        self.by_name[name] += min(end, last) - max(start, first)
        return fence
