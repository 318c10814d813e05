"""Moves the bytes of closed cells between HBM frames, RAM frames and the page store, and says when they are there."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

from tierstore.contracts import Buffer, CellRead, CopyEngine, Fence, PageRun, PageStore
from tierstore.errors import StoreError
from tierstore.events import Recorder
from tierstore.fences import Over, Promise, wait_for_end
from tierstore.page_plan import KindPlan
from tierstore.paging.places import NOWHERE, Cell
from tierstore.paging.slots import Slots
from tierstore.paging.staging import StagedReads
from tierstore.paging.stretches import joined, stretches
from tierstore.trips import TripLog


class Transport:
    """``down_to_*`` start from HBM frames, once compute issued so far is over; ``up`` ends at any bytes of HBM.

    Where compute reads host memory, cells of a run pass through a slot of the ring on their way down, and come
    back without a stop; elsewhere both go through ``staging``.
    """

    def __init__(
        self,
        plan: KindPlan,
        runs_a_fetch: int,
        *,
        region: Buffer,
        ring: Slots,
        ram: Buffer | None,
        staging: Buffer | None,
        file: PageStore | None,
        engine: CopyEngine,
        recorder: Recorder,
    ) -> None:
        self._frame_nbytes = plan.frame_nbytes
        self._region = region
        self._ram = ram
        self._file = file
        self._engine = engine
        self._trips = TripLog(recorder)
        self._file_turn = Lock()  # the staging thread reads, compute writes
        self._from_ram: list[Fence] = []  # copies that read RAM frames, and are not known to be over
        self._staged: StagedReads | None = None
        self._bounce = ring
        if file is not None and not engine.unified:
            if staging is None:
                raise ValueError("pages of a device that is not unified pass through staging memory: give some")
            nbytes = runs_a_fetch * plan.slot_nbytes
            self._bounce = Slots(staging, plan.staging_slots // runs_a_fetch, nbytes)
            self._staged = StagedReads(self._bounce, plan.frame_nbytes, self._read, engine, self._trips)
        self.written_nbytes = 0
        self.read_nbytes = 0

    @property
    def has_store(self) -> bool:
        """Whether cells can go to a page store."""
        return self._file is not None

    @property
    def needs_ring(self) -> bool:
        """Whether cells pass through a slot of the ring on their way to the store."""
        return self._staged is None

    def up(self, cells: Sequence[Cell], buffer: Buffer, offsets: Sequence[int], after: Sequence[Fence]) -> Fence:
        """Bring cells that are all in RAM, or else all in the store, to ``buffer`` at ``offsets``, after ``after``.

        The fence raises what the store raised."""
        nbytes = len(cells) * self._frame_nbytes
        self.read_nbytes += nbytes
        if cells[0].ram != NOWHERE and self._ram is not None:
            froms = [cell.ram * self._frame_nbytes for cell in cells]
            pairs = self._pairs(self._ram, froms, buffer, offsets)
            copied = self._trips.begin(self._engine.copy(pairs, after=after), "ram->hbm", nbytes)
            self._from_ram = [fence for fence in self._from_ram if not fence.done()]
            self._from_ram.append(copied)
            return copied
        if self._staged is not None:
            return self._staged.bring(cells, buffer, offsets, after)
        wait_for_end(after)
        reads = [
            CellRead(run, first, count, buffer[at : at + count * self._frame_nbytes])
            for run, first, count, at in stretches(cells, offsets, self._frame_nbytes)
        ]
        return self._trips.begin(self._read(reads), "nvme->hbm", nbytes)

    def up_to_frames(self, cells: Sequence[Cell], frames: Sequence[int]) -> Fence:
        """``up``, to HBM frames that compute issued so far may still use."""
        return self.up(cells, self._region, [frame * self._frame_nbytes for frame in frames], (self._engine.mark(),))

    def down_to_ram(self, cells: Sequence[Cell], frames: Sequence[int]) -> Fence:
        """Copy cells to RAM frames; what still reads these comes first."""
        if self._ram is None:
            raise AssertionError("there are no RAM frames without RAM")
        froms = [cell.frame * self._frame_nbytes for cell in cells]
        tos = [frame * self._frame_nbytes for frame in frames]
        after = [self._engine.mark(), *(Over((fence,)) for fence in self._from_ram)]
        copied = self._engine.copy(self._pairs(self._region, froms, self._ram, tos), after=after)
        return self._trips.begin(copied, "hbm->ram", len(cells) * self._frame_nbytes)

    def down_to_store(self, cells: Sequence[Cell]) -> tuple[PageRun, Fence] | None:
        """Write cells as a run. None where there is no slot to pass through; raises ``StoreFullError`` at once."""
        if self._file is None:
            raise AssertionError("cells go to the store only where there is one")
        taken = self._bounce.take(block=not self.needs_ring)
        if taken is None:
            return None
        slot, after = taken
        nbytes, gathered, both = len(cells) * self._frame_nbytes, Promise(), Promise()
        try:
            with self._file_turn:  # first, so that a store without room costs no copy
                run = self._file.put(len(cells), self._bounce.part(slot, 0, nbytes), after=[gathered])
        except BaseException:
            self._bounce.give_back(slot, after)
            raise
        both.keep([gathered, self._trips.begin(run.fence, "hbm->nvme", nbytes)])  # a run may fail before it is there
        self._bounce.give_back(slot, (both, *after))
        self._gather(cells, slot, after, gathered)
        self.written_nbytes += nbytes
        return run, both

    def free(self, run: PageRun, at: int) -> None:
        """The store may forget a cell."""
        if self._file is not None:
            with self._file_turn:
                self._file.free(run, at)

    def close(self) -> None:
        """Wait for what is under way, and end the thread. Idempotent."""
        if self._staged is not None:
            self._staged.close()
        self._trips.drain()

    def _gather(self, cells: Sequence[Cell], slot: int, after: Sequence[Fence], gathered: Promise) -> None:
        froms = [cell.frame * self._frame_nbytes for cell in cells]
        tos = [slot * self._bounce.nbytes + index * self._frame_nbytes for index in range(len(cells))]
        pairs = self._pairs(self._region, froms, self._bounce.buffer, tos)
        try:
            gathered.keep([self._engine.copy(pairs, after=[self._engine.mark(), *after])])
        except BaseException as error:
            gathered.keep((), error)  # it comes out of the run's fence
            if not isinstance(error, Exception):
                raise

    def _read(self, requests: Sequence[CellRead]) -> Fence:
        if self._file is None:
            raise StoreError("there is no page store to read from")
        with self._file_turn:
            return self._file.read(requests)

    def _pairs(
        self, source: Buffer, froms: Sequence[int], target: Buffer, tos: Sequence[int]
    ) -> list[tuple[Buffer, Buffer]]:
        return [
            (source[start : start + nbytes], target[to : to + nbytes])
            for start, to, nbytes in joined(froms, tos, self._frame_nbytes)
        ]
