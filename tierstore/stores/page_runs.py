"""Which bytes of a page file belong to which cells, in ints alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tierstore.errors import StoreError
from tierstore.extents import Extent, align_up
from tierstore.stores.gaps import Gaps
from tierstore.stores.workers import PAGE, ReadFence


@dataclass(eq=False, slots=True)
class Run:
    """Cells that lie one behind the other in ``extents`` of the file, each of whole blocks of 4096 bytes: as a rule in
    one, in several where what is free lies between the cells of other runs.

    ``crcs``: the CRC32C of each cell, empty until the cells are written."""

    cells: int
    extents: tuple[Extent, ...]
    fence: ReadFence
    crcs: Sequence[int] = ()
    live: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.live = set(range(self.cells))

    @property
    def written(self) -> bool:
        """Whether its cells can be read."""
        return self.fence.done() and len(self.crcs) == self.cells

    def part(self, start: int, nbytes: int) -> list[Extent]:
        """Where ``nbytes`` of it are, from its byte ``start`` on."""
        found = []
        for extent in self.extents:
            if start < extent.nbytes and nbytes:
                size = min(extent.nbytes - start, nbytes)
                found.append(Extent(extent.offset + start, size))
                start, nbytes = 0, nbytes - size
            else:
                start -= extent.nbytes
        return found


class RunSpace:
    """The bytes ``[0, nbytes)`` of a file, taken by runs of cells of ``cell_nbytes`` each. A block is free again when
    no live cell has a byte of it, whatever becomes of the others of its run."""

    def __init__(self, nbytes: int, cell_nbytes: int) -> None:
        self.cell_nbytes = cell_nbytes
        self._nbytes = nbytes // PAGE * PAGE
        self._live_cells = 0
        self._gaps = Gaps(self._nbytes)
        self._runs: set[Run] = set()

    @property
    def free_nbytes(self) -> int:
        """Bytes that new runs can take."""
        return self._gaps.free_nbytes

    @property
    def dead_nbytes(self) -> int:
        """Bytes that are of no live cell and not free, as they share blocks with live ones; padding among them."""
        return self._nbytes - self.free_nbytes - self._live_cells * self.cell_nbytes

    def take(self, cells: int, fence: ReadFence) -> Run | None:
        """A new run, or None when too little is free."""
        extents = self._gaps.take(align_up(cells * self.cell_nbytes, PAGE))
        if extents is None:
            return None
        run = Run(cells, extents, fence)
        self._live_cells += cells
        if cells:  # one without cells has nothing that could be freed
            self._runs.add(run)
        return run

    def free(self, run: object, cell: int) -> None:
        """Forget a cell, and with the last one its run. Raises ``StoreError`` unless the cell is live here."""
        run = self.check(run, cell, 1)
        run.live.remove(cell)
        self._live_cells -= 1
        first, stop = cell * self.cell_nbytes // PAGE, -(-(cell + 1) * self.cell_nbytes // PAGE)
        while first < stop and self._is_used(run, first):
            first += 1
        while first < stop and self._is_used(run, stop - 1):
            stop -= 1
        for extent in run.part(first * PAGE, (stop - first) * PAGE):
            self._gaps.give_back(extent)
        if not run.live:
            self._runs.remove(run)

    def check(self, run: object, first: int, count: int) -> Run:
        """``run``, when it is one of ours and these cells are live. Raises ``StoreError``."""
        if not isinstance(run, Run) or (run not in self._runs and run.cells):
            raise StoreError("the run was freed, or is another store's: ask for cells that are held here")
        if count < 0 or not run.live.issuperset(range(first, first + count)):
            raise StoreError(
                f"{count} cells from {first} on were asked for, in a run of {run.cells} cells of which {len(run.live)} "
                "are not freed: ask for cells that are held"
            )
        return run

    def extents(self, run: Run, first: int, count: int) -> list[Extent]:
        """The bytes of some neighbouring cells, in order."""
        return run.part(first * self.cell_nbytes, count * self.cell_nbytes)

    def _is_used(self, run: Run, block: int) -> bool:
        """Whether a live cell has a byte of a block of ``run``."""
        first, last = block * PAGE // self.cell_nbytes, ((block + 1) * PAGE - 1) // self.cell_nbytes
        return not run.live.isdisjoint(range(first, last + 1))
