"""Pages have room as long as there are no more of them than was promised, whichever of them came and went before."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.motion.pager_bench import FakeStore, PagerBench
from tierstore.contracts import Buffer, Fence
from tierstore.errors import StoreFullError
from tierstore.extents import Extent
from tierstore.page_plan import PageKind, build_page_plan
from tierstore.pages import PageTable
from tierstore.stores.gaps import Gaps
from tierstore.stores.page_runs import Run, RunSpace
from tierstore.stores.workers import ReadFence

PAGE = 4096


def written() -> Fence:
    return ReadFence(0, ())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 16), blocks=st.integers(0, 40), steps=st.integers(1, 200))
def test_whatever_is_free_can_be_had(seed: int, blocks: int, steps: int) -> None:
    random, gaps = Random(seed), Gaps(blocks)
    free, held = set(range(blocks)), list[int]()
    for _ in range(steps):
        wanted = random.choice([0, 1, 2, 5, 9])
        if random.random() < 0.5:
            found = gaps.take(wanted)
            assert (found is None) == (wanted > len(free))
            if found is not None:
                mine = [block for extent in found for block in range(extent.offset, extent.end)]
                assert len(mine) == wanted
                assert list(found) == sorted(found)
                assert free.issuperset(mine)
                free.difference_update(mine)
                held += mine
        elif held:
            block = held.pop(random.randrange(len(held)))
            gaps.give_back(Extent(block, 1))
            free.add(block)
        assert gaps.free_nbytes == len(free)
    # the fewest pieces: the largest gaps go first, and gaps that touch are one
    whole = gaps.take(len(free))
    assert whole is not None
    assert all(a.end < b.offset for a, b in pairwise(whole))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    cell=st.sampled_from([64, 1000, PAGE, 9728, 33_856, 2 * PAGE]),
    cells=st.integers(1, 60),
    run=st.integers(1, 9),
)
def test_only_blocks_of_live_cells_are_taken(seed: int, cell: int, cells: int, run: int) -> None:
    random, space = Random(seed), RunSpace(cells * (cell + PAGE), cell)
    nbytes, runs = space.free_nbytes, list[Run]()
    for _ in range(150):
        if random.random() < 0.5:
            count = random.randint(1, run)
            room = space.free_nbytes
            made = space.take(count, cast(ReadFence, written()))
            assert (made is None) == (-(-count * cell // PAGE) * PAGE > room)
            runs += [made] if made is not None else []
        elif runs:
            each = random.choice(runs)
            space.free(each, random.choice(sorted(each.live)))
            runs = [other for other in runs if other.live]
        blocks = {
            block
            for each in runs
            for number in each.live
            for extent in space.extents(each, number, 1)
            for block in range(extent.offset // PAGE, (extent.end - 1) // PAGE + 1)
        }
        assert nbytes - space.free_nbytes == len(blocks) * PAGE
        live = sum(len(each.live) for each in runs)
        assert sum(e.nbytes for r in runs for n in r.live for e in space.extents(r, n, 1)) == live * cell
        assert space.dead_nbytes == len(blocks) * PAGE - live * cell
        assert cell % PAGE or not space.dead_nbytes


class SpaceStore(FakeStore):
    """Full when the blocks of a page file are: cells here are as many bytes there as is whole blocks."""

    def __init__(self, bench: PagerBench) -> None:
        plan = bench.plan
        super().__init__(plan.frame_nbytes, 1 << 30, bench.random, bench.engine)
        self.space = RunSpace(plan.nvme_nbytes, plan.frame_nbytes)
        self.places: dict[object, Run] = {}

    def put(self, cells: int, data: Buffer, *, after: object = ()) -> object:  # type: ignore[override]
        place = self.space.take(cells, cast(ReadFence, written()))
        if place is None:
            raise StoreFullError("the store is full")
        run = super().put(cells, data, after=after)  # type: ignore[arg-type]
        self.places[run] = place
        return run

    def free(self, run: object, cell: int) -> None:
        self.space.free(self.places[run], cell)
        super().free(run, cell)


@pytest.mark.parametrize("discrete", [False, True])
def test_promised_pages_always_have_room(discrete: bool) -> None:
    @settings(max_examples=20, deadline=None)
    @given(
        seed=st.integers(0, 1 << 16),
        layers=st.integers(1, 2),
        hbm=st.integers(8, 16),
        ram=st.sampled_from([0, 5]),
        nvme=st.integers(12, 40),
        run=st.integers(1, 4),
    )
    def law(seed: int, layers: int, hbm: int, ram: int, nvme: int, run: int) -> None:
        kind = PageKind(tuple(range(layers)), None, 4, PAGE, 512, 512, plain=True)
        sizes = [PAGE * layers * pages for pages in (6 + hbm, ram, nvme)]
        sizes[0] += 2 * run * PAGE + 2 * PAGE
        sizes[1] += 8 * run * PAGE
        plan = build_page_plan([kind], *sizes, unified=not discrete, run_nbytes=run * PAGE).kinds[0]
        bench = PagerBench(plan, seed, discrete=discrete)
        bench.store = store = SpaceStore(bench)
        bench.pager._transport._file = cast(Any, store)
        random, table, live = Random(seed), PageTable(plan.pages, kind.page_tokens), dict[int, list[int]]()
        closed = 0
        for _ in range(250):
            growing = random.choice([*live, None])
            if random.random() < 0.75 and table.available:  # as many pages live as were promised
                if growing is None:
                    growing = table.add()
                    live[growing] = []
                (page,) = table.append(growing, kind.page_tokens).fresh
                bench.add(page)  # raises where one lacks room
                live[growing].append(page)
                closed += layers
            elif growing is not None:
                gone = live.pop(growing)
                table.remove(growing)
                bench.free(gone)
                table.take_freed()
        for pages in live.values():
            bench.read_all(pages)
        assert store.written_nbytes <= closed * PAGE, "no cell is written twice"
        bench.end()

    law()
