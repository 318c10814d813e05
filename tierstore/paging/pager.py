"""The pager: gives open cells their frames, and brings closed cells to compute from wherever they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tierstore.contracts import Buffer, CopyEngine, PageStore
from tierstore.errors import CapacityError, PageLostError
from tierstore.events import Recorder
from tierstore.page_plan import KindPlan
from tierstore.paging.places import NOWHERE, Cell, Places
from tierstore.paging.usage import PagerUsage
from tierstore.paging.waves import Split, Splitter, Wave


class Pager:
    """The cells of all layers of one kind. Compute calls it from one thread; what moves, moves behind its back.

    ``region`` are ``plan.frames`` frames of HBM, ``ring`` ``plan.ring_slots`` slots of ``plan.slot_nbytes`` there,
    ``ram`` ``plan.ram_frames`` frames of pinned host memory, ``staging`` ``plan.staging_slots`` slots of it. Whoever
    made the memory and ``file`` keeps them until after ``shut``. ``page`` is a number that the caller chooses.

    Raises ``KeyError`` for a layer or a page that it does not know.
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
        self.region = region
        self._plan = plan
        self._layers = tuple(layers)
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._plain = plan.kind.plain
        self._open_frames = plan.open.frames
        self._places = Places(len(layers), plan.frames, plan.ram_frames if ram is not None else 0)
        self._splitter = Splitter(self._places, plan.frame_nbytes, region, ram if engine.unified else None)

    def open(self, page: int) -> None:
        """Frames for an open cell in every layer. Whatever the number held before is forgotten.

        Raises ``CapacityError``, with nothing else changed, when cells that stand in the way can go nowhere."""
        self.free((page,))
        # a packed cell needs its frame while the raw ones are still there: one at a time for each page
        spare = 0 if self._plain else len(self._places.open_cells) + 1
        self._make_room(len(self._layers) * self._open_frames + spare, f"page {page}")
        self._places.open(page, self._open_frames)

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

    def reopen(self, page: int) -> None:
        """Open frames for a closed page in every layer. ``waves`` still brings what the page held until
        ``reopened``; unpack that into the frames. Raises as ``open`` does."""
        cells = [cells[page] for cells in self._places.cells]
        closed = [cell for cell in cells if cell.closed]
        spare = 0 if self._plain else len(self._places.open_cells) + 1
        self._make_room(len(closed) * self._open_frames + spare, f"page {page}")
        for cell in closed:
            self._places.reopen(cell, self._open_frames, plain=self._plain)

    def reopened(self, layer: int, page: int) -> None:
        """What the page held in ``layer`` was unpacked, or is not wanted: it is forgotten."""
        cell = self._cell(layer, page)
        if cell.before is not None:
            self._drop(self._places.drop(cell.before))
            cell.before = None
            self._places.epochs[cell.layer] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Forget pages; numbers that hold nothing are passed over."""
        for page in pages:
            self._drop(self._places.forget(page))

    def expect(self, order: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Which ``(layer, pages)`` compute reads from now on, in order, over and over."""

    def waves(self, layer: int, pages: Sequence[int]) -> Iterator[Wave]:
        """The closed cells of ``pages`` in ``layer``: first what is in place, then the rest as it comes.

        A step back into the iterator says that all compute on the wave before was issued. Raises ``PageLostError``
        with ``(layer, page)`` of cells that cannot be brought back, ``ValueError`` for pages without a closed cell.
        """
        return iter(self._split(layer, pages).here)

    def pause(self, pages: Iterable[int]) -> None:
        """Let the closed cells of ``pages`` go down, as far as there is room below."""

    def resume(self, pages: Iterable[int]) -> None:
        """Bring the cells of ``pages`` back to HBM as far as there is room; the rest streams."""

    def usage(self) -> PagerUsage:
        """What is where, and what was moved."""
        cells = [cell for cells in self._places.cells for cell in cells.values()]
        standing = sum(cell.frame != NOWHERE for cell in cells if cell.closed)
        is_open = sum(not cell.closed for cell in cells)
        return PagerUsage(
            open_cells=is_open,
            hbm_cells=standing,
            ram_cells=0,
            nvme_cells=0,
            lost_cells=0,
            free_frames=self._places.hbm.free,
            hbm_nbytes=standing * self._plan.frame_nbytes,
            ram_nbytes=0,
            nvme_nbytes=0,
            written_nbytes=0,
            read_nbytes=0,
            misses=0,
            stall_seconds=0.0,
        )

    def shut(self) -> None:
        """End all that is under way. Idempotent."""

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

    def _drop(self, cells: Iterable[Cell]) -> None:
        for _ in cells:
            pass

    def _make_room(self, frames: int, what: str) -> None:
        if self._places.hbm.free < frames:
            raise CapacityError(
                f"{what} needs {frames} frames of {self._plan.frame_nbytes} bytes, {self._places.hbm.free} of "
                f"{self._plan.frames} are free: end sequences or raise Budget.kv_hbm"
            )
