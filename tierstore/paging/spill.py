"""Takes closed cells down from HBM and brings them back up; a cell changes its place when its move is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tierstore.contracts import Fence, PageRun
from tierstore.errors import PageLostError, StoreError, StoreFullError, TierstoreError
from tierstore.page_plan import KindPlan
from tierstore.paging.groups import groups
from tierstore.paging.places import NOWHERE, Cell, Places
from tierstore.paging.transport import Transport


@dataclass(slots=True, eq=False)
class _Move:
    """``cells`` on their way to RAM frames ``ram``, to ``run`` in the store, or up to HBM frames ``hbm``."""

    cells: tuple[Cell, ...]
    fence: Fence
    ram: tuple[int, ...] = ()
    run: PageRun | None = None
    hbm: tuple[int, ...] = ()


class Spill:
    """Moves under way between HBM frames and what lies below. RAM fills first, then the store, if there is one.

    ``lend`` frees a slot of the ring for a run to pass through, and says whether there is one. What fails leaves the
    cells where they are; ``failure`` is why the store takes no more, until something there is freed.
    """

    def __init__(self, plan: KindPlan, places: Places, transport: Transport, *, lend: Callable[[], bool]) -> None:
        self._plan = plan
        self._places = places
        self._transport = transport
        self._lend = lend
        self._moves: list[_Move] = []
        self.failure: StoreError | None = None

    @property
    def under_way(self) -> int:
        """Frames of HBM that moves down will free, if all goes well."""
        return sum(len(move.cells) for move in self._moves if not move.hbm)

    def coming(self, layer: int) -> int:
        """Cells of a layer that are on their way up."""
        return sum(len(move.cells) for move in self._moves if move.hbm and move.cells[0].layer == layer)

    def down(self, cells: Sequence[Cell]) -> bool:
        """Take standing cells down, at most a run; False when none of them can go anywhere now."""
        started = False
        for cell in [cell for cell in cells if cell.is_down]:
            self._places.leave(cell)
            started = True
        cells = tuple(cell for cell in cells if cell.frame != NOWHERE)
        if not cells:
            return started
        free = self._places.ram.free
        if free >= len(cells):
            return self._to_ram(cells)
        if self._to_store(cells):
            return True
        return (self._to_ram(cells[:free]) if free else False) or started

    def up(self, cells: Iterable[Cell], room: int) -> None:
        """Bring cells that are below, ``room`` at most, back to HBM frames."""
        coming = [cell for cell in cells if not cell.moving][: max(room, 0)]
        for group in groups(coming, self._plan.run_cells):
            frames = self._places.hbm.take(len(group))
            try:
                fence = self._transport.up_to_frames(group, frames)
            except BaseException:
                self._places.hbm.give_back(frames)
                raise
            self._begin(_Move(group, fence, hbm=frames))

    def poll(self, *, but: int = NOWHERE) -> None:
        """Note what is over, except in layer ``but``: its cells are read next, where they are, not fetched."""
        if self._moves:
            for move in [move for move in self._moves if move.cells[0].layer != but and move.fence.done()]:
                self._end(move)

    def wait(self) -> bool:
        """Wait for a move, first for one that frees frames; False when there is none."""
        moves = sorted(self._moves, key=lambda move: bool(move.hbm))
        if moves:
            self._end(moves[0])
        return bool(moves)

    def wait_all(self) -> None:
        """Wait for everything."""
        while self._moves:
            self._end(self._moves[0])

    def release(self, cells: Iterable[Cell]) -> None:
        """The store may forget cells that nobody holds."""
        for cell in cells:
            if cell.run is not None:
                self._transport.free(cell.run, cell.at)
                cell.run = None
                self.failure = None

    def _to_ram(self, cells: tuple[Cell, ...]) -> bool:
        frames = self._places.ram.take(len(cells))
        try:
            fence = self._transport.down_to_ram(cells, frames)
        except BaseException:
            self._places.ram.give_back(frames)
            raise
        self._begin(_Move(cells, fence, ram=frames))
        return True

    def _to_store(self, cells: tuple[Cell, ...]) -> bool:
        if not self._transport.has_store or self.failure is not None:
            return False
        if self._transport.needs_ring and not self._lend():
            return False
        try:
            begun = self._transport.down_to_store(cells)
        except StoreFullError as error:
            self.failure = error
            return False
        if begun is None:
            return False
        run, fence = begun
        self._begin(_Move(cells, fence, run=run))
        return True

    def _begin(self, move: _Move) -> None:
        for cell in move.cells:
            cell.moving = True
            self._places.standing[cell.layer].pop(cell, None)
        self._moves.append(move)

    def _end(self, move: _Move) -> None:
        """Wait for a move, and let its cells be where they are now."""
        error: TierstoreError | None = None
        try:
            move.fence.wait()
        except TierstoreError as problem:
            error = problem
        self._moves.remove(move)
        for cell in move.cells:
            cell.moving = False
        if move.hbm:
            self._end_up(move, error)
        elif error is None:
            self._end_down(move)
        else:
            self._fail_down(move, error)
        for cell in move.cells:
            if cell.forgotten:
                self.release(self._places.drop(cell))
        if error is not None and not isinstance(error, StoreError | PageLostError):
            raise error

    def _end_down(self, move: _Move) -> None:
        for index, cell in enumerate(move.cells):
            if move.ram:
                cell.ram = move.ram[index]
            else:
                cell.run, cell.at = move.run, index
            self._places.leave(cell)

    def _fail_down(self, move: _Move, error: TierstoreError) -> None:
        self._places.ram.give_back(move.ram)
        for index, cell in enumerate(move.cells):
            if move.run is not None:
                self._transport.free(move.run, index)
            if not cell.forgotten:
                self._places.stand(cell, cell.frame)
        if isinstance(error, StoreError):
            self.failure = error

    def _end_up(self, move: _Move, error: TierstoreError | None) -> None:
        lost = error.cells if isinstance(error, PageLostError) else ()
        for cell, frame in zip(move.cells, move.hbm, strict=True):
            if error is not None or cell.forgotten:
                self._places.hbm.give_back((frame,))
                cell.lost = cell.lost or (cell.run, cell.at) in lost
                self._places.epochs[cell.layer] += cell.lost
                continue
            if cell.ram != NOWHERE:
                self._places.ram.give_back((cell.ram,))
                cell.ram = NOWHERE
            self._places.stand(cell, frame)
