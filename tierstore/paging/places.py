"""Where each cell is: its frames in HBM, its frame in RAM, its place in the page store. Numbers only, no bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from tierstore.contracts import PageRun
from tierstore.paging.frames import FrameList

NOWHERE = -1
"""In place of the number of a frame: there is none."""


@dataclass(slots=True, eq=False)
class Cell:
    """One page in one layer. Its bytes never change once it is closed, so the object stands for them.

    A page that is opened anew, or reopened, gets another object. ``raw`` are the frames of an open cell; ``frame``,
    ``ram`` and ``run`` (its cell ``at``) are where the bytes of a closed one are, in several places at times.
    A cell that is ``forgotten`` while it is ``moving`` gives its places back when the move ends.
    """

    layer: int
    page: int
    raw: tuple[int, ...] = ()
    frame: int = NOWHERE
    ram: int = NOWHERE
    run: PageRun | None = None
    at: int = 0
    closed: bool = False
    moving: bool = False
    forgotten: bool = False
    lost: bool = False
    before: Cell | None = None  # what the page held when it was reopened, readable until that was unpacked

    @property
    def is_down(self) -> bool:
        """Whether its bytes are below HBM, so that a copy there can be dropped."""
        return self.ram != NOWHERE or self.run is not None


class Places:
    """The cells of ``layers`` layers, numbered from 0, and the free frames of HBM and RAM.

    ``epochs[layer]`` grows whenever a closed cell of the layer comes, goes or moves; ``departures`` whenever one
    leaves HBM. ``standing[layer]`` are the closed cells in HBM that no move takes down, in the order of closing.
    """

    def __init__(self, layers: int, frames: int, ram_frames: int) -> None:
        self.hbm = FrameList(frames)
        self.ram = FrameList(ram_frames)
        self.cells: list[dict[int, Cell]] = [{} for _ in range(layers)]
        self.standing: list[dict[Cell, None]] = [{} for _ in range(layers)]
        self.epochs = [0] * layers
        self.departures = 0
        self.expected: list[frozenset[int] | None] = [None] * layers
        self.open_cells: dict[int, int] = {}  # of each page: the layers in which it is open

    def open(self, page: int, frames: int) -> None:
        """A new page, open in every layer with ``frames`` frames each, which are free."""
        for layer, cells in enumerate(self.cells):
            cells[page] = Cell(layer, page, raw=self.hbm.take(frames))
        self.open_cells[page] = len(self.cells)

    @staticmethod
    def reopens_in_place(cell: Cell, *, plain: bool) -> bool:
        """Whether the frame of a closed cell can be written to as it is."""
        return plain and cell.frame != NOWHERE and not cell.moving

    def reopen(self, cell: Cell, frames: int, *, plain: bool) -> None:
        """A page is open again in the layer of its closed ``cell``; a plain one in HBM stays where it is."""
        if self.reopens_in_place(cell, plain=plain):
            new = Cell(cell.layer, cell.page, raw=(cell.frame,))
            cell.frame = NOWHERE
            self.standing[cell.layer].pop(cell, None)
        else:
            new = Cell(cell.layer, cell.page, raw=self.hbm.take(frames), before=cell)
        self.cells[cell.layer][cell.page] = new
        self.epochs[cell.layer] += 1
        self.open_cells[cell.page] = self.open_cells.get(cell.page, 0) + 1

    def close(self, cell: Cell, frame: int) -> None:
        """The bytes of an open cell stand in ``frame`` from now on."""
        self.hbm.give_back(number for number in cell.raw if number != frame)
        cell.raw, cell.closed = (), True
        self.stand(cell, frame)
        self._one_less_open(cell.page)

    def stand(self, cell: Cell, frame: int) -> None:
        """The bytes of a closed cell are in ``frame`` of HBM."""
        cell.frame = frame
        self.standing[cell.layer][cell] = None
        self.epochs[cell.layer] += 1

    def expect(self, items: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Which pages each layer reads in turn: the others are the first to go down."""
        self.expected = [None] * len(self.cells)
        sets = {id(pages): pages for _, pages in items}  # most layers share one tuple
        known = {number: frozenset(pages) for number, pages in sets.items()}
        for layer, pages in items:
            before, now = self.expected[layer], known[id(pages)]
            self.expected[layer] = now if before is None else before | now

    def next_to_leave(self, layer: int, count: int) -> tuple[Cell, ...]:
        """``count`` standing cells: first those that nobody reads, then those that closed last. Others stay."""
        standing, expected = self.standing[layer], self.expected[layer]
        idle = [] if expected is None else [cell for cell in standing if cell.page not in expected][:count]
        left = dict.fromkeys(idle)
        last = islice((cell for cell in reversed(standing) if cell not in left), count - len(idle))
        return (*idle, *reversed(tuple(last)))

    def leave(self, cell: Cell) -> None:
        """The copy of a cell in HBM is dropped: its bytes are below."""
        self.standing[cell.layer].pop(cell, None)
        self.hbm.give_back((cell.frame,))
        cell.frame = NOWHERE
        self.epochs[cell.layer] += 1
        self.departures += 1

    def forget(self, page: int) -> Iterator[Cell]:
        """Forget a page, if it is known; yields the cells that have no frames any more, but a run perhaps."""
        for layer, cells in enumerate(self.cells):
            cell = cells.pop(page, None)
            self.epochs[layer] += cell is not None
            while cell is not None:
                self.hbm.give_back(frame for frame in cell.raw if frame != cell.frame)
                cell.raw = ()
                yield from self.drop(cell)
                before, cell.before = cell.before, None
                cell = before
        self.open_cells.pop(page, None)

    def drop(self, cell: Cell) -> Iterator[Cell]:
        """Give back the frames of a cell that nothing moves; yields it unless something does."""
        cell.forgotten = True
        self.standing[cell.layer].pop(cell, None)
        if cell.moving:
            return
        if cell.frame != NOWHERE:
            self.hbm.give_back((cell.frame,))
        if cell.ram != NOWHERE:
            self.ram.give_back((cell.ram,))
        cell.frame = cell.ram = NOWHERE
        yield cell

    def _one_less_open(self, page: int) -> None:
        left = self.open_cells[page] - 1
        if left:
            self.open_cells[page] = left
        else:
            del self.open_cells[page]
