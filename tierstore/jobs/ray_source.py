"""A file of prompts as a lazy dataset of Ray Data: read where the job was started, as workers take more."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from tierstore.errors import StoreMismatchError, StoreReadError, TierstoreError
from tierstore.jobs.lines import Line, lines_of
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.ray_errors import error_of, error_table

COLUMN = "chunk"
MOST_NBYTES = 4 << 20
"""A chunk ends where its lines have so many bytes, however few they are."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines of a file of prompts for a worker to answer, or the ``error`` why there are none."""

    lines: Sequence[Line] = ()
    error: TierstoreError | None = None

    def to_bytes(self) -> bytes:
        """For ``from_bytes``. The lines are UTF-8, as those of rows that can be answered are."""
        lines = [[line.number, (line.raw or b"").decode()] for line in self.lines]
        error = None if self.error is None else error_table(self.error)
        return json.dumps({"lines": lines, "error": error}).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> Chunk:
        """What ``to_bytes`` made, but where the lines stand in their file."""
        table = json.loads(raw)
        lines = [Line(number, 0, text.encode(), True) for number, text in table["lines"]]
        return cls(lines, table["error"] and error_of(table["error"]))


@dataclass(frozen=True, slots=True)
class Wanted:
    """Lines of the file ``path`` that are to be answered: a bit of ``bits`` each, ``count`` in all. The file is the one
    that has ``nbytes`` bytes and this ``sha256``."""

    path: str
    nbytes: int
    sha256: str
    bits: bytes
    count: int

    @classmethod
    def of(cls, prompts: PromptFile, skip: Callable[[int], bool]) -> Wanted:
        """The rows of ``prompts`` that can be answered, but for lines that are to ``skip``."""
        bits, count = bytearray(prompts.lines // 8 + 1), 0
        for line in range(1, prompts.lines + 1):
            if prompts.samples_of(line) and not skip(line):
                bits[line >> 3] |= 1 << (line & 7)
                count += 1
        return cls(os.path.abspath(prompts.path), prompts.nbytes, prompts.sha256, bytes(bits), count)

    def has(self, line: int) -> bool:
        """Whether a line is wanted."""
        return bool(self.bits[line >> 3] >> (line & 7) & 1)

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """The lines in the order of the file, up to ``rows`` at a time; an error ends them."""
        try:
            yield from self._chunks(rows)
        except TierstoreError as error:
            yield Chunk(error=error)
        except OSError as error:
            yield Chunk(error=StoreReadError(f"reading {self.path!r}: {error.strerror}: run the job again"))

    def _chunks(self, rows: int) -> Iterator[Chunk]:
        digest, lines, nbytes = hashlib.sha256(), list[Line](), 0
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if os.fstat(fd).st_size == self.nbytes:
                for line in lines_of(fd, self.nbytes, seen=digest.update):
                    if self.has(line.number):
                        lines.append(line)
                        nbytes += len(line.raw or b"")
                    if len(lines) == rows or nbytes >= MOST_NBYTES:
                        yield Chunk(lines)
                        lines, nbytes = [], 0
            if digest.hexdigest() != self.sha256:
                raise StoreMismatchError(
                    f"{self.path!r} changed while it was read: put back what it held and run the job again, which goes "
                    "on; or give the new file results of its own"
                )
        finally:
            os.close(fd)
        if lines:
            yield Chunk(lines)


class Prompts(Datasource):
    """A block for each chunk of up to ``rows`` of the ``wanted`` rows, in the column ``COLUMN``.

    One task reads them all, on the machine of the process that made the dataset, and waits where Ray holds it back."""

    def __init__(self, wanted: Wanted, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wanted, self._rows = wanted, rows

    @property
    def supports_distributed_reads(self) -> bool:
        """No: the file need not be seen on other machines."""
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows."""
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ReadTask]:
        """One."""
        wanted, rows = self._wanted, self._rows
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: _blocks(wanted, rows), unknown)]


def _blocks(wanted: Wanted, rows: int) -> Iterator[pyarrow.Table]:
    for chunk in wanted.chunks(rows):
        yield pyarrow.table({COLUMN: [chunk.to_bytes()]})
