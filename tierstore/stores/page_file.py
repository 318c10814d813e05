"""KV pages on NVMe: runs of cells are written once, read past the page cache, and checked cell by cell."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tierstore.budget import format_nbytes
from tierstore.contracts import Buffer, CellRead, Fence, PageRun
from tierstore.errors import PageLostError, StoreError, StoreFullError, StoreReadError
from tierstore.extents import Extent
from tierstore.stores.durable import CHUNK, store_errors
from tierstore.stores.page_runs import Run, RunSpace
from tierstore.stores.page_writes import NamelessFile, WriteRun, cell_crcs
from tierstore.stores.reader import FileRun, Reader
from tierstore.stores.workers import PAGE, ReadFence, Workers, buffer_address


class PageFile:
    """A ``PageStore`` in one file of at most ``capacity_nbytes`` below ``folder``, which is made where it is missing.

    The file has no name and is gone with the process. A run takes the bytes of its cells rounded up to 4096, in several
    pieces where no gap is large enough: a block of 4096 is free again when no live cell has a byte of it. Host memory
    is written from, and read into, without a copy where its address is a multiple of 4096 (for reads: plus the offset
    of the first cell in its run). Raises ``StoreError`` when the folder cannot be written to, or when the capacity
    holds no cell.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, cell_nbytes: int, capacity_nbytes: int, threads: int = 4
    ) -> None:
        if not 0 < cell_nbytes <= capacity_nbytes // PAGE * PAGE:
            raise StoreError(
                f"a page file of {capacity_nbytes} bytes cannot hold a cell of {cell_nbytes} bytes, rounded up to "
                f"{PAGE}: raise kv_nvme"
            )
        self.cell_nbytes, self.capacity_nbytes = cell_nbytes, capacity_nbytes
        self._folder = Path(folder)
        self._space = RunSpace(capacity_nbytes, cell_nbytes)
        self._reads: deque[tuple[ReadFence, list[Extent]]] = deque()
        self._made_folder = not os.path.lexists(folder)
        with store_errors(f"cannot make a file for KV pages in {str(folder)!r}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._file = NamelessFile(self._folder)
                self._reader = Reader([self._file.path], threads=threads)
            except BaseException:
                self._leave_folder()
                raise
        self._checker = Workers(1, name="check")
        self._writer = Workers(1, CHUNK, name="write")

    @property
    def written_nbytes(self) -> int:
        """Bytes of cells written so far, whatever became of them since."""
        return self._file.written_nbytes

    @property
    def free_nbytes(self) -> int:
        """Bytes that no run takes."""
        return self._space.free_nbytes

    @property
    def dead_nbytes(self) -> int:
        """Bytes that are neither of a live cell nor free, as they share blocks of 4096 bytes with live ones."""
        return self._space.dead_nbytes

    def put(self, cells: int, data: Buffer, *, after: Sequence[Fence] = ()) -> Run:
        """Start writing a run, as ``PageStore.put`` says. ``StoreError`` for a buffer of another size, or if closed."""
        nbytes = cells * self.cell_nbytes
        source = buffer_address(data, nbytes)
        fence = ReadFence(nbytes, (data,))
        run = self._space.take(cells, fence)
        if run is None:
            raise StoreFullError(
                f"{cells} cells of KV pages need {format_nbytes(nbytes)} where the page file of "
                f"{format_nbytes(self.capacity_nbytes)} has {format_nbytes(self.free_nbytes)} free and "
                f"{format_nbytes(self.dead_nbytes)} in blocks that are used in part: free pages, or raise kv_nvme"
            )
        readers = [
            reads for reads, extents in self._under_way() if any(a.overlaps(b) for a in extents for b in run.extents)
        ]
        job = WriteRun(fence, self._file, run, source, self.cell_nbytes, after, readers, self._reader.blocks[0])
        try:
            self._writer.submit(fence, [job] if cells else [])
        except StoreError:
            for cell in range(cells):
                self._space.free(run, cell)
            raise
        return run

    def read(self, requests: Sequence[CellRead]) -> CellFence:
        """Start reading, as ``PageStore.read`` says. Neighbouring cells are read at once, wherever they go to."""
        wanted = [each for each in map(self._wanted, requests) if each.count]
        wanted.sort(key=lambda each: each.extents[0].offset)
        fence = CellFence(sum(each.nbytes for each in wanted), requests, str(self._folder))
        batches = [
            (self._reader.read_runs([part for each in batch for part in each.reads], requests), batch)
            for batch in _batches(wanted)
        ]
        self._checker.submit(fence, [_Check(fence, self._reader, batches)] if batches else [])
        self._reads.append((fence, [extent for each in wanted for extent in each.extents]))
        return fence

    def free(self, run: PageRun, cell: int) -> None:
        """Forget a cell, as ``PageStore.free`` says. ``StoreError`` for a cell that is not live here."""
        self._space.free(run, cell)

    def close(self) -> None:
        """End the threads and give the file's space back; what is queued fails its fence. Idempotent.

        Waits for what is running, and so for what the run that is being written is to come ``after``."""
        self._reader.close()  # before who checks, whose fence says that nobody writes to the buffers
        self._checker.close()
        self._writer.close()
        self._file.close()
        self._leave_folder()

    def _wanted(self, request: CellRead) -> _Wanted:
        run = self._space.check(request.run, request.first, request.count)
        if not run.written:
            raise StoreError("a run is read that is not written, or failed to be: wait for its fence first")
        nbytes = request.count * self.cell_nbytes
        address = buffer_address(request.into, nbytes)
        extents = self._space.extents(run, request.first, request.count)
        return _Wanted(run, request.first, request.count, nbytes, extents, address)

    def _under_way(self) -> Iterator[tuple[ReadFence, list[Extent]]]:
        while self._reads and self._reads[0][0].done():
            self._reads.popleft()
        return (each for each in self._reads if not each[0].done())

    def _leave_folder(self) -> None:
        if self._made_folder:
            with suppress(OSError):  # others use it by now
                self._folder.rmdir()
            self._made_folder = False


@dataclass(slots=True)
class _Wanted:
    """``count`` neighbouring cells, the bytes of the file that they are, in order, and the host address they go to."""

    run: Run
    first: int
    count: int
    nbytes: int
    extents: list[Extent]
    address: int

    @property
    def cells(self) -> range:
        """Their numbers in the run."""
        return range(self.first, self.first + self.count)

    @property
    def cell_nbytes(self) -> int:
        """Bytes of one of them."""
        return self.nbytes // self.count

    @property
    def reads(self) -> list[FileRun]:
        """All of them at once."""
        return _reads(self.extents, self.address)

    def cell(self, number: int) -> list[FileRun]:
        """The cell with that number in the run."""
        nbytes = self.cell_nbytes
        return _reads(self.run.part(number * nbytes, nbytes), self.address + (number - self.first) * nbytes)


def _reads(extents: Sequence[Extent], address: int) -> list[FileRun]:
    reads = []
    for extent in extents:
        reads.append((0, extent.offset, extent.nbytes, address))
        address += extent.nbytes
    return reads


def _batches(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """Runs of ``wanted`` of a chunk or a little more: one is checked while the next ones are read."""
    batch: list[_Wanted] = []
    nbytes = 0
    for each in wanted:
        batch.append(each)
        nbytes += each.nbytes
        if nbytes >= CHUNK:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


class CellFence(ReadFence):
    """Complete when every cell of one ``read`` has arrived or is known to be lost."""

    __slots__ = ("_cause", "_folder", "_lost", "_why")

    def __init__(self, nbytes: int, keep: Sequence[object], folder: str) -> None:
        super().__init__(nbytes, keep)
        self._folder = folder
        self._lost: list[tuple[Run, int]] = []
        self._why = ""
        self._cause: StoreError | None = None

    def lose(self, run: Run, cell: int, why: str, cause: StoreError | None = None) -> None:
        """Note that a cell did not arrive."""
        if not self._lost:
            where = f"cell {cell} of {run.cells} of the run at byte {run.extents[0].offset}"
            self._why, self._cause = f"{where}: {why}", cause
        self._lost.append((run, cell))

    def wait(self) -> None:
        """Block until done; raise ``PageLostError`` with the cells that did not arrive."""
        super().wait()
        if self._lost:
            raise PageLostError(
                f"{len(self._lost)} cells of KV pages in the page file below {self._folder!r} are lost; the first is "
                f"{self._why}: compute them again from their tokens, and check the disk",
                cells=self._lost,
            ) from self._cause

    gate = wait


@dataclass(slots=True)
class _Check:
    """Runs behind the reads of ``batches`` and compares each cell with what was written."""

    fence: CellFence
    reader: Reader
    batches: list[tuple[ReadFence, list[_Wanted]]]

    def run(self, scratch: memoryview, address: int) -> None:
        try:
            for read, batch in self.batches:
                arrived = self._arrived(read)
                self.fence.started = self.fence.started or read.started
                for wanted in batch:
                    self._compare(wanted, wanted.cells if arrived else self._singly(wanted))
        finally:
            for read, _ in self.batches:  # nobody writes to the buffers when the fence is done
                read.settle()

    def _compare(self, wanted: _Wanted, arrived: Container[int]) -> None:
        run = wanted.run
        crcs = cell_crcs(wanted.address, wanted.nbytes, wanted.cell_nbytes)
        for cell, crc in zip(wanted.cells, crcs, strict=True):
            if crc != run.crcs[cell] and cell in arrived:
                self.fence.lose(run, cell, f"it has CRC32C {crc:08x}, written with {run.crcs[cell]:08x}")

    def _singly(self, wanted: _Wanted) -> set[int]:
        """Those cells of a batch that failed which arrive when they are read one by one."""
        arrived = set()
        for cell in wanted.cells:
            try:
                self.reader.read_runs(wanted.cell(cell), ()).wait()  # the fence keeps the buffers
                arrived.add(cell)
            except StoreReadError as error:
                self.fence.lose(wanted.run, cell, "it cannot be read, or the file was cut short", error)
        return arrived

    def _arrived(self, read: ReadFence) -> bool:
        try:
            read.wait()
        except StoreReadError:
            return False
        return True
