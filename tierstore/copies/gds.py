"""Reads from disk straight into device memory, with kvikio over GPUDirect Storage."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any, cast

import torch

from tierstore.contracts import Buffer, ReadRequest
from tierstore.errors import DeviceError, StoreError, StoreReadError
from tierstore.extents import Extent

PAGE = 4096
"""Bytes: what lies between multiples of this in the file and on the device goes without a bounce buffer."""


class GdsFence:
    """Complete when every byte of one ``read`` is in device memory, for any stream to see. ``started`` and
    ``finished`` are ``time.perf_counter`` readings in seconds (0.0 until then)."""

    __slots__ = ("_error", "_over", "finished", "pending", "started")

    def __init__(self, pending: list[_Pending]) -> None:
        self.pending = pending
        self.started = perf_counter()
        self.finished = 0.0
        self._error: StoreError | None = None
        self._over = Event()

    def end(self, error: StoreError | None) -> None:
        """Called once, when no read writes to the device any more."""
        self.pending = []
        self._error = error
        self.finished = perf_counter()
        self._over.set()

    def done(self) -> bool:
        """Whether all of it is over."""
        return self._over.is_set()

    def wait(self) -> None:
        """Block until it is; raise ``StoreReadError`` unless every byte arrived."""
        self._over.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)

    gate = wait  # what was read before a kernel is launched is there for it


class _Pending:
    """One read under way. kvikio's future gives its result once; whether it is ready cannot be asked reliably."""

    __slots__ = ("buffer", "future", "offset", "path")

    def __init__(self, future: Any, path: Path, offset: int, buffer: Buffer) -> None:
        self.future = future
        self.path = path
        self.offset = offset
        self.buffer = buffer  # stays allocated while it is written to

    def collect(self) -> StoreError | None:
        """Block until it is over; what went wrong."""
        wanted, got, reason = self.buffer.numel(), 0, "it came up short"
        try:
            got = int(self.future.get())
        except Exception as error:  # kvikio's errors are of several kinds, and whoever waits must hear of each
            reason = str(error)
        if got == wanted:
            return None
        return StoreReadError(
            f"reading {os.fspath(self.path)!r} at byte {self.offset} into device memory: wanted {wanted} bytes, got "
            f"{got}: {reason}: check the disk and the kernel log, then fetch the file again"
        )


class GdsReads:
    """Reads extents of ``paths``, numbered in the order given, into CUDA memory.

    Raises ``DeviceError`` where kvikio is not installed or finds no driver, and ``StoreError`` when a file cannot be
    opened. Correct, but no faster than a bounce through RAM, where ``machine.gds_state`` is not "real".
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self._paths = [Path(path) for path in paths]
        kvikio = _kvikio()
        self._files: list[Any] = []
        try:
            for path in self._paths:
                self._files.append(kvikio.CuFile(path, "r"))
        except (OSError, RuntimeError) as error:
            for file in self._files:
                file.close()
            raise StoreError(
                f"cannot open {os.fspath(path)!r} for GPUDirect Storage: {error}: check the path"
            ) from error
        self._register: Any = kvikio.buffer.memory_register
        self._deregister: Any = kvikio.buffer.memory_deregister
        self._registered: dict[int, torch.Tensor] = {}
        self._lock = Lock()
        self._closed = False
        self._under_way: SimpleQueue[GdsFence | None] = SimpleQueue()
        self._collector = Thread(target=self._collect, name="tierstore-gds-collect", daemon=True)
        self._collector.start()

    def read(self, requests: Sequence[ReadRequest]) -> GdsFence:
        """Start filling each request's buffer, here 1-D uint8 in CUDA memory that nothing else touches until the
        fence is done. ``StoreReadError`` comes out of the fence. Raises ``StoreError`` when closed."""
        with self._lock:
            if self._closed:
                raise StoreError("the files are closed: open them again")
            pending: list[_Pending] = []
            fence = GdsFence(pending)
            try:
                for request in requests:
                    self._prepare(cast(torch.Tensor, request.into))
                    for offset, buffer in _split(request.extent, request.into):
                        future = self._files[request.file].pread(buffer, buffer.numel(), offset)
                        pending.append(_Pending(future, self._paths[request.file], offset, buffer))
            except Exception as error:
                for read in pending:  # these still write
                    read.collect()
                raise StoreReadError(f"GPUDirect Storage refused a read: {error}: check cufile.log") from error
            self._under_way.put(fence)
        return fence

    def close(self) -> None:
        """Wait for what is under way, then close the files. Idempotent."""
        with self._lock:
            closed, self._closed = self._closed, True
        if closed:
            return
        self._under_way.put(None)
        self._collector.join()
        for file in self._files:
            file.close()
        for memory in self._registered.values():
            with suppress(Exception):  # it was not registered
                self._deregister(memory)
        self._registered.clear()

    def _prepare(self, buffer: torch.Tensor) -> None:
        """Register the memory that ``buffer`` is part of, once: the disk then writes to it directly."""
        base = buffer.untyped_storage().data_ptr()
        if base not in self._registered:
            with suppress(Exception):  # more than the bus can map: cuFile then goes through a buffer of its own
                self._register(buffer)
            self._registered[base] = buffer

    def _collect(self) -> None:
        while (fence := self._under_way.get()) is not None:
            errors = [read.collect() for read in fence.pending]
            fence.end(next((error for error in errors if error is not None), None))
            del fence, errors  # an idle thread keeps no memory alive


def _split(extent: Extent, buffer: Buffer) -> Iterator[tuple[int, Buffer]]:
    """``(file offset, buffer)``: where file and memory agree modulo a page, whole pages apart from the ragged ends."""
    cuts = [0, extent.nbytes]
    if (buffer.data_ptr() - extent.offset) % PAGE == 0:
        first, last = -extent.offset % PAGE, extent.nbytes - extent.end % PAGE
        if first < last:
            cuts = sorted({0, first, last, extent.nbytes})
    for start, end in pairwise(cuts):
        if start < end:
            yield extent.offset + start, buffer[start:end]


def _kvikio() -> Any:
    try:
        import kvikio
        import kvikio.buffer
    except ImportError as error:
        raise DeviceError("GPUDirect Storage needs kvikio: pip install 'tierstore[gds]'") from error
    return kvikio
