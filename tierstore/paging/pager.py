"""The pager: gives open cells their frames, and brings closed cells to compute from wherever they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tierstore.contracts import Buffer, CopyEngine, PageStore
from tierstore.errors import CapacityError, PageLostError, SessionClosedError
from tierstore.events import Recorder
from tierstore.page_plan import KindPlan
from tierstore.paging.going_down import make_room, quota_now, run_is_full
from tierstore.paging.groups import runs_a_fetch
from tierstore.paging.places import NOWHERE, Cell, Places
from tierstore.paging.ring import Ring
from tierstore.paging.slots import Slots
from tierstore.paging.spill import Spill
from tierstore.paging.transport import Transport
from tierstore.paging.usage import PagerUsage
from tierstore.paging.waves import Split, Splitter, Wave


class Pager:
    """The cells of all layers of one kind. Compute calls it from one thread; what moves, moves behind its back.

    ``region`` are ``plan.frames`` frames of HBM, ``ring`` ``plan.ring_slots`` slots of ``plan.slot_nbytes`` there,
    ``ram`` ``plan.ram_frames`` frames of pinned host memory, ``staging`` ``plan.staging_slots`` slots of it. Whoever
    made the memory and ``file`` keeps them until after ``shut``. ``page`` is a number that the caller chooses.

    Raises ``KeyError`` for a layer or a page that it does not know, ``ValueError`` for memory that is too small.
    """

    def __init__(
        self,
        plan: KindPlan,
        *,
        layers: Sequence[int],
        region: Buffer,
        ring: Buffer,
        ram: Buffer | None,
        staging: Buffer | None,
        file: PageStore | None,
        engine: CopyEngine,
        recorder: Recorder,
    ) -> None:
        for name, buffer, nbytes in (
            ("region", region, plan.region_nbytes),
            ("ring", ring, plan.ring_nbytes),
            ("ram", ram, plan.ram_nbytes),
            ("staging", staging, plan.staging_nbytes),
        ):
            if buffer is not None and buffer.numel() < nbytes:
                raise ValueError(f"{name} has {buffer.numel()} bytes, the plan needs {nbytes}: give as many")
        if file is not None and file.cell_nbytes != plan.frame_nbytes:
            raise ValueError(f"the page store has cells of {file.cell_nbytes} bytes, frames are {plan.frame_nbytes}")
        self.region = region
        self._plan = plan
        self._layers = tuple(layers)
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._plain = plan.kind.plain
        self._places = Places(len(layers), plan.frames, plan.ram_frames if ram is not None else 0)
        self._splitter = Splitter(self._places, plan.frame_nbytes, region, ram if engine.unified else None)
        runs = runs_a_fetch(plan, staged=file is not None and not engine.unified)
        slots = Slots(ring, plan.ring_slots // runs, runs * plan.slot_nbytes)
        self._transport = Transport(
            plan, runs, region=region, ring=slots, ram=ram, staging=staging, file=file, engine=engine, recorder=recorder
        )
        self._ring = Ring(
            slots,
            runs * plan.run_cells,
            plan.frame_nbytes,
            places=self._places,
            splitter=self._splitter,
            up=self._transport.up,
            engine=engine,
            recorder=recorder,
            names=[f"kv of layer {layer}" for layer in layers],
        )
        self._shut = False
        self._freed = False  # since the last `expect`: there may be room
        self._spill = Spill(plan, self._places, self._transport, lend=self._ring.lend)

    def open(self, page: int) -> None:
        """Frames for an open cell in every layer. Whatever the number held before is forgotten.

        Raises ``CapacityError``, with nothing else changed, when cells that stand in the way can go nowhere."""
        self._check_open()
        self.free((page,))
        self._make_room(self._page_frames, f"page {page}")
        self._places.open(page, self._plan.open.frames)

    def frames(self, layer: int, page: int) -> tuple[int, ...]:
        """The frames of an open cell, for its pieces in order: ``region[frame * frame_nbytes :]``."""
        cell = self._cell(layer, page)
        if cell.closed:
            raise ValueError(f"page {page} is closed in layer {layer}: reopen it before it is written to")
        return cell.raw

    def is_open(self, layer: int, page: int) -> bool:
        """Whether tokens can be written to the cell."""
        return not self._cell(layer, page).closed

    def close(self, layer: int, page: int) -> int:
        """The frame to pack an open cell into; of a plain one, its own. ``closed`` must follow."""
        cell = self._cell(layer, page)
        if cell.closed:
            raise ValueError(f"page {page} is closed in layer {layer} already")
        if cell.frame == NOWHERE:
            if not self._plain:
                self._make_room(1, f"page {page}")
            cell.frame = cell.raw[0] if self._plain else self._places.hbm.take(1)[0]
        return cell.frame

    def closed(self, layer: int, page: int) -> None:
        """Packing was issued: the raw frames serve others, the cell can be read, and may go down."""
        cell = self._cell(layer, page)
        if cell.closed or cell.frame == NOWHERE:
            raise ValueError(f"page {page} is not being closed in layer {layer}: call close first")
        self.reopened(layer, page)
        self._places.close(cell, cell.frame)
        self._spill.poll(but=cell.layer)
        is_open = self._places.open_cells
        if run_is_full(self._plan, len(is_open), len(self._places.standing[cell.layer])):
            self._spill.down(self._places.next_to_leave(cell.layer, self._plan.run_cells))
        if page not in is_open:  # the next page will be opened soon: frames for it are there by then
            self._send_down(self._page_frames - self._places.hbm.free - self._spill.under_way)

    def reopen(self, page: int) -> None:
        """Open frames for a closed page in every layer. ``waves`` still brings what the page held until
        ``reopened``; unpack that into the frames. Raises as ``open`` does."""
        cells = [self._cell(layer, page) for layer in self._layers]
        closed = [cell for cell in cells if cell.closed]
        while True:  # making room may take down what could have been reopened in place
            moved = [cell for cell in closed if not self._places.reopens_in_place(cell, plain=self._plain)]
            frames = len(moved) * self._plan.open.frames + (0 if self._plain else 1 + len(self._places.open_cells))
            if frames <= self._places.hbm.free:
                break
            self._make_room(frames, f"page {page}")
        for cell in closed:
            self._places.reopen(cell, self._plan.open.frames, plain=self._plain)

    def reopened(self, layer: int, page: int) -> None:
        """What the page held in ``layer`` was unpacked, or is not wanted: it is forgotten."""
        cell = self._cell(layer, page)
        if cell.before is not None:
            self._spill.release(self._places.drop(cell.before))
            cell.before = None
            self._places.epochs[cell.layer] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Forget pages; numbers that hold nothing are passed over."""
        for page in pages:
            self._spill.release(self._places.forget(page))
            self._freed = True

    def expect(self, order: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Which ``(layer, pages)`` compute reads from now on, in order, over and over. Where there is room they come
        back to HBM for good; other pages are the first to go down."""
        self._spill.poll()
        items = tuple((self._index[layer], tuple(pages)) for layer, pages in order)
        if self._ring.expect(items) or self._freed:
            self._freed = False
            self._places.expect(items)
            self._bring_back(items)

    def waves(self, layer: int, pages: Sequence[int]) -> Iterator[Wave]:
        """The closed cells of ``pages`` in ``layer``: first what is in place, then the rest as it comes.

        A step back into the iterator says that all compute on the wave before was issued. Raises ``PageLostError``
        with ``(layer, page)`` of cells that cannot be brought back, ``ValueError`` for pages without a closed cell.
        """
        self._check_open()
        self._spill.poll(but=self._index.get(layer, NOWHERE))
        split = self._split(layer, pages)
        if split.streamed:
            return self._stream(layer, split)
        self._ring.visit(self._index[layer], split.pages)
        return iter(split.here)

    def pause(self, pages: Iterable[int]) -> None:
        """Let the closed cells of ``pages`` go down, as far as there is room below."""
        pages = tuple(pages)
        for index, layer in enumerate(self._layers):
            standing = self._places.standing[index]
            cells = [cell for cell in (self._cell(layer, page) for page in pages) if cell in standing]
            for begin in range(0, len(cells), self._plan.run_cells):
                self._spill.down(cells[begin : begin + self._plan.run_cells])

    def resume(self, pages: Iterable[int]) -> None:
        """Bring the cells of ``pages`` back to HBM as far as there is room; the rest streams."""
        pages = tuple(pages)
        self._spill.poll()
        self._bring_back([(index, pages) for index in range(len(self._layers))])

    def usage(self) -> PagerUsage:
        """What is where, and what was moved."""
        # copies: whoever watches a model asks from another thread
        cells = [cell for cells in list(self._places.cells) for cell in list(cells.values())]
        closed = [cell for cell in cells if cell.closed and not cell.lost]
        in_hbm = sum(cell.frame != NOWHERE for cell in closed)
        in_ram = sum(cell.frame == NOWHERE and cell.ram != NOWHERE for cell in closed)
        return PagerUsage(
            open_cells=sum(not cell.closed for cell in cells),
            hbm_cells=in_hbm,
            ram_cells=in_ram,
            nvme_cells=len(closed) - in_hbm - in_ram,
            lost_cells=sum(cell.lost for cell in cells),
            free_frames=self._places.hbm.free,
            frame_nbytes=self._plan.frame_nbytes,
            written_nbytes=self._transport.written_nbytes,
            read_nbytes=self._transport.read_nbytes,
            misses=self._ring.misses,
            stall_seconds=self._ring.stall_seconds,
        )

    def shut(self) -> None:
        """End all that is under way. Idempotent."""
        self._shut = True
        self._ring.close()
        try:
            self._spill.wait_all()
        finally:
            self._transport.close()

    @property
    def _page_frames(self) -> int:
        """Frames that another open page takes. A packed cell needs its frame while its raw ones are still there: one
        for every open page, since the layers of a page close one after another."""
        spare = 0 if self._plain else len(self._places.open_cells) + 1
        return len(self._layers) * self._plan.open.frames + spare

    def _bring_back(self, items: Iterable[tuple[int, tuple[int, ...]]]) -> None:
        """Let cells that would stream come to HBM as far as quotas and free frames allow."""
        quota = min(self._plan.quota, quota_now(self._plan, len(self._places.open_cells)))
        share = (self._places.hbm.free - self._page_frames) // len(self._layers)
        for layer, pages in items:
            room = min(share, quota - len(self._places.standing[layer]) - self._spill.coming(layer))
            if room > 0:
                self._spill.up(self._splitter.split(layer, pages).streamed, room)

    def _stream(self, layer: int, split: Split) -> Iterator[Wave]:
        yield from split.here
        try:
            yield from self._ring.serve(self._index[layer], split.pages, split.streamed)
        except PageLostError:
            self._split(layer, split.pages)  # says it in the caller's words
            raise

    def _check_open(self) -> None:
        if self._shut:
            raise SessionClosedError("pages were asked of a pager that was shut: open a new session")

    def _cell(self, layer: int, page: int) -> Cell:
        try:
            return self._places.cells[self._index[layer]][page]
        except KeyError:
            raise KeyError(f"page {page} of layer {layer} was not opened, or was freed: open it first") from None

    def _split(self, layer: int, pages: Sequence[int]) -> Split:
        split = self._splitter.split(self._index[layer], pages)
        if split.missing:
            raise ValueError(f"pages {list(split.missing)} have no closed cell in layer {layer}: close them first")
        if split.lost:
            raise PageLostError(
                f"pages {list(split.lost)} of layer {layer} were lost: free them and compute them anew",
                cells=[(layer, page) for page in split.lost],
            )
        return split

    def _make_room(self, frames: int, what: str) -> None:
        """Let cells go down until ``frames`` frames are free."""
        hbm, spill, tried = self._places.hbm, self._spill, False
        spill.poll()
        while hbm.free < frames:
            standing = sum(len(cells) for cells in self._places.standing)
            within_reach = hbm.free + spill.under_way + standing >= frames
            started = within_reach and self._send_down(frames - hbm.free - spill.under_way)
            if hbm.free >= frames or spill.wait() or started:
                continue
            if tried or spill.failure is None or not within_reach:
                why = "" if spill.failure is None else f" ({spill.failure})"
                raise CapacityError(
                    f"{what} needs {frames} frames of {self._plan.frame_nbytes} bytes, {hbm.free} of {hbm.count} are "
                    f"free and no cell can go down{why}: end sequences, or raise Budget.kv_hbm or what is below it",
                    of_pages=True,
                ) from spill.failure
            tried, spill.failure = True, None  # a store that was full may have room by now

    def _send_down(self, frames: int) -> bool:
        started = False
        standing = [len(cells) for cells in self._places.standing]
        for descent in make_room(standing, self._plan.run_cells, frames):
            started |= self._spill.down(self._places.next_to_leave(descent.layer, descent.count))
        return started
