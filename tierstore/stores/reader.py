"""Exact scatter reads of file extents into host memory, past the page cache where the filesystem allows.

Where file offset and memory address agree modulo the sector size, the aligned interior is read straight
into place on an ``O_DIRECT`` descriptor; ragged ends and what does not agree pass through a bounce buffer.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tierstore.contracts import ReadRequest
from tierstore.errors import StoreError, StoreReadError
from tierstore.extents import align_up
from tierstore.stores.workers import (
    PAGE,
    SMALL,
    Job,
    ReadFence,
    Workers,
    buffer_address,
    move_bytes,
    reason_of,
    view_of,
)

FileRun = tuple[int, int, int, int]
"""A file's number, the offset of some bytes in it, how many they are, and the host address that they go to."""

KEPT_OPEN = 128
"""Files up to which all stay open; a store with more opens them at each read, as processes may open few."""


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> int:
    """A read-only descriptor of a regular file. Never hangs: FIFOs, devices and folders raise ``StoreError``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and flags & os.O_DIRECT and error.errno == errno.EINVAL:
            raise
        raise StoreError(
            f"cannot open {os.fspath(path)!r}: {reason_of(error)}: check the path and its rights"
        ) from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
        raise StoreError(f"{os.fspath(path)!r} is a {kind}, a regular file is needed: give the file itself")
    return fd


class _File:
    """One file. ``block`` is what O_DIRECT needs offsets, lengths and addresses to be multiples of.

    The descriptors stay open with ``keep``; else each read opens them anew, and fails if the path leads elsewhere."""

    def __init__(self, path: str | os.PathLike[str], *, direct: bool, keep: bool) -> None:
        self._direct = self._buffered = -1
        self.path = os.fspath(path)
        self.keep = keep
        self.block = 1
        self._buffered = open_regular(path)
        status = os.fstat(self._buffered)
        self.size, self._identity = status.st_size, (status.st_dev, status.st_ino)
        if direct:
            try:
                self._direct = self._open(os.O_DIRECT)
                self.block = _block_size(self._direct, self.size)
            except StoreError:
                self.close()
                raise
            except OSError:  # this filesystem has no O_DIRECT
                pass
        self.use_direct = self.block > 1
        if not keep:
            self.close()

    def fill(self, view: memoryview, offset: int, wanted: int) -> None:
        """Read at least ``wanted`` bytes at ``offset`` into ``view``, which may have room for more."""
        got, size = 0, self.size
        try:
            if self.use_direct:
                got = self._fill_direct(view, offset)
            if got < wanted:
                with self._descriptor(0) as fd:
                    got = _fill_buffered(fd, view, offset, got, wanted)
                    size = os.fstat(fd).st_size
        except StoreError:
            raise
        except (OSError, OverflowError) as error:
            raise StoreReadError(
                f"reading {self.path!r} at byte {offset}: wanted {wanted} bytes, got {got}: {reason_of(error)}: "
                "check the disk and the kernel log, then fetch the file again"
            ) from error
        if got < wanted:
            raise StoreReadError(
                f"reading {self.path!r} at byte {offset}: wanted {wanted} bytes, got {got}: the file had {self.size} "
                f"bytes when opened and has {size} now: fetch it again and open it anew"
            )

    def _fill_direct(self, view: memoryview, offset: int) -> int:
        try:
            with self._descriptor(os.O_DIRECT) as fd:
                return os.preadv(fd, (view,), offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self.use_direct = False  # opened, but refuses: read buffered from now on
        self.block = 1
        return 0

    @contextmanager
    def _descriptor(self, flags: int) -> Iterator[int]:
        kept = self._direct if flags else self._buffered
        if kept >= 0:
            yield kept
            return
        fd = self._open(flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, flags: int) -> int:
        fd = open_regular(self.path, flags)
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) != self._identity:
            os.close(fd)
            raise StoreReadError(f"{self.path!r} was replaced by another file since it was opened: open it anew")
        return fd

    def close(self) -> None:
        for fd in (self._direct, self._buffered):
            if fd >= 0:
                os.close(fd)
        self._direct = self._buffered = -1

    __del__ = close  # a replaced file closes when its last job ends


def _fill_buffered(fd: int, view: memoryview, offset: int, got: int, wanted: int) -> int:
    first = got
    while got < wanted and (more := os.preadv(fd, (view[got:wanted],), offset + got)):
        got += more
    if got > first:  # the page cache would compete with the budget
        start = (offset + first) // PAGE * PAGE
        os.posix_fadvise(fd, start, align_up(offset + got, PAGE) - start, os.POSIX_FADV_DONTNEED)
    return got


def _block_size(fd: int, size: int) -> int:
    """What alignment an O_DIRECT descriptor takes, by trial: 512 or 4096; 1 where it refuses to read."""
    page = memoryview(mmap.mmap(-1, 2 * PAGE))
    for block in (512, PAGE):
        if size < 2 * block:
            continue  # at the end of the file a wrong alignment may pass unseen
        try:
            os.preadv(fd, (page[block : 2 * block],), block)
            return block
        except OSError as error:
            if error.errno != errno.EINVAL:
                return PAGE
    return PAGE if size < 2 * PAGE else 1


@dataclass(slots=True)
class _InPlace:
    """A chunk whose offset, length and address suit O_DIRECT."""

    fence: ReadFence
    file: _File
    offset: int
    view: memoryview

    def run(self, scratch: memoryview, address: int) -> None:
        self.file.fill(self.view, self.offset, len(self.view))


@dataclass(slots=True)
class _Bounce:
    """Neighbouring bytes ``[offset, end)`` read at once, then each of ``parts`` (address, offset, nbytes) moved."""

    fence: ReadFence
    file: _File
    offset: int
    end: int
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def run(self, scratch: memoryview, address: int) -> None:
        block = self.file.block
        start = self.offset - self.offset % block
        self.file.fill(scratch[: align_up(self.end, block) - start], start, self.end - start)
        for dst, offset, nbytes in self.parts:
            move_bytes(dst, address + offset - start, nbytes)


class Reader:
    """Reads extents of ``paths``, numbered in the order given, with ``threads`` threads.

    ``chunk_nbytes`` (a multiple of 4096) is the most one system call reads. ``direct=False`` reads
    buffered and drops the pages again. Raises ``StoreError`` when a file cannot be opened.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        threads: int = 4,
        chunk_nbytes: int = 4 << 20,
        direct: bool = True,
    ) -> None:
        if chunk_nbytes < PAGE or chunk_nbytes % PAGE:
            raise StoreError(f"chunk_nbytes is {chunk_nbytes}: a positive multiple of {PAGE} is needed, as {4 << 20}")
        self._chunk = chunk_nbytes
        self._direct = direct
        self._closed = False
        self._files: list[_File] = []
        try:
            paths = tuple(paths)
            for path in paths:
                self._files.append(_File(path, direct=direct, keep=len(paths) <= KEPT_OPEN))
            self._workers = Workers(threads, chunk_nbytes + 2 * PAGE)
        except BaseException:
            for file in self._files:
                file.close()
            raise

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each file when it was opened."""
        return tuple(file.size for file in self._files)

    @property
    def direct(self) -> tuple[bool, ...]:
        """Whether each file is read past the page cache."""
        return tuple(file.use_direct for file in self._files)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Modulo what an offset in each file and an address must agree to be read in place; 1 when read buffered."""
        return tuple(file.block if file.use_direct else 1 for file in self._files)

    def read(self, requests: Sequence[ReadRequest]) -> ReadFence:
        """Start filling each request's buffer. ``StoreReadError`` comes out of the fence, never a part as a whole.

        Raises ``StoreError`` at once when closed, or for a request that names no file or a buffer of another size.
        """
        runs = [(r.file, r.extent.offset, r.extent.nbytes, self._address(r)) for r in requests if r.extent.nbytes]
        return self.read_runs(runs, requests)

    def read_runs(self, runs: Iterable[FileRun], keep: Sequence[object]) -> ReadFence:
        """``read`` for runs that are known to be right, into host memory that ``keep`` keeps allocated."""
        runs = sorted(runs)
        fence = ReadFence(sum(run[2] for run in runs), keep)
        self._workers.submit(fence, self._jobs(fence, _joined(runs)))
        return fence

    def reopen(self, file: int) -> None:
        """Read file number ``file`` anew by its path from now on; reads under way finish on what was open
        (with more than ``KEPT_OPEN`` files they may fail instead: wait for them first)."""
        if self._closed:
            raise StoreError("the store is closed: open it again")
        old = self._files[file]
        self._files[file] = _File(old.path, direct=self._direct, keep=old.keep)

    def close(self) -> None:
        """End the threads and close the files; queued reads fail their fence. Idempotent."""
        self._closed = True
        self._workers.close()
        for file in self._files:
            file.close()

    def _address(self, request: ReadRequest) -> int:
        if not 0 <= request.file < len(self._files):
            raise StoreError(f"file number {request.file} was asked for, the store has {len(self._files)}")
        return buffer_address(request.into, request.extent.nbytes)

    def _jobs(self, fence: ReadFence, runs: Iterable[FileRun]) -> list[Job]:
        jobs: list[Job] = []
        bounce: _Bounce | None = None  # the last one, that neighbours may join

        def add(file: _File, offset: int, end: int, address: int) -> None:
            nonlocal bounce
            while offset < end:
                stop = min(end, (offset // self._chunk + 1) * self._chunk)
                if (
                    bounce is None
                    or bounce.file is not file
                    or not bounce.offset <= offset < bounce.end + PAGE
                    or stop - bounce.offset > self._chunk
                ):
                    bounce = _Bounce(fence, file, offset, stop)
                    jobs.append(bounce)
                bounce.end = max(bounce.end, stop)
                bounce.parts.append((address, offset, stop - offset))
                address += stop - offset
                offset = stop

        for number, offset, nbytes, address in runs:
            file = self._files[number]
            end, block = offset + nbytes, file.block
            start, stop = align_up(offset, block), end - end % block
            if (address - offset) % block or stop - start < SMALL:
                add(file, offset, end, address)
                continue
            add(file, offset, start, address)
            view = view_of(address + start - offset, stop - start)
            for at in range(0, stop - start, self._chunk):
                jobs.append(_InPlace(fence, file, start + at, view[at : at + self._chunk]))
            add(file, stop, end, address + stop - offset)
        return jobs


def _joined(runs: Sequence[FileRun]) -> Iterable[FileRun]:
    """Sorted runs, with those that adjoin in file and in memory made one."""
    if not runs:
        return
    file, offset, nbytes, address = runs[0]
    for following in runs[1:]:
        if following[0] == file and following[1] == offset + nbytes and following[3] == address + nbytes:
            nbytes += following[2]
        else:
            yield file, offset, nbytes, address
            file, offset, nbytes, address = following
    yield file, offset, nbytes, address
