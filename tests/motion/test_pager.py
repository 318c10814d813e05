"""The pager brings every byte of every cell, whatever moved and whatever failed, and loses no frame."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.motion.pager_bench import FakeRun, PagerBench, make_plan
from tierstore.contracts import CopyEngine
from tierstore.copies.cpu import CpuCopyEngine
from tierstore.errors import CapacityError, PageLostError, SessionClosedError, StoreError, StoreFullError
from tierstore.events import Missed, Moved
from tierstore.paging.going_down import make_room
from tierstore.stores.page_file import PageFile

TIERS = [(0, 0), (30, 0), (0, 200), (7, 200)]
"""Frames in RAM and cells in the store."""


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


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("tiers", TIERS)
def test_growing_sequence_is_read_right(tiers: tuple[int, int], plain: bool, discrete: bool) -> None:
    for seed in range(2):
        made = bench(tiers, seed, plain=plain, discrete=discrete)
        pages: list[int] = []
        for page in range(8):
            made.add(page)
            pages.append(page)
            made.read_all(pages)
            made.read_all(pages)
        made.end()


@pytest.mark.parametrize("discrete", [True, False])
def test_growing_sequence_passes_through_a_page_file(tmp_path: Path, discrete: bool) -> None:
    plan = make_plan(frames=28, quota=2, run_cells=3, ring_slots=17, staging_slots=9, nvme_slots=300, frame_nbytes=6208)
    with closing(PageFile(tmp_path, cell_nbytes=6208, capacity_nbytes=4 << 20)) as file:
        made = PagerBench(plan, 0, discrete=discrete, file=file)
        for page in range(24):
            made.add(page)
            made.read_all(range(page + 1))
        made.free(range(3, 9))
        made.add(*range(30, 36))
        for _ in range(3):
            made.read_all([*range(3), *range(9, 24), *range(30, 36)])
        assert made.pager.usage().nvme_cells > 40
        made.end()
        assert file.free_nbytes == file.capacity_nbytes


@pytest.mark.parametrize("tiers", [(0, 200), (200, 0)])
def test_every_streamed_cell_is_fetched_once_a_pass_and_none_is_missed(tiers: tuple[int, int]) -> None:
    made = bench(tiers, engine=CpuCopyEngine() if tiers[1] else None, ring_slots=4, frames=24)
    pages = list(range(8))
    made.add(*pages)
    made.settle()
    for _ in range(2):
        made.read_all(pages)
    before, events = made.pager.usage(), len(made.events)
    for _ in range(20):
        made.read_all(pages)
    after = made.pager.usage()
    down = after.nvme_cells + (after.ram_cells if tiers[0] else 0)
    assert down > 8
    assert after.misses == before.misses
    # give or take what is in the ring, and what was seen to have come late
    moved = sum(event.nbytes for event in made.events[events:] if isinstance(event, Moved)) // 64
    assert abs(moved - 20 * down) <= 3 * made.plan.ring_slots * made.plan.run_cells
    made.end()


@pytest.mark.parametrize("tiers", [(0, 200), (200, 0)])
def test_nothing_is_missed_while_a_sequence_grows_and_cells_leave(tiers: tuple[int, int]) -> None:
    made = bench(tiers, ring_slots=6, frames=40, quota=5)
    for page in range(12):
        made.add(page)
        made.read_all(range(page + 1))
        made.read_all(range(page + 1))
    made.pager.pause([0])
    made.settle()
    made.read_all(range(12))
    made.read_all(range(12))
    assert made.pager.usage().misses == 0
    made.end()


def test_cells_are_written_down_at_most_once_in_whole_runs() -> None:
    made = bench((0, 200), engine=CpuCopyEngine(), frames=40, run_cells=3)
    assert made.store is not None
    made.add(*range(12))
    made.settle()
    assert {run.cells for run in made.store.runs} == {3}
    for _ in range(3):
        made.pager.pause(range(12))
        made.settle()
        assert made.pager.usage().hbm_cells == 0
        made.pager.resume(range(12))
        made.settle()
        assert made.pager.usage().hbm_cells > 0
        made.read_all(range(12))
    assert made.store.written_nbytes == 12 * 3 * 64 == made.pager.usage().written_nbytes
    made.end()


def test_those_that_closed_first_stay() -> None:
    made = bench((0, 200), engine=CpuCopyEngine(), quota=4, frames=3 * (4 + 2 + 2) + 4)
    made.add(*range(12))
    made.settle()
    for layer in made.layers:
        (wave,) = made.pager.waves(layer, range(4))
        assert wave.buffer is made.region
    made.end()


@pytest.mark.parametrize("tiers", [(200, 0), (0, 200)])
def test_pages_that_nobody_reads_go_down_first_and_those_that_are_read_come_back(tiers: tuple[int, int]) -> None:
    made = bench(tiers, quota=4, frames=3 * (4 + 2 + 2) + 4)
    made.add(*range(4))
    for page in range(10, 18):
        made.add(page)
        made.read_all(range(10, page + 1))
        made.settle()
    for layer in made.layers:
        assert made.in_hbm(layer, range(4)) == []
        assert made.in_hbm(layer, range(10, 18))[:4] == [10, 11, 12, 13]
    made.free(range(10, 13))
    made.read_all(range(13, 18))
    made.settle()
    for layer in made.layers:
        assert len(made.in_hbm(layer, range(13, 18))) == 4
    made.read_all(range(13, 18))
    made.read_all([*range(4), *range(13, 18)])
    made.end()


def test_quotas_shrink_evenly_for_open_pages() -> None:
    made = bench((0, 200), quota=6, frames=24)
    made.add(*range(5))
    for page in range(10, 13):
        made.open(page)
    standing = [len(cells) for cells in made.pager._places.standing]
    assert max(standing) - min(standing) <= made.plan.run_cells
    made.read_all(range(5))
    made.end()


@pytest.mark.parametrize("how", ["full", "failing"])
def test_full_store_leaves_cells_where_they_are(how: str) -> None:
    made = bench((0, 200), frames=18)
    assert made.store is not None
    setattr(made.store, how, True)
    made.add(0, 1)
    made.open(2)
    with pytest.raises(CapacityError, match=r"page 3 needs 8 frames of 64 bytes, \d+ of 18") as caught:
        made.open(3)
    assert isinstance(caught.value.__cause__, StoreFullError)
    made.read_all([0, 1])
    made.check_open(0, 2)
    setattr(made.store, how, False)
    made.open(3)
    made.read_all([0, 1])
    made.end()


@pytest.mark.parametrize("discrete", [True, False])
def test_lost_cells_are_named_and_others_arrive(discrete: bool) -> None:
    made = bench((0, 200), discrete=discrete)
    assert made.store is not None
    made.add(*range(6))
    made.pager.pause(range(6))
    made.settle()
    cells = made.pager._places.cells
    for layer, page in ((1, 2), (1, 3), (2, 3)):
        cell = cells[layer][page]
        assert isinstance(cell.run, FakeRun)
        del cell.run.data[cell.at]
    made.read(0, range(6))
    for pages, lost in (([0, 1, 4, 5], []), ([2], [2]), ([0, 3], [3]), (list(range(6)), [2, 3])):
        if lost:
            with pytest.raises(PageLostError) as caught:
                made.read(1, pages)
            assert caught.value.cells == tuple((1, page) for page in lost)
        else:
            made.read(1, pages)
    assert made.pager.usage().lost_cells == 2
    made.free([2, 3])
    made.add(2, 3)
    made.read_all(range(6))
    made.end()


def test_broken_disk_is_an_error_each_time_until_it_is_mended() -> None:
    made = bench((0, 200))
    assert made.store is not None
    made.add(*range(6))
    made.pager.pause(range(6))
    made.settle()
    made.store.broken = True
    for _ in range(3):
        with pytest.raises(StoreError, match="broken"):
            made.read_all(range(6))
    made.store.broken = False
    made.read_all(range(6))
    made.end()


def test_frames_in_ram_are_written_anew_only_after_what_reads_them() -> None:
    for seed in range(8):
        made = bench((6, 0), seed, ring_slots=4)
        made.add(0, 1)
        made.pager.pause([0, 1])
        made.settle()
        made.pager.expect([(layer, (0, 1)) for layer in made.layers])
        made.free([0, 1])
        made.add(2, 3)
        made.pager.pause([2, 3])
        made.settle()
        made.read_all([2, 3])
        made.end()


def test_wrong_order_is_counted_and_read_right() -> None:
    made = bench((0, 200), engine=CpuCopyEngine())
    made.add(*range(6))
    made.settle()
    made.pager.expect([(layer, (0, 1, 2)) for layer in (2, 1, 0)])
    for layer in made.layers:
        made.read(layer, [5, 4, 3, 3, 5])
    assert made.pager.usage().misses == 3
    assert sum(isinstance(event, Missed) for event in made.events) == 3
    made.end()


def test_closed_page_is_read_until_it_was_unpacked_again() -> None:
    for plain in (True, False):
        made = bench((0, 200), plain=plain, frames=20)
        made.add(*range(4))
        made.pager.pause([1])
        made.settle()
        made.pager.reopen(1)
        assert all(made.pager.is_open(layer, 1) for layer in made.layers)
        for layer in made.layers:
            made.read(layer, range(4))
            made.write(layer, 1)
            made.read(layer, range(4))
            made.pager.reopened(layer, 1)
            with pytest.raises(ValueError, match="no closed cell"):
                made.read(layer, [1])
        made.close(1)
        made.read_all(range(4))
        made.end()


@pytest.mark.parametrize("tiers", [(30, 0), (0, 200)])
def test_page_is_reopened_while_it_goes_down(tiers: tuple[int, int]) -> None:
    for plain in (True, False):
        for seed in range(4):
            made = bench(tiers, seed, plain=plain, frames=24)
            made.add(0, 1)
            made.pager.pause([0])
            made.pager.reopen(0)
            for layer in made.layers:
                made.read(layer, [1, 0])
                made.write(layer, 0)
                made.pager.reopened(layer, 0)
            made.settle()
            made.close(0)
            made.read_all([0, 1])
            made.end()


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("tiers", [(30, 0), (0, 200)])
def test_cells_come_back_to_frames_that_compute_has_just_used(tiers: tuple[int, int], discrete: bool) -> None:
    made = bench(tiers, discrete=discrete, frames=14)
    made.add(0)
    made.pager.pause([0])
    made.settle()
    made.add(1)
    made.read_all([0, 1])
    made.free([1])
    made.pager.resume([0])
    made.settle()
    in_place = made.engine.unified and not tiers[1]  # in RAM, and there is no need to move
    assert made.pager.usage().hbm_cells == (0 if in_place else 3)
    made.read_all([0])
    made.end()


def test_waves_that_were_left_for_others_are_an_error_when_taken_up_again() -> None:
    made = bench((0, 200))
    made.add(*range(8))
    made.pager.pause(range(8))
    made.settle()
    left = made.pager.waves(0, range(8))
    next(left)
    made.read(1, range(8))
    with pytest.raises(RuntimeError, match="layer 0 was left"):
        next(left)
    made.read(0, range(8))
    made.end()


def test_misuse_is_an_error() -> None:
    made = bench((0, 0))
    made.open(0)
    for use in (made.pager.frames, made.pager.close, made.pager.closed, made.pager.is_open):
        for layer, page in ((0, 1), (7, 0)):
            with pytest.raises(KeyError, match="was not opened"):
                use(layer, page)
    with pytest.raises(ValueError, match="call close first"):
        made.pager.closed(0, 0)
    with pytest.raises(ValueError, match="no closed cell"):
        made.pager.waves(0, [0])
    made.close(0)
    with pytest.raises(ValueError, match="reopen it"):
        made.pager.frames(0, 0)
    with pytest.raises(ValueError, match="already"):
        made.pager.close(0, 0)
    made.read(0, [0])
    made.free([0])
    made.free([0])
    with pytest.raises(ValueError, match="no closed cell"):
        made.pager.waves(0, [0])
    made.pager.shut()
    made.pager.shut()
    for ask in (lambda: made.pager.waves(0, [0]), lambda: made.pager.open(1)):
        with pytest.raises(SessionClosedError):
            ask()


def test_shut_ends_what_is_under_way() -> None:
    for discrete in (True, False):
        for seed in range(4):
            made = bench((7, 200), seed, discrete=discrete, ring_slots=4)
            made.add(*range(8))
            made.pager.expect([(layer, tuple(range(8))) for layer in made.layers])
            made.pager.pause(range(8))
            made.end()


@given(
    standing=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    run_cells=st.integers(1, 4),
    frames=st.integers(0, 40),
)
def test_room_is_made_in_whole_runs_from_those_that_have_most(standing: list[int], run_cells: int, frames: int) -> None:
    descents = make_room(standing, run_cells, frames)
    left = list(standing)
    for descent in descents:
        assert left[descent.layer] == max(left)
        assert descent.count == min(run_cells, left[descent.layer])
        left[descent.layer] -= descent.count
    gone = sum(standing) - sum(left)
    assert gone >= min(frames, sum(standing))
    assert gone - (descents[-1].count if descents else 0) < max(frames, 1)


class PagerMachine(RuleBasedStateMachine):
    """Pages of a few numbers are opened, written, closed, read, paused and freed in any order, while stores fail."""

    @initialize(
        seed=st.integers(0, 1 << 16),
        tiers=st.sampled_from(TIERS),
        plain=st.booleans(),
        discrete=st.booleans(),
        frames=st.integers(14, 24),
        ring_slots=st.sampled_from([2, 3, 4, 17]),
        staging_slots=st.sampled_from([2, 9]),
        run_cells=st.integers(1, 3),
        quota=st.integers(0, 3),
    )
    def begin(self, seed: int, tiers: tuple[int, int], plain: bool, discrete: bool, **plan: Any) -> None:
        if not sum(tiers):
            plan["ring_slots"] = 0
        self.bench = bench(tiers, seed, plain=plain, discrete=discrete, **plan)
        self.lost: set[int] = set()
        self.troubled = False

    @property
    def closed(self) -> list[int]:
        truth = self.bench.truth
        return sorted({page for _, page in truth if all((layer, page) in truth for layer in self.bench.layers)})

    @property
    def open(self) -> list[int]:
        bench = self.bench
        return sorted({page for layer, page in bench.raw if bench.pager.is_open(layer, page)})

    @rule(page=st.integers(0, 9))
    def open_page(self, page: int) -> None:
        bench, plan = self.bench, self.bench.plan
        try:
            bench.open(page)
        except CapacityError:
            usage = bench.pager.usage()
            need = (1 + len(self.open)) * (0 if plan.kind.plain else 1) + len(bench.layers) * plan.open.frames
            taken = usage.open_cells * plan.open.frames
            stuck = 0 if plan.ram_frames or plan.nvme_slots else usage.hbm_cells
            assert self.troubled or plan.frames - taken - stuck < need
        self.lost.discard(page)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_page(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.open))
        self.bench.close(page)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        self.bench.write(data.draw(st.sampled_from(self.bench.layers)), data.draw(st.sampled_from(self.open)))

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(self.closed), unique=True))
        self.bench.free(pages)
        self.lost -= set(pages)

    @rule(data=st.data(), expect=st.booleans(), laps=st.integers(1, 3))
    def read_pages(self, data: st.DataObject, expect: bool, laps: int) -> None:
        pages = data.draw(st.lists(st.sampled_from(self.closed), unique=True)) if self.closed else []
        for lap in range(laps):
            if expect and not lap:
                self.bench.pager.expect([(layer, tuple(pages)) for layer in self.bench.layers])
            for layer in self.bench.layers:
                self.read(layer, pages)

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def read_out_of_turn(self, data: st.DataObject) -> None:
        layer = data.draw(st.sampled_from(self.bench.layers))
        self.read(layer, data.draw(st.lists(st.sampled_from(self.closed), unique=True)))

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def leave_in_the_middle(self, data: st.DataObject) -> None:
        layer = data.draw(st.sampled_from(self.bench.layers))
        try:
            waves = self.bench.pager.waves(layer, self.closed)
            next(waves, None)
        except PageLostError:
            assert self.lost

    @precondition(lambda self: self.closed)
    @rule(data=st.data(), back=st.booleans())
    def pause(self, data: st.DataObject, back: bool) -> None:
        pages = data.draw(st.lists(st.sampled_from(self.closed), unique=True))
        if back:
            self.bench.pager.resume(pages)
        else:
            self.bench.pager.pause(pages)

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def reopen(self, data: st.DataObject) -> None:
        bench, page = self.bench, data.draw(st.sampled_from(self.closed))
        if page in self.lost:
            return
        try:
            bench.pager.reopen(page)
        except CapacityError:
            return
        for layer in bench.layers:
            bench.write(layer, page)
            bench.pager.reopened(layer, page)
            del bench.truth[layer, page]

    @precondition(lambda self: self.bench.store is not None)
    @rule(full=st.booleans(), failing=st.booleans())
    def trouble(self, full: bool, failing: bool) -> None:
        assert self.bench.store is not None
        self.troubled = self.troubled or full or failing
        self.bench.store.full, self.bench.store.failing = full, failing

    @precondition(lambda self: self.bench.store is not None and self.bench.store.runs)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        assert self.bench.store is not None
        run = data.draw(st.sampled_from(self.bench.store.runs))
        self.bench.settle()
        if run.data:
            at = data.draw(st.sampled_from(sorted(run.data)))
            del run.data[at]
            cells = [cell for cells in self.bench.pager._places.cells for cell in cells.values()]
            self.lost |= {cell.page for cell in cells if cell.run is run and cell.at == at}

    @invariant()
    def open_pages_are_what_was_written(self) -> None:
        for page in self.open:
            for layer in self.bench.layers:
                if self.bench.pager.is_open(layer, page):
                    self.bench.check_open(layer, page)

    def read(self, layer: int, pages: list[int]) -> None:
        try:
            self.bench.read(layer, pages)
        except PageLostError as error:
            cells = error.cells
        else:
            return
        assert cells
        assert {named for named, _ in cells} == {layer}
        assert {page for _, page in cells} <= self.lost

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.end()


def test_random_use_is_right() -> None:
    run_state_machine_as_test(
        PagerMachine,
        settings=settings(
            max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
