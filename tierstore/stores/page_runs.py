"""Which bytes of a page file belong to which cells, in ints alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tierstore.arena import Arena
from tierstore.errors import StoreError
from tierstore.extents import Extent, align_up
from tierstore.stores.workers import PAGE, ReadFence


@dataclass(eq=False, slots=True)
class Run:
    """Cells that lie one behind the other from ``extent.offset`` on; the extent is whole blocks of 4096 bytes.

    ``crcs``: the CRC32C of each cell, empty until the cells are written."""

    cells: int
    extent: Extent
    fence: ReadFence
    crcs: Sequence[int] = ()
    live: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.live = set(range(self.cells))

    @property
    def written(self) -> bool:
        """Whether its cells can be read."""
        return self.fence.done() and len(self.crcs) == self.cells


class RunSpace:
    """The bytes ``[0, nbytes)`` of a file, taken by runs of cells of ``cell_nbytes`` each; a run's all at once."""

    def __init__(self, nbytes: int, cell_nbytes: int) -> None:
        self.cell_nbytes = cell_nbytes
        self.dead_nbytes = 0
        """Bytes of freed cells in runs that others of their cells still keep."""
        self._arena = Arena(nbytes // PAGE * PAGE, PAGE)
        self._runs: set[Run] = set()

    @property
    def free_nbytes(self) -> int:
        """Bytes that no run takes."""
        return self._arena.free_nbytes

    @property
    def largest_gap(self) -> int:
        """Bytes that the largest new run can take."""
        return self._arena.largest_gap

    def take(self, cells: int, fence: ReadFence) -> Run | None:
        """A new run, or None when no gap is large enough."""
        extent = self._arena.alloc(align_up(cells * self.cell_nbytes, PAGE), PAGE)
        if extent is None:
            return None
        run = Run(cells, extent, fence)
        if cells:  # one without cells has nothing that could be freed
            self._runs.add(run)
        return run

    def free(self, run: object, cell: int) -> None:
        """Forget a cell, and with the last one its run. Raises ``StoreError`` unless the cell is live here."""
        run = self.check(run, cell, 1)
        run.live.remove(cell)
        self.dead_nbytes += self.cell_nbytes
        if not run.live:
            self.dead_nbytes -= run.cells * self.cell_nbytes
            self._runs.remove(run)
            self._arena.free(run.extent)

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

    def extent(self, run: Run, first: int, count: int) -> Extent:
        """The bytes of some neighbouring cells."""
        return Extent(run.extent.offset + first * self.cell_nbytes, count * self.cell_nbytes)
