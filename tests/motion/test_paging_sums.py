"""What the pager decides in numbers: what goes down, what comes together and where it lands, which visit is next."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tierstore.contracts import Fence
from tierstore.copies.cpu import DONE
from tierstore.paging.going_down import make_room
from tierstore.paging.groups import groups, places_in_slot
from tierstore.paging.order import VisitOrder
from tierstore.paging.places import Cell
from tierstore.paging.stretches import joined, stretches


@dataclass(eq=False)
class Run:
    cells: int
    fence: Fence = DONE


@st.composite
def cells_below(draw: st.DrawFn) -> tuple[list[Cell], int]:
    """Cells in RAM and in runs, some of which were freed, in any order; and how many a run has at most."""
    most = draw(st.integers(1, 5))
    found = [Cell(0, page, ram=page, closed=True) for page in range(draw(st.integers(0, 7)))]
    for _ in range(draw(st.integers(0, 5))):
        run = Run(draw(st.integers(1, most)))
        alive = draw(st.sets(st.integers(0, run.cells - 1)))
        found += [Cell(0, len(found), run=run, at=at, closed=True) for at in alive]
    return draw(st.permutations(found)), most


@given(drawn=cells_below(), runs=st.integers(1, 3))
def test_every_cell_is_fetched_once_and_no_run_in_two_goes(drawn: tuple[list[Cell], int], runs: int) -> None:
    cells, most = drawn
    found = list(groups(cells, runs * most))
    assert sorted(cell.page for group in found for cell in group) == sorted(cell.page for cell in cells)
    assert all(0 < len(group) <= runs * most for group in found)
    assert all(len({cell.run is None for cell in group}) == 1 for group in found)
    goes = [run for group in found for run in {id(cell.run) for cell in group if cell.run is not None}]
    assert len(goes) == len(set(goes))


@given(drawn=cells_below(), frame=st.sampled_from([64, 4096, 6208]))
def test_cells_land_apart_in_a_slot_and_where_a_disk_can_write(drawn: tuple[list[Cell], int], frame: int) -> None:
    cells, most = drawn
    for slot_nbytes in (most * frame, most * (frame + 4096)):
        for group in groups(cells, most):
            places = places_in_slot(group, frame, slot_nbytes)
            assert places == sorted(places)
            assert all(b - a >= frame for a, b in pairwise(places))
            assert places[-1] + frame <= slot_nbytes
            if slot_nbytes > most * frame:
                assert all(
                    at % 4096 == cell.at * frame % 4096
                    for cell, at in zip(group, places, strict=True)
                    if cell.run is not None
                )


@given(drawn=cells_below())
def test_reads_and_copies_cover_each_cell_once(drawn: tuple[list[Cell], int]) -> None:
    cells, most = drawn
    for group in groups([cell for cell in cells if cell.run is not None], most):
        places = places_in_slot(group, 64, most * 64 + 4096 * most)
        reads = stretches(group, places, 64)
        read = {(id(run), first + i): at + i * 64 for run, first, count, at in reads for i in range(count)}
        assert read == {(id(cell.run), cell.at): at for cell, at in zip(group, places, strict=True)}
        sources = [7 * 64 + 64 * cell.page for cell in group]
        copied = {
            source + at: target + at
            for source, target, nbytes in joined(sources, places, 64)
            for at in range(0, nbytes, 64)
        }
        assert copied == dict(zip(sources, places, strict=True))


@given(
    order=st.lists(st.tuples(st.integers(0, 3), st.just((1, 2))), min_size=1, max_size=6),
    steps=st.integers(0, 20),
)
def test_visits_go_round(order: list[tuple[int, tuple[int, ...]]], steps: int) -> None:
    visits = VisitOrder()
    assert visits.find(0, (1, 2)) is None
    assert visits.set(order)
    assert not visits.set(order)
    for step in range(steps):
        layer, pages = order[step % len(order)]
        assert visits.item(visits.cursor) == (layer, pages)
        assert visits.find(layer, (*pages, 3)) == visits.find(layer, (3, 2, 1)) == visits.cursor
        assert visits.find(layer, (1,)) is None
        assert visits.end == visits.cursor + len(order)
        visits.cursor += 1
    queued = [(visit, visits.item(visit)[0]) for visit in range(visits.cursor, visits.end)]
    rotated = [visits.item(visit) for visit, _ in queued]
    visits.set(rotated)
    twice = [each for each in queued for _ in range(2)]
    assert list(visits.renumber(twice)) == [visit for visit, _ in twice]
    visits.set([(9, ())])
    assert list(visits.renumber(queued)) == []


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
