"""A file that lines are appended to durably, many at a time, and that is whole again when it is opened after a kill."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tierstore.errors import StoreBusyError, StoreError, StoreFormatError, StoreFullError, StoreMismatchError
from tierstore.jobs.lines import Line, lines_of, read_object

_HEADS = (b'{"id": ', b'{"line": ')


class LineFile:
    """The JSON Lines file ``path``, made where it is missing, of one process at a time.

    ``take`` is given each whole line that is there, as an object and with its number. What a killed process or a power
    cut left behind the last whole line is cut off, if it looks like the begin of a line of ours. Raises ``StoreError``;
    ``StoreFormatError`` for lines that are damaged, ``StoreMismatchError`` for those that are not ours: then nothing of
    the file was changed."""

    def __init__(self, path: Path, take: Callable[[dict[str, Any], int], None]) -> None:
        self.path = path
        self.nbytes = 0
        """Bytes of durable lines."""
        self._waiting: list[bytes] = []
        with file_errors(f"opening {str(path)!r}"):
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            with file_errors(f"reading {str(path)!r}"):
                hold(self._fd, path)
                sync_folder(path)
                self.nbytes = nbytes = os.fstat(self._fd).st_size
                if (keep := self._read(nbytes, take)) < nbytes:
                    os.ftruncate(self._fd, keep)
                os.fsync(self._fd)  # what counts as done has to be durable: a kill may have come before that
                self.nbytes = keep
        except BaseException:
            self.close()
            raise

    @property
    def waiting(self) -> int:
        """Lines added that are not durable yet."""
        return len(self._waiting)

    def add(self, line: bytes) -> None:
        """A line, with its newline, for the next ``commit``."""
        self._waiting.append(line)

    def commit(self) -> int:
        """Write what was added, in one write, and wait until it is durable; how many lines that were.

        Raises ``StoreFullError`` or ``StoreError``: then the file is as it was, and ``commit`` may be tried again."""
        count, data = len(self._waiting), b"".join(self._waiting)
        if not count:
            return 0
        self._check_alone()
        try:
            with file_errors(f"writing to {str(self.path)!r}"):
                done = 0
                while done < len(data):
                    done += os.write(self._fd, memoryview(data)[done:])
                os.fsync(self._fd)
            # One statement: an interrupt between the two would write these lines again.
            self.nbytes, self._waiting = self.nbytes + len(data), self._waiting[count:]
        except BaseException:
            with suppress(OSError):  # else the next one who opens the file cuts it
                os.ftruncate(self._fd, self.nbytes)
            raise
        return count

    def close(self) -> None:
        """Idempotent. What was added and not committed is forgotten."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, nbytes: int, take: Callable[[dict[str, Any], int], None]) -> int:
        """Give whole lines to ``take``; up to which byte there are such."""
        for line in lines_of(self._fd, nbytes):
            if not line.whole:
                return self._torn(line)
            if line.raw is None or not line.raw.strip():
                if line.raw is None:
                    raise self._not_ours(line)
                continue
            try:
                table = read_object(line.raw)
            except ValueError as error:
                at_end = line.offset + len(line.raw) + 1 == nbytes
                if at_end or b"\0" in line.raw:  # a power cut leaves zeros, and only in what was written last
                    return self._torn(line)
                raise StoreFormatError(
                    f"line {line.number} of {str(self.path)!r} is damaged ({error}): delete that line, its row is done "
                    "again then, and run the job again"
                ) from None
            take(table, line.number)
        return nbytes

    def _torn(self, line: Line) -> int:
        raw = line.raw
        if raw is None or not (b"\0" in raw or any(raw.startswith(h) or h.startswith(raw) for h in _HEADS)):
            raise self._not_ours(line)
        return line.offset

    def _not_ours(self, line: Line) -> StoreMismatchError:
        return StoreMismatchError(
            f"line {line.number} of {str(self.path)!r} was not written by this job: nothing was touched: delete that "
            "line where the others are this job's, or give another file"
        )

    def _check_alone(self) -> None:
        with file_errors(f"writing to {str(self.path)!r}"):
            here, there = os.fstat(self._fd), os.stat(self.path)
        if not os.path.samestat(here, there) or here.st_size != self.nbytes:
            raise StoreError(
                f"{str(self.path)!r} was moved, replaced or written to by others while the job runs: put back what it "
                "held and run the job again"
            )


@contextmanager
def file_errors(what: str) -> Iterator[None]:
    """Turn an ``OSError`` into ``StoreFullError`` where the disk is full, else into ``StoreError``."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreFullError(f"{what}: {why}: free space there and run the job again, which goes on") from error
        raise StoreError(f"{what}: {why}: check the path, its rights and the disk") from error


def hold(fd: int, path: Path, *, holder: str = "another process") -> None:
    """Lock a file for this process. Raises ``StoreBusyError`` saying who ``holder`` is."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreBusyError(
            f"{str(path)!r} is in use by {holder}: wait until that job has ended, or give another file for the results"
        ) from None


def sync_folder(path: Path) -> None:
    """Make the name of a file durable. Raises ``OSError``."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
