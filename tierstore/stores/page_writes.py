"""The file without a name that KV pages go to, and how a run of cells is written to it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tierstore.contracts import Fence
from tierstore.errors import StoreError
from tierstore.extents import Extent, align_up
from tierstore.stores.checksums import crc32c
from tierstore.stores.durable import CHUNK, store_errors, write_all
from tierstore.stores.page_runs import Run
from tierstore.stores.workers import PAGE, ReadFence, move_bytes, reason_of, view_of


class NamelessFile:
    """A file in ``folder`` that has no name, so that nothing is left of it however its process ends.

    Raises ``OSError``. Its last job closes it, if nobody does before."""

    def __init__(self, folder: Path) -> None:
        self._direct = self._buffered = -1
        self.folder = folder
        self.written_nbytes = 0
        """Bytes of cells, of whole runs."""
        self._buffered = _open_nameless(folder)
        try:
            os.ftruncate(self._buffered, PAGE)  # a reader tries on these bytes how O_DIRECT is to be used
            self._direct = os.open(self.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:
                self.close()
                raise

    @property
    def path(self) -> str:
        """A path by which this process can open it again."""
        return f"/proc/self/fd/{self._buffered}"

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of ``view``, past the page cache where its offset, length and address allow. Raises ``OSError``."""
        if self._direct >= 0:
            try:
                return write_all(self._direct, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        write_all(self._buffered, view, offset)
        os.fdatasync(self._buffered)  # only clean pages can be dropped
        os.posix_fadvise(self._buffered, offset, len(view), os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Give the space back. Idempotent."""
        for fd in (self._direct, self._buffered):
            if fd >= 0:
                os.close(fd)
        self._direct = self._buffered = -1

    __del__ = close


def _open_nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    fd, name = tempfile.mkstemp(prefix=".tierstore-pages-", dir=folder)
    os.unlink(name)
    return fd


@dataclass(slots=True)
class WriteRun:
    """Write the cells of ``target`` from ``source`` (host address), once all of ``after`` and ``readers`` are complete.

    ``block`` is what O_DIRECT needs addresses and lengths to be multiples of; else a bounce buffer is used."""

    fence: ReadFence
    file: NamelessFile
    target: Run
    source: int
    cell_nbytes: int
    after: Sequence[Fence]
    readers: Sequence[ReadFence]
    block: int

    def run(self, scratch: memoryview, address: int) -> None:
        target = self.target
        nbytes = target.cells * self.cell_nbytes
        self._wait()
        crcs = cell_crcs(self.source, nbytes, self.cell_nbytes)
        with store_errors(f"cannot write {nbytes} bytes of KV pages below {str(self.file.folder)!r}"):
            source = self.source
            for extent in target.part(0, nbytes):
                self._write(source, extent, scratch, address)
                source += extent.nbytes
        self.file.written_nbytes += nbytes
        target.crcs = crcs

    def _write(self, source: int, extent: Extent, scratch: memoryview, address: int) -> None:
        block, nbytes, offset = self.block, extent.nbytes, extent.offset
        in_place = nbytes - nbytes % block if source % block == 0 else 0
        if in_place:
            self.file.write(view_of(source, in_place), offset)
        for at in range(in_place, nbytes, CHUNK):
            size = min(CHUNK, nbytes - at)
            move_bytes(address, source + at, size)
            self.file.write(scratch[: align_up(size, block)], offset + at)

    def _wait(self) -> None:
        for reader in self.readers:  # of cells that were here before
            reader.settle()
        try:
            for fence in self.after:
                fence.wait()
        except Exception as error:
            raise StoreError(f"the bytes of {self.target.cells} cells did not come: {reason_of(error)}") from error


def cell_crcs(address: int, nbytes: int, cell_nbytes: int) -> list[int]:
    """The CRC32C of each cell of ``nbytes`` of host memory."""
    return [crc32c(address + at, cell_nbytes) for at in range(0, nbytes, cell_nbytes)]
