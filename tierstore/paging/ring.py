"""Fetches cells that are not in place into a ring of slots, in the order in which layers will read them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

from tierstore.contracts import Buffer, CopyEngine, Fence
from tierstore.errors import CapacityError, PageLostError, StoreError, TierstoreError
from tierstore.events import Missed, Recorder, Stalled
from tierstore.paging.groups import groups, places_in_slot
from tierstore.paging.order import Item, VisitOrder
from tierstore.paging.places import Cell, Places
from tierstore.paging.slots import Slots
from tierstore.paging.waves import Split, Splitter, Wave

Up = Callable[[Sequence[Cell], Buffer, Sequence[int], Sequence[Fence]], Fence]


@dataclass(slots=True, eq=False)
class _Fetch:
    """``cells`` on their way to ``offsets`` in the ring, within ``slot``, or there, for the layer of ``visit``."""

    visit: int
    cells: tuple[Cell, ...]
    offsets: tuple[int, ...]
    slot: int
    fence: Fence
    after: tuple[Fence, ...]  # earlier users of the slot, which a fetch that failed may not have waited for


class Ring:
    """Cells of the coming visits, nearest first, as far as there are slots; what is missed takes the farthest's slot.

    Cells are known by their objects: what was fetched and is not asked for is passed over, what is asked for and was
    not fetched is fetched then, and counted in ``misses``. So a wrong order costs time, never a wrong byte. A slot
    holds ``slot_cells`` cells. ``names`` are those of the layers in what is recorded.
    """

    def __init__(
        self,
        slots: Slots,
        slot_cells: int,
        frame_nbytes: int,
        *,
        places: Places,
        splitter: Splitter,
        up: Up,
        engine: CopyEngine,
        recorder: Recorder,
        names: Sequence[str],
    ) -> None:
        self._slots = slots
        self._slot_cells = slot_cells
        self._frame_nbytes = frame_nbytes
        self._places = places
        self._splitter = splitter
        self._up = up
        self._engine = engine
        self._record = recorder
        self._names = names
        self._order = VisitOrder()
        self._queue: deque[_Fetch] = deque()
        self._held: list[_Fetch] = []  # what compute reads now
        self._readers: list[Fence] = []  # and who does beside it
        self._served: set[Cell] = set()  # what it has read in the visit under way, if that was expected
        self._planned = 0  # visits before this one are queued
        self._todo: deque[tuple[Cell, ...]] | None = None  # groups of the visit `_planned` that are not
        self._groups: dict[int, tuple[Split, tuple[tuple[Cell, ...], ...]]] = {}  # of layers, while no cell moves
        self._departures = 0
        self._turn = 0
        self.misses = 0
        self.stall_seconds = 0.0

    def expect(self, items: Sequence[Item]) -> bool:
        """From now on layers read ``items``, the first of them next; whether that is news."""
        if not self._order.set(items):
            self.advance()
            return False
        fetches, self._queue = self._queue, deque()
        visits = self._order.renumber((fetch.visit, fetch.cells[0].layer) for fetch in fetches)
        for fetch in fetches:
            visit = next(visits, None)
            if visit is None:
                self._drop(fetch)
            else:
                fetch.visit = visit
                self._queue.append(fetch)
        self._plan_from(self._order.cursor)
        self.advance()
        return True

    def visit(self, layer: int, pages: tuple[int, ...]) -> None:
        """``layer`` reads ``pages`` now, and all of them are in place."""
        if self._order.is_next(layer, pages):
            self._finish(self._order.cursor)
            self.advance()

    def serve(self, layer: int, pages: tuple[int, ...], streamed: Sequence[Cell]) -> Iterator[Wave]:
        """``layer`` reads ``pages`` now: the ``streamed`` cells among them as they come.

        Raises ``PageLostError``, and what else the store raises."""
        wanted = dict.fromkeys(streamed)
        self._release()  # if the last iteration was left in the middle
        self._turn += 1
        turn, visit, missed = self._turn, self._begin(layer, pages), False
        beside: list[Fence] = []
        try:
            while wanted:
                wave = self._arrived(visit, wanted)
                if wave is None:
                    if not missed:
                        if self._planned == visit and self._start_next(now=True):
                            continue
                        self.misses += 1
                        self._record(Missed(self._names[layer]))
                        missed = True
                    self._fetch_now(visit, wanted)
                    continue
                yield wave
                if turn != self._turn:
                    raise RuntimeError(f"layer {layer} was left for another before its last wave was read: end it")
                beside += self._readers
                self._release()
                if missed:
                    self._fetch_more(visit, wanted)
                self.advance()
        finally:
            if turn == self._turn:
                self._release()
                self._finish(visit)
        left = [reader for reader in beside if not reader.done()]
        self.advance()
        for reader in left:  # nobody else would fetch to the slots that they leave
            reader.wait()
            self.advance()

    def advance(self) -> None:
        """Fetch what comes next as far as there are slots."""
        if self._departures != self._places.departures:  # what was in place may have to be fetched now
            self._departures = self._places.departures
            self._plan_from(self._order.cursor)
        while self._planned < self._order.end:
            try:
                while self._start_next(now=False):
                    pass
            except TierstoreError:  # whoever asks for these cells will be told
                return
            if self._todo:
                return
            self._plan_from(self._planned + 1)

    def lend(self) -> bool:
        """Whether a slot is free to be taken; what is read last gives its own."""
        return bool(self._slots.free) or self._steal(self._order.cursor - 1)

    def close(self) -> None:
        """Let go of all that was fetched."""
        self._release()
        self._turn += 1
        self._order.set(())
        while self._queue:
            self._drop(self._queue.popleft())

    def _begin(self, layer: int, pages: tuple[int, ...]) -> int:
        """The visit that this is. What was to come before it is dropped; a read that is none of them comes between."""
        visit = self._order.find(layer, pages)
        if visit is None:
            return self._order.cursor - 1
        while self._queue and self._queue[0].visit < visit:
            self._drop(self._queue.popleft())
        self._order.cursor = visit
        self._plan_from(visit)
        return visit

    def _finish(self, visit: int) -> None:
        while self._queue and self._queue[0].visit <= visit:
            self._drop(self._queue.popleft())
        self._served.clear()
        self._order.cursor = max(self._order.cursor, visit + 1)
        if self._planned < self._order.cursor:
            self._plan_from(self._order.cursor)

    def _plan_from(self, visit: int) -> None:
        self._planned, self._todo = visit, None

    def _start_next(self, *, now: bool) -> bool:
        """Fetch the next group of the visit `_planned`, as `_start` does; False too where none is left."""
        if self._todo is None:
            self._todo = self._missing(self._planned)
        if not self._todo or not self._start(self._planned, self._todo[0], now=now):
            return False
        self._todo.popleft()
        return True

    def _missing(self, visit: int) -> deque[tuple[Cell, ...]]:
        """Groups of a visit that are neither fetched nor read."""
        fetched = {cell for fetch in self._queue if fetch.visit == visit for cell in fetch.cells}
        if visit == self._order.cursor:
            fetched |= self._served
        layer, pages = self._order.item(visit)
        split = self._splitter.split(layer, pages)
        if fetched:
            return deque(groups((cell for cell in split.streamed if cell not in fetched), self._slot_cells))
        known = self._groups.get(layer)
        if known is None or known[0] is not split:
            known = self._groups[layer] = split, tuple(groups(split.streamed, self._slot_cells))
        return deque(known[1])

    def _start(self, visit: int, group: Sequence[Cell], *, now: bool) -> bool:
        """Fetch a group for a visit; False where only earlier or equal visits hold slots, or, unless it is needed
        ``now``, where the host would have to wait."""
        cells = tuple([cell for cell in group if cell.is_down and not cell.forgotten])
        if not cells:
            return True
        if not self._slots.free and not self._steal(visit):
            return False
        taken = self._take(now)
        if taken is None:
            return False
        slot, after = taken
        start = slot * self._slots.nbytes
        offsets = tuple(start + at for at in places_in_slot(cells, self._frame_nbytes, self._slots.nbytes))
        try:
            fence = self._up(cells, self._slots.buffer, offsets, after)
        except BaseException:
            self._slots.give_back(slot, after)
            raise
        at = len(self._queue)
        while at and self._queue[at - 1].visit > visit:
            at -= 1
        self._queue.insert(at, _Fetch(visit, cells, offsets, slot, fence, after))
        return True

    def _take(self, now: bool) -> tuple[int, tuple[Fence, ...]] | None:
        if now or not self._engine.unified:
            return self._slots.take()
        slot = self._slots.take_idle()  # reads begin when they are asked for: the host would wait for the slot
        return None if slot is None else (slot, ())

    def _steal(self, visit: int) -> bool:
        """Free the slot of what is read last, if that is after ``visit``."""
        if not self._queue or self._queue[-1].visit <= visit:
            return False
        farthest = self._queue.pop()
        self._drop(farthest)
        if self._planned >= farthest.visit:
            self._plan_from(farthest.visit)
        return True

    def _fetch_now(self, visit: int, wanted: dict[Cell, None]) -> None:
        self._fetch_more(visit, wanted)
        if not any(fetch.visit == visit for fetch in self._queue):
            raise CapacityError("no slot of the KV ring is free: end the waves of one layer before those of another")

    def _fetch_more(self, visit: int, wanted: dict[Cell, None]) -> None:
        fetched = {cell for fetch in self._queue if fetch.visit == visit for cell in fetch.cells}
        for group in groups((cell for cell in wanted if cell not in fetched), self._slot_cells):
            if not self._start(visit, group, now=True):
                return

    def _arrived(self, visit: int, wanted: dict[Cell, None]) -> Wave | None:
        """What was fetched for the visit first, once it is there, and what has come meanwhile, up to about a quarter of
        the ring: the rest of it is on its way."""
        pages: list[int] = []
        offsets: list[int] = []
        while self._queue and self._queue[0].visit == visit:
            if self._held and (4 * len(self._held) >= self._slots.count or not self._queue[0].fence.done()):
                break
            fetch = self._queue.popleft()
            cells = [(cell, at) for cell, at in zip(fetch.cells, fetch.offsets, strict=True) if cell in wanted]
            try:
                arrived = bool(cells) and self._gate(fetch, wanted)
            except BaseException:
                self._drop(fetch)
                raise
            if not arrived:
                self._drop(fetch)
                continue
            self._held.append(fetch)
            for cell, at in cells:
                del wanted[cell]
                if visit == self._order.cursor:
                    self._served.add(cell)
                pages.append(cell.page)
                offsets.append(at)
        self._readers = []
        return Wave(tuple(pages), self._slots.buffer, tuple(offsets), self._readers) if pages else None

    def _gate(self, fetch: _Fetch, wanted: dict[Cell, None]) -> bool:
        """Let compute wait for a fetch; False when it failed in a way that fetching anew may mend."""
        start = perf_counter()
        try:
            fetch.fence.gate()
        except PageLostError as error:
            self._note_lost(fetch, error, wanted)
            return False
        except StoreError:
            if any(cell.forgotten for cell in fetch.cells):  # the store refused for the sake of what nobody wants
                return False
            raise
        seconds = perf_counter() - start
        self.stall_seconds += seconds
        self._record(Stalled(self._names[fetch.cells[0].layer], seconds))
        return True

    def _note_lost(self, fetch: _Fetch, error: PageLostError, wanted: dict[Cell, None]) -> None:
        lost = []
        for cell in fetch.cells:
            if (cell.run, cell.at) in error.cells:
                cell.lost = True
                self._places.epochs[cell.layer] += 1
                lost.append(cell)
        if any(cell in wanted for cell in lost) or not lost:
            raise error

    def _drop(self, fetch: _Fetch) -> None:
        self._slots.give_back(fetch.slot, (fetch.fence, *fetch.after))

    def _release(self) -> None:
        """Compute on what is held was issued."""
        if self._held:
            over = (self._engine.mark(), *self._readers)
            for fetch in self._held:
                self._slots.give_back(fetch.slot, over)
            self._held.clear()
