"""A file of prompts: read once to know its rows, then as often as needed, a row at a time."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tierstore.errors import StoreError, StoreMismatchError, StoreReadError
from tierstore.jobs.ids import Id, IdLines
from tierstore.jobs.lines import Line, lines_of
from tierstore.jobs.rows import BadRow, Row, parse_row
from tierstore.sampling import Sampling

# How files begin that hold others in fewer bytes, and no line of JSON.
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"PK\3\4": "zip"}


class PromptFile:
    """The rows of the JSON Lines file ``path``, with the settings ``defaults`` where they have none of their own.

    It is read through once at the start, for its SHA-256 and for which ids and how many samples its rows have: about
    50 bytes of memory a row. Of rows with the same id the first counts. Raises ``StoreError`` where it cannot be read
    again and again. ``StoreMismatchError`` later on where it changed meanwhile."""

    def __init__(self, path: str | os.PathLike[str], defaults: Sampling) -> None:
        self.path = Path(path)
        self.defaults = defaults
        self._ids = IdLines()
        self._samples = bytearray(1)
        self.rows_total = 0
        """Rows that can be answered."""
        self.bad_total = 0
        """Rows that cannot."""
        self.samples_total = 0
        """Sequences that all rows together ask for."""
        self._fd = _open(self.path)
        try:
            status = os.fstat(self._fd)
            self.nbytes = status.st_size
            self._as_found = (status.st_size, status.st_mtime_ns)
            self._check_plain()
            self.sha256 = ""
            self.sha256 = self._scan()
        except BaseException:
            self.close()
            raise

    @property
    def lines(self) -> int:
        """Number of the last line."""
        return len(self._samples) - 1

    def samples_of(self, line: int) -> int:
        """Sequences that the row in ``line`` asks for; 0 where no row can be answered there."""
        return self._samples[line] if 0 < line < len(self._samples) else 0

    def line_of(self, id: Id) -> int | None:
        """The line of the row with this id."""
        return self._ids.find(id)

    def rows(self, skip: Callable[[int], bool] = lambda line: False) -> Iterator[Row | BadRow]:
        """Rows in the order of their lines; those whose line is to ``skip`` are not parsed."""
        digest = hashlib.sha256()
        for line in self._lines(digest.update):
            if skip(line.number) or (row := parse_row(line, self.defaults)) is None:
                continue
            first = row.line if row.id is None else self._ids.find(row.id)
            yield row if isinstance(row, BadRow) or first == row.line else _twice(row, first)
        if digest.hexdigest() != self.sha256:
            raise self._changed()

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _check_plain(self) -> None:
        with _read_errors(self.path):
            head = os.pread(self._fd, 8, 0)
        for mark, kind in _PACKED.items():
            if head.startswith(mark):
                raise StoreError(f"{str(self.path)!r} is packed with {kind}, rows are read in place: unpack it first")

    def _scan(self) -> str:
        digest = hashlib.sha256()
        for line in self._lines(digest.update):
            row = parse_row(line, self.defaults)
            good = isinstance(row, Row) and self._ids.add(row.id, row.line) == row.line
            self._samples.append(row.sampling.n if isinstance(row, Row) and good else 0)
            self.rows_total += good
            self.bad_total += row is not None and not good
        self.samples_total = sum(self._samples)
        return digest.hexdigest()

    def _lines(self, update: Callable[[bytes], object]) -> Iterator[Line]:
        def seen(block: bytes) -> None:
            status = os.fstat(self._fd)
            if (status.st_size, status.st_mtime_ns) != self._as_found:
                raise self._changed()
            update(block)

        with _read_errors(self.path):
            yield from lines_of(self._fd, self.nbytes, seen=seen)

    def _changed(self) -> StoreMismatchError:
        return StoreMismatchError(
            f"{str(self.path)!r} changed while it was read: put back what it held and run the job again, which goes "
            "on; or give the new file results of its own"
        )


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreReadError(
            f"reading {str(path)!r}: {error.strerror}: check the disk, then run the job again, which goes on"
        ) from error


def _twice(row: Row, first: int | None) -> BadRow:
    return BadRow(row.line, row.id, f"the id {row.id!r} is that of line {first} already", row.openai is not None)


def _open(path: Path) -> int:
    if str(path) == "-":
        raise StoreError("prompts from standard input cannot be read again to go on after an interruption: give a file")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make us wait
    except OSError as error:
        raise StoreError(
            f"cannot read prompts from {str(path)!r}: {error.strerror}: check the path and its rights"
        ) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise StoreError(f"{str(path)!r} is no regular file, prompts are read more than once: give a JSON Lines file")
    return fd
