"""The pager brings every byte of every cell, whatever moved and whatever failed, and loses no frame."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.motion.pager_bench import TIERS, FakeRun, PagerBench, bench, make_plan
from tierstore.copies.cpu import CpuCopyEngine
from tierstore.errors import CapacityError, PageLostError, SessionClosedError, StoreError, StoreFullError
from tierstore.events import Missed, Moved
from tierstore.paging.pager import Pager
from tierstore.stores.page_file import PageFile


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


@pytest.mark.parametrize("discrete", [True, False])
def test_what_goes_down_takes_a_slot_of_the_ring_only_where_it_passes_through(discrete: bool) -> None:
    made = bench((0, 200), engine=None if discrete else CpuCopyEngine(), frames=40)
    made.add(*range(5))
    made.pager.pause(range(4))
    made.settle()
    made.read_all(range(4))
    ahead = len(made.pager._ring._queue)
    assert ahead == made.plan.ring_slots
    made.pager.pause([4])
    assert (len(made.pager._ring._queue) == ahead) is discrete
    made.read_all(range(5))
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
    assert f"no cell can go down ({caught.value.__cause__}): end sequences" in str(caught.value)
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


def test_memory_that_is_too_small_is_refused() -> None:
    made = bench((7, 200))
    good = {"region": made.region, "ring": made.ring, "ram": made.ram, "staging": made.staging, "file": made.store}
    for name in ("region", "ring", "ram", "staging"):
        buffer = good[name]
        assert isinstance(buffer, torch.Tensor)
        with pytest.raises(ValueError, match=rf"{name} has {buffer.numel() - 1} bytes"):
            Pager(made.plan, layers=made.layers, engine=made.engine, recorder=print, **(good | {name: buffer[1:]}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass through staging"):
        Pager(made.plan, layers=made.layers, engine=made.engine, recorder=print, **(good | {"staging": None}))  # type: ignore[arg-type]
    made.end()


def test_shut_ends_what_is_under_way() -> None:
    for discrete in (True, False):
        for seed in range(4):
            made = bench((7, 200), seed, discrete=discrete, ring_slots=4)
            made.add(*range(8))
            made.pager.expect([(layer, tuple(range(8))) for layer in made.layers])
            made.pager.pause(range(8))
            made.end()
