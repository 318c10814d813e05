"""A pager over an adversary and a page store that is late, full, broken or forgetful, as a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import torch

from tierstore.contracts import Buffer, CellRead, CopyEngine, Fence, PageStore
from tierstore.errors import PageLostError, StoreError, StoreFullError, TierstoreError
from tierstore.events import Event
from tierstore.page_plan import KindPlan, OpenLayout, PageKind
from tierstore.paging.pager import Pager
from tierstore.testing.adversary import AdversaryEngine

GARBAGE = 0xEE

TIERS = [(0, 0), (30, 0), (0, 200), (7, 200)]
"""Frames in RAM and cells in the store."""


class Late:
    """Work that is done when somebody waits for it, or by chance when somebody asks."""

    def __init__(self, work: Callable[[], None], random: Random) -> None:
        self._work: Callable[[], None] | None = work
        self._random = random
        self._error: TierstoreError | None = None
        self._lock = threading.RLock()

    def done(self) -> bool:
        with self._lock:
            if self._work is not None and self._random.random() < 0.3:
                self._run()
            return self._work is None

    def wait(self) -> None:
        with self._lock:
            self._run()
        if self._error is not None:
            raise self._error

    gate = wait

    def _run(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            try:
                work()
            except TierstoreError as error:
                self._error = error


class Mark:
    """A mark of ``Clocked``: it comes after all compute up to its ``time``."""

    def __init__(self, fence: Fence, time: int) -> None:
        self._fence = fence
        self.time = time
        self.waited = False

    def done(self) -> bool:
        self.waited = self.waited or self._fence.done()
        return self.waited

    def wait(self) -> None:
        self._fence.wait()
        self.waited = True

    def gate(self) -> None:
        self._fence.gate()


class Clocked:
    """``engine``, which also sees whether what moves bytes of ``region`` comes after the compute that used them.

    Compute is what a test says with ``touch``. The adversary does not see that: it computes at once."""

    def __init__(self, engine: CopyEngine, region: torch.Tensor, frame_nbytes: int) -> None:
        self._engine = engine
        self._region = region
        self._frame_nbytes = frame_nbytes
        self._time = 0
        self._touched: dict[int, int] = {}
        self._marks: list[Mark] = []
        self._over = 0  # the host knows that compute up to this time is over
        self.unified = engine.unified
        self.faults: list[str] = []

    def touch(self, frame: int) -> None:
        self._time += 1
        self._touched[frame] = self._time

    def mark(self) -> Fence:
        self._marks.append(Mark(self._engine.mark(), self._time))
        return self._marks[-1]

    def copy(self, pairs: Sequence[tuple[Buffer, Buffer]], *, after: Sequence[Fence] = ()) -> Fence:
        times = [fence.time for fence in after if isinstance(fence, Mark)]
        for pair in pairs:
            for buffer in pair:
                self._check(buffer, max(times, default=0), "copied")
        return self._engine.copy(pairs, after=after)

    def check_read(self, into: Buffer) -> None:
        """The host reads into ``into`` at once."""
        self._over = max([self._over, *(mark.time for mark in self._marks if mark.done())])
        self._check(into, self._over, "read into")

    def close(self) -> None:
        self._engine.close()

    def check(self) -> None:
        assert not self.faults, self.faults
        if isinstance(self._engine, AdversaryEngine):
            self._engine.check()

    def _check(self, buffer: Buffer, time: int, how: str) -> None:
        start = buffer.data_ptr() - self._region.data_ptr()
        if 0 <= start < self._region.numel():
            for frame in range(start // self._frame_nbytes, (start + buffer.numel()) // self._frame_nbytes):
                if self._touched.get(frame, 0) > time:
                    self.faults.append(f"frame {frame} is {how} before the compute that uses it is over")


@dataclass(eq=False)
class FakeRun:
    cells: int
    fence: Fence
    data: dict[int, torch.Tensor] = field(default_factory=dict)
    freed: set[int] = field(default_factory=set)


class FakeStore:
    """A page store in memory. ``full``: puts fail at once; ``failing``: later; ``broken``: reads fail."""

    def __init__(self, cell_nbytes: int, capacity: int, random: Random, engine: Clocked) -> None:
        self.engine = engine
        self.cell_nbytes = cell_nbytes
        self.capacity = capacity
        self.capacity_nbytes = capacity * cell_nbytes
        self.written_nbytes = 0
        self.random = random
        self.runs: list[FakeRun] = []
        self.full = self.failing = self.broken = False
        self.reads: list[tuple[int, int]] = []
        self.busy = threading.Lock()

    @property
    def used(self) -> int:
        return sum(run.cells - len(run.freed) for run in self.runs)

    def put(self, cells: int, data: Buffer, *, after: Sequence[Fence] = ()) -> FakeRun:
        assert self.busy.acquire(blocking=False), "one thread at a time"
        try:
            bytes_ = cast(torch.Tensor, data)
            assert cells > 0
            assert bytes_.numel() == cells * self.cell_nbytes
            if self.full or self.used + cells > self.capacity:
                raise StoreFullError("the store is full")
            fails = self.failing

            def write() -> None:
                for fence in after:
                    fence.wait()
                if fails:
                    raise StoreFullError("the disk is full")
                for cell in range(cells):
                    if cell not in run.freed:
                        run.data[cell] = bytes_[cell * self.cell_nbytes : (cell + 1) * self.cell_nbytes].clone()
                self.written_nbytes += bytes_.numel()

            run = FakeRun(cells, Late(write, self.random))
            self.runs.append(run)
            return run
        finally:
            self.busy.release()

    def read(self, requests: Sequence[CellRead]) -> Fence:
        assert self.busy.acquire(blocking=False), "one thread at a time"
        try:
            for request in requests:
                run = cast(FakeRun, request.run)
                cells = range(request.first, request.first + request.count)
                assert request.into.numel() == request.count * self.cell_nbytes
                if run.freed.intersection(cells):
                    raise StoreError("a freed cell was asked for")
                assert run.fence.done()
                self.engine.check_read(request.into)
                cast(torch.Tensor, request.into).fill_(GARBAGE)
            broken = self.broken

            def bring() -> None:
                lost = []
                if broken:
                    raise StoreError("the disk is broken")
                for request in requests:
                    run = cast(FakeRun, request.run)
                    self.reads.append((request.first, request.count))
                    for index in range(request.count):
                        found = run.data.get(request.first + index)
                        if found is None:
                            lost.append((run, request.first + index))
                        else:
                            start = index * self.cell_nbytes
                            cast(torch.Tensor, request.into)[start : start + self.cell_nbytes].copy_(found)
                if lost:
                    raise PageLostError("cells are missing", cells=lost)

            return Late(bring, self.random)
        finally:
            self.busy.release()

    def free(self, run: object, cell: int) -> None:
        assert self.busy.acquire(blocking=False), "one thread at a time"
        found = cast(FakeRun, run)
        assert cell not in found.freed, "a cell is freed once"
        found.freed.add(cell)
        found.data.pop(cell, None)
        if len(found.freed) == found.cells:
            self.runs.remove(found)
        self.busy.release()

    def close(self) -> None:
        self.runs.clear()


def make_plan(
    *,
    layers: int = 3,
    frames: int,
    quota: int,
    run_cells: int = 2,
    ring_slots: int = 2,
    staging_slots: int = 2,
    ram_frames: int = 0,
    nvme_slots: int = 0,
    plain: bool = False,
    frame_nbytes: int = 64,
) -> KindPlan:
    kind = PageKind(tuple(range(layers)), None, 4, frame_nbytes, 8 if plain else 16, 8 if plain else 16, plain)
    layout = OpenLayout(1, 4, 2, (0, 32)) if plain else OpenLayout(1, 4, 1, (0, 0))
    return KindPlan(
        kind=kind,
        open=layout,
        frame_nbytes=frame_nbytes,
        frames=frames,
        quota=quota,
        open_pages=1,
        run_cells=run_cells,
        ring_slots=ring_slots,
        staging_slots=staging_slots,
        ram_frames=ram_frames,
        nvme_slots=nvme_slots,
        pages=1000,
    )


class PagerBench:
    """A pager, and what it should hold: ``truth`` of closed cells, ``raw`` of open ones."""

    def __init__(
        self,
        plan: KindPlan,
        seed: int,
        *,
        engine: CopyEngine | None = None,
        discrete: bool = True,
        file: PageStore | None = None,
    ) -> None:
        self.plan = plan
        self.random = Random(seed)
        self.events: list[Event] = []
        self.generator = torch.Generator().manual_seed(seed)
        self.region = torch.full((plan.region_nbytes,), GARBAGE, dtype=torch.uint8)
        inner = engine if engine is not None else AdversaryEngine(seed, discrete=discrete)
        self.engine = Clocked(inner, self.region, plan.frame_nbytes)
        staged = not self.engine.unified and plan.nvme_slots > 0
        self.ring = torch.full((plan.ring_nbytes,), GARBAGE, dtype=torch.uint8)
        self.ram = torch.full((plan.ram_nbytes,), GARBAGE, dtype=torch.uint8) if plan.ram_frames else None
        self.staging = torch.full((plan.staging_nbytes,), GARBAGE, dtype=torch.uint8) if staged else None
        self.store = (
            FakeStore(plan.frame_nbytes, plan.nvme_slots, self.random, self.engine) if plan.nvme_slots else None
        )
        self.layers = plan.kind.layers
        self.pager = Pager(
            plan,
            layers=self.layers,
            region=self.region,
            ring=self.ring,
            ram=self.ram,
            staging=self.staging,
            file=file or self.store,
            engine=self.engine,
            recorder=self.events.append,
        )
        self.truth: dict[tuple[int, int], torch.Tensor] = {}
        self.raw: dict[tuple[int, int], torch.Tensor] = {}

    def frame(self, number: int) -> torch.Tensor:
        """A frame, to be computed with."""
        self.engine.touch(number)
        nbytes = self.plan.frame_nbytes
        return self.region[number * nbytes : (number + 1) * nbytes]

    def bytes_(self, count: int = 1) -> torch.Tensor:
        shape = (count * self.plan.frame_nbytes,)
        return torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8)

    def open(self, page: int) -> None:
        """Open a page and write to all of its frames."""
        for layer in self.layers:
            self.truth.pop((layer, page), None)
            self.raw.pop((layer, page), None)
        self.pager.open(page)
        for layer in self.layers:
            self.write(layer, page)

    def write(self, layer: int, page: int) -> None:
        frames = self.pager.frames(layer, page)
        data = self.raw[layer, page] = self.bytes_(len(frames))
        for part, frame in zip(data.view(len(frames), -1), frames, strict=True):
            self.frame(frame).copy_(part)

    def check_open(self, layer: int, page: int) -> None:
        frames = self.pager.frames(layer, page)
        for part, frame in zip(self.raw[layer, page].view(len(frames), -1), frames, strict=True):
            assert torch.equal(self.frame(frame), part)

    def close(self, page: int, layers: Iterable[int] | None = None) -> None:
        for layer in self.layers if layers is None else layers:
            self.check_open(layer, page)
            frame = self.pager.close(layer, page)
            if self.plan.kind.plain:
                self.truth[layer, page] = self.raw[layer, page]
            else:
                self.truth[layer, page] = self.bytes_()
                self.frame(frame).copy_(self.truth[layer, page])
            self.pager.closed(layer, page)

    def add(self, *pages: int) -> None:
        for page in pages:
            self.open(page)
            self.close(page)

    def read(self, layer: int, pages: Sequence[int]) -> int:
        """Read closed cells and compare them; how many waves it took."""
        seen: list[int] = []
        waves = 0
        for wave in self.pager.waves(layer, pages):
            waves += 1
            for page, offset in zip(wave.pages, wave.offsets, strict=True):
                buffer = cast(torch.Tensor, wave.buffer)
                if buffer is self.region:
                    self.engine.touch(offset // self.plan.frame_nbytes)
                assert torch.equal(buffer[offset : offset + self.plan.frame_nbytes], self.truth[layer, page])
            seen += wave.pages
        assert sorted(seen) == sorted(set(pages))
        return waves

    def read_all(self, pages: Sequence[int], *, expect: bool = True) -> None:
        """One pass over the layers."""
        if expect:
            self.pager.expect([(layer, tuple(pages)) for layer in self.layers])
        for layer in self.layers:
            self.read(layer, pages)

    def in_hbm(self, layer: int, pages: Iterable[int]) -> list[int]:
        """Which of ``pages`` are read from HBM where they are."""
        cells = self.pager._places.cells[layer]
        return [page for page in pages if cells[page].closed and cells[page].frame >= 0]

    def settle(self) -> None:
        """Let every move end."""
        self.pager._spill.wait_all()

    def free(self, pages: Iterable[int]) -> None:
        pages = tuple(pages)
        self.pager.free(pages)
        for page in pages:
            for layer in self.layers:
                self.truth.pop((layer, page), None)
                self.raw.pop((layer, page), None)

    def end(self) -> None:
        """Free everything: all frames must be free, nothing be left below, and no fence have been missing."""
        self.free({page for _, page in [*self.truth, *self.raw]})
        self.pager.shut()
        assert self.pager.usage().free_frames == self.plan.frames
        assert self.pager._places.ram.free == (self.plan.ram_frames if self.ram is not None else 0)
        assert self.pager._ring._slots.free == self.pager._ring._slots.count
        assert self.store is None or not self.store.runs
        self.engine.check()


def bench(
    tiers: tuple[int, int],
    seed: int = 0,
    *,
    discrete: bool = True,
    plain: bool = False,
    engine: CopyEngine | None = None,
    **plan: Any,
) -> PagerBench:
    ram_frames, nvme_slots = tiers
    frames = plan.pop("frames", 14 if sum(tiers) else 60)
    made = make_plan(
        frames=frames, quota=plan.pop("quota", 2), ram_frames=ram_frames, nvme_slots=nvme_slots, plain=plain, **plan
    )
    return PagerBench(made, seed, discrete=discrete, engine=engine)
