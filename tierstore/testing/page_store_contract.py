"""What every ``PageStore`` must do. Derive, override the ``opened`` fixture, and pytest runs the rest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.contracts import CellRead, Fence, PageRun, PageStore
from tierstore.errors import StoreError, StoreFullError
from tierstore.testing.store_contract import open_descriptors

GUARD = 0xA5
_SPACE = 64  # bytes between what a test reads


class HeldFence:
    """Complete once ``released`` is set, and then fails with ``error`` where there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reached, self.released, self.error = threading.Event(), threading.Event(), error

    def done(self) -> bool:
        return self.released.is_set()

    def wait(self) -> None:
        self.reached.set()
        self.released.wait()
        if self.error is not None:
            raise self.error

    gate = wait


def cells_of(store: PageStore, cells: int, seed: int, phase: int = 0) -> torch.Tensor:
    """Bytes for so many cells, in memory that begins ``phase`` behind a multiple of 4096."""
    nbytes = cells * store.cell_nbytes
    room = torch.empty(nbytes + 2 * 4096, dtype=torch.uint8)
    start = (phase - room.data_ptr()) % 4096
    into = room[start : start + nbytes]
    return into.copy_(torch.frombuffer(bytearray(Random(seed).randbytes(nbytes) or b"."), dtype=torch.uint8)[:nbytes])


def _cells(store: PageStore, data: torch.Tensor) -> dict[int, torch.Tensor]:
    return dict(enumerate(data.reshape(-1, store.cell_nbytes)))


@dataclass
class _Model:
    """What a store must hold."""

    store: PageStore
    held: dict[PageRun, dict[int, torch.Tensor]] = field(default_factory=dict)

    def put(self, cells: int, data: torch.Tensor) -> None:
        try:
            run = self.store.put(cells, data)
        except StoreFullError:
            assert self.held, "a store without cells has room"
            return
        run.fence.wait()
        assert run.cells == cells
        if cells:
            self.held[run] = _cells(self.store, data)

    def free(self, run: PageRun, cell: int) -> None:
        self.store.free(run, cell)
        del self.held[run][cell]
        if not self.held[run]:
            del self.held[run]

    def stretches(self) -> Iterator[tuple[PageRun, int, int]]:
        """Neighbouring cells that are held, as many as there are."""
        for run, cells in self.held.items():
            first = None
            for number in range(run.cells + 1):
                if number in cells:
                    first = number if first is None else first
                elif first is not None:
                    yield run, first, number - first
                    first = None

    def read(self, wanted: Sequence[tuple[PageRun, int, int]], random: Random) -> None:
        """Read in one go, to any address, and look at the bytes around them too."""
        sizes = [count * self.store.cell_nbytes for _, _, count in wanted]
        ground = torch.full((sum(sizes) + (len(sizes) + 1) * (4096 + _SPACE),), GUARD, dtype=torch.uint8)
        truth, requests, at = ground.clone(), [], random.randrange(_SPACE)
        for (run, first, count), nbytes in zip(wanted, sizes, strict=True):
            phase = random.choice([0, first * self.store.cell_nbytes - at - ground.data_ptr(), 1])
            at += phase % 4096
            requests.append(CellRead(run, first, count, ground[at : at + nbytes]))
            for number in range(count):
                start = at + number * self.store.cell_nbytes
                truth[start : start + self.store.cell_nbytes] = self.held[run][first + number]
            at += nbytes + random.choice([0, 1])
        random.shuffle(requests)
        self.store.read(requests).wait()
        assert torch.equal(ground, truth)


class PageStoreContract:
    """Laws of ``PageStore``."""

    @pytest.fixture
    def opened(self) -> Iterator[PageStore]:
        """An empty store with room for 16 runs of one cell at least; closes it after the test."""
        raise NotImplementedError("override opened")

    @pytest.fixture(autouse=True)
    def before(self) -> tuple[set[threading.Thread], set[str]]:
        """Threads and descriptors there were before the store was opened."""
        return set(threading.enumerate()), open_descriptors()

    def test_keeps_what_is_put(self, opened: PageStore) -> None:
        @settings(deadline=None, max_examples=15)
        @given(seed=st.integers(0, 2**32 - 1), steps=st.lists(st.sampled_from("pppffr"), max_size=25))
        def law(seed: int, steps: list[str]) -> None:
            random, model = Random(seed), _Model(opened)
            before = opened.written_nbytes
            for step in steps:
                if step == "p":
                    cells = random.choice([0, 1, 1, 2, 3, 7])
                    model.put(cells, cells_of(opened, cells, random.randrange(1 << 30), random.choice([0, 64, 1])))
                elif step == "f" and model.held:
                    run = random.choice(list(model.held))
                    model.free(run, random.choice(list(model.held[run])))
                elif step == "r":
                    every = list(model.stretches())
                    model.read([random.choice(every) for _ in every] + every[:1], random)
            model.read(list(model.stretches()), random)
            assert opened.written_nbytes >= before
            for run in list(model.held):
                for cell in list(model.held[run]):
                    model.free(run, cell)

        law()

    def test_counts_what_is_written_and_never_takes_more_than_its_capacity(self, opened: PageStore) -> None:
        runs, before = list[PageRun](), opened.written_nbytes
        data = cells_of(opened, 1, 1)
        with suppress(StoreFullError):
            for _ in range(opened.capacity_nbytes // opened.cell_nbytes + 1):
                runs.append(opened.put(1, data))
        for run in runs:
            run.fence.wait()
        assert 16 <= len(runs) <= opened.capacity_nbytes // opened.cell_nbytes
        assert opened.written_nbytes - before == len(runs) * opened.cell_nbytes
        opened.free(runs[3], 0)  # one goes, one comes
        runs[3] = opened.put(1, cells_of(opened, 1, 2))
        runs[3].fence.wait()
        with pytest.raises(StoreFullError):
            opened.put(1, data)
        model = _Model(opened, {run: {0: data} for run in runs} | {runs[3]: {0: cells_of(opened, 1, 2)}})
        model.read(list(model.stretches()), Random(0))

    def test_many_writes_and_reads_under_way(self, opened: PageStore) -> None:
        for turn in range(5):
            put = [(opened.put(2, data), data) for data in (cells_of(opened, 2, seed + turn) for seed in range(5))]
            reads = []
            for run, data in put:
                run.fence.wait()
                into = torch.zeros_like(data)
                reads.append((opened.read([CellRead(run, 0, 2, into)]), into, data))
                for cell in range(2):
                    opened.free(run, cell)
            for fence, into, data in reversed(reads):
                fence.wait()
                assert torch.equal(into, data)

    def test_waits_for_what_a_run_comes_after(self, opened: PageStore) -> None:
        held, data = HeldFence(), cells_of(opened, 2, 1)
        late, truth = torch.full_like(data, GUARD), data
        run = opened.put(2, late, after=[held])
        held.reached.wait()
        try:
            assert not run.fence.done()
            with pytest.raises(StoreError):  # it is not there yet
                opened.read([CellRead(run, 0, 2, torch.empty_like(data))])
            late.copy_(truth)
        finally:
            held.released.set()
        run.fence.wait()
        _Model(opened, {run: _cells(opened, truth)}).read([(run, 0, 2)], Random(0))

    def test_what_did_not_come_is_not_put_and_harms_nobody(self, opened: PageStore) -> None:
        held, data = HeldFence(ValueError("the copy failed")), cells_of(opened, 1, 1)
        held.released.set()
        bad, good = opened.put(1, data, after=[held]), opened.put(1, data)
        for wait in (bad.fence.wait, bad.fence.gate):
            with pytest.raises(StoreError, match="the copy failed"):
                wait()
        assert bad.fence.done()
        good.fence.wait()
        with pytest.raises(StoreError):
            opened.read([CellRead(bad, 0, 1, torch.empty_like(data))])
        opened.free(bad, 0)
        _Model(opened, {good: {0: data}}).read([(good, 0, 1)], Random(0))

    def test_nothing_is_put_and_read_at_once(self, opened: PageStore) -> None:
        nothing = torch.empty(0, dtype=torch.uint8)
        run = opened.put(0, nothing)
        for fence in (run.fence, opened.read([]), opened.read([CellRead(run, 0, 0, nothing)])):
            assert isinstance(fence, Fence)
            fence.wait()
            assert fence.done()
        with pytest.raises(StoreError):
            opened.free(run, 0)

    def test_refuses_what_is_not_there(self, opened: PageStore) -> None:
        data = cells_of(opened, 2, 1)
        run = opened.put(2, data)
        run.fence.wait()
        into = torch.full_like(data, GUARD)
        one = into[: opened.cell_nbytes]
        opened.free(run, 1)
        wrong: list[Callable[[], object]] = [
            lambda: opened.read([CellRead(run, 0, 2, into)]),  # freed
            lambda: opened.free(run, 1),  # twice
            lambda: opened.free(run, 2),
            lambda: opened.free(run, -1),
            lambda: opened.read([CellRead(run, -1, 1, one)]),
            lambda: opened.read([CellRead(run, 2, 1, one)]),
            lambda: opened.read([CellRead(run, 0, -1, one)]),
            lambda: opened.read([CellRead(run, 0, 1, into)]),  # another size
            lambda: opened.read([CellRead(run, 0, 1, into[::2])]),
            lambda: opened.put(1, data),
            lambda: opened.put(-1, data),
            lambda: opened.put(1, data[::2]),
        ]
        for call in wrong:
            with pytest.raises(StoreError):
                call()
        assert bool((into == GUARD).all())
        opened.free(run, 0)
        for call in (lambda: opened.free(run, 0), lambda: opened.read([CellRead(run, 0, 1, one)])):
            with pytest.raises(StoreError):
                call()

    def test_close_is_idempotent_and_leaves_no_thread_and_no_descriptor(
        self, opened: PageStore, before: tuple[set[threading.Thread], set[str]]
    ) -> None:
        data = cells_of(opened, 1, 1)
        runs = [opened.put(1, data) for _ in range(16)]
        runs[0].fence.wait()
        reads = [opened.read([CellRead(runs[0], 0, 1, torch.empty_like(data))]) for _ in range(50)]
        for _ in range(2):
            opened.close()
            with pytest.raises(StoreError):
                opened.put(1, data)
            with pytest.raises(StoreError):
                opened.read([CellRead(runs[0], 0, 1, torch.empty_like(data))])
        for fence in [run.fence for run in runs] + reads:
            assert fence.done()
            try:
                fence.wait()
            except StoreError:
                continue
        assert set(threading.enumerate()) - before[0] == set()
        assert open_descriptors() - before[1] == set()
