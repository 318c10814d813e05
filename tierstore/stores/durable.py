"""Files written so that they are whole after a crash, past the page cache, and checked by CRC32C."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tierstore.contracts import Buffer
from tierstore.errors import StoreError, StoreFullError
from tierstore.extents import align_up
from tierstore.stores.checksums import Crc, crc32c
from tierstore.stores.workers import PAGE, move_bytes, reason_of

CHUNK = 4 << 20
"""Bytes per write."""


@contextmanager
def store_errors(what: str, *, when_full: str = "free space there, or give another store=") -> Iterator[None]:
    """Turn an ``OSError`` into ``StoreFullError`` where the disk is full, else into ``StoreError``.

    ``when_full`` is the next step where it is."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFullError(f"{what}: {reason_of(error)}: {when_full}") from error
        raise StoreError(f"{what}: {reason_of(error)}: check the path, its rights and the disk") from error


def write_data(path: Path, data: Buffer) -> Crc:
    """Write ``data`` (host memory) to the new file ``path``; the CRC32C of its bytes.

    O_DIRECT where the filesystem takes it; else buffered, and the pages are dropped. Durable after ``sync``."""
    nbytes = data.numel()
    source = data.data_ptr()
    chunk = mmap.mmap(-1, min(CHUNK, align_up(max(nbytes, 1), PAGE)))
    address = ctypes.addressof(ctypes.c_char.from_buffer(chunk))
    view = memoryview(chunk)
    crc = 0
    fd, direct = _create(path)
    try:
        for at in range(0, nbytes, len(view)):
            size = min(len(view), nbytes - at)
            move_bytes(address, source + at, size)
            crc = crc32c(address, size, crc)
            if direct:
                try:
                    write_all(fd, view[: align_up(size, PAGE)], at)
                    continue
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
                os.close(fd)
                fd, direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC), False
            write_all(fd, view[:size], at)
        os.ftruncate(fd, nbytes)  # the last direct write was a whole page
        if not direct:
            os.fsync(fd)  # only clean pages can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return crc


def write_text(path: Path, text: str) -> None:
    """Write the new file ``path``. Durable after ``sync``."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, memoryview(text.encode()), 0)
    finally:
        os.close(fd)


def sync(paths: Iterable[Path]) -> None:
    """Make the bytes of each file and the entries of each folder durable."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _create(path: Path) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # some filesystems create before they refuse
    return os.open(path, flags, 0o666), False


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of ``view`` to ``offset`` of a descriptor. Raises ``OSError``."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
