"""The pager against what it should hold, in a random order of everything that can be done to it."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.motion.pager_bench import TIERS, bench
from tierstore.errors import CapacityError, PageLostError


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
