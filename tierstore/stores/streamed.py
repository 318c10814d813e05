"""A new file written in order, past the page cache, with a checksum of each window of it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

from tierstore.contracts import Buffer
from tierstore.extents import align_up
from tierstore.stores.checksums import crc32c
from tierstore.stores.workers import PAGE, move_bytes

CHUNK = 4 << 20
"""Bytes per write: one at a time of this size keeps a disk as busy as several."""


class StreamedFile:
    """The new file ``path``. ``window_nbytes``, a divisor of 4 MiB, is what each of ``crcs`` is of.

    O_DIRECT where the filesystem takes it; else buffered, and the pages are dropped. Durable after ``sync``.
    Needs 4 MiB besides what it is given. Raises ``OSError``."""

    def __init__(self, path: Path, *, window_nbytes: int) -> None:
        self.crcs: list[int] = []
        self._window = window_nbytes
        self._chunk = mmap.mmap(-1, CHUNK)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._chunk))
        self._view = memoryview(self._chunk)
        self._fill = self._flushed = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = self._ask_direct(os.O_DIRECT)

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._flushed + self._fill

    def write(self, data: Buffer) -> None:
        """Append ``data``, which is in host memory."""
        source, left = data.data_ptr(), data.numel()
        while left:
            size = min(left, CHUNK - self._fill)
            move_bytes(self._address + self._fill, source, size)
            self._fill += size
            source += size
            left -= size
            if self._fill == CHUNK:
                self._flush()

    def pad(self) -> None:
        """Append zeros up to the next multiple of 4096."""
        end = align_up(self._fill, PAGE)
        self._view[self._fill : end] = bytes(end - self._fill)
        self._fill = end
        if self._fill == CHUNK:
            self._flush()

    def finish(self) -> None:
        """Write what is left, which must end on a multiple of 4096, and close."""
        self._flush()
        if not self._direct:
            os.fsync(self._fd)  # only clean pages can be dropped
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()

    def close(self) -> None:
        """Close the file as it is. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _flush(self) -> None:
        for at in range(0, self._fill, self._window):
            self.crcs.append(crc32c(self._address + at, min(self._window, self._fill - at)))
        done = 0
        while done < self._fill:
            try:
                done += os.pwrite(self._fd, self._view[done : self._fill], self._flushed + done)
            except OSError as error:
                if not (self._direct and error.errno == errno.EINVAL):
                    raise
                self._direct = self._ask_direct(0)  # it was granted, but is refused here
        self._flushed += self._fill
        self._fill = 0

    def _ask_direct(self, flag: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flag)
        except OSError:  # this filesystem has no O_DIRECT
            return False
        return bool(flag)
