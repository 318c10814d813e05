"""What a page plan promises, a pager holds: one sequence fills every page of the table, and is read back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.motion.pager_bench import PagerBench
from tierstore.errors import PlanError
from tierstore.page_plan import PageKind, PagePlan, build_page_plan

PLAIN, INT8, INT4 = 256, 136, 80


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 6),
    cell=st.sampled_from([PLAIN, INT8, INT4]),
    recent=st.integers(0, 9),
    more=st.integers(0, 20),
    ram=st.sampled_from([0, 3, 12]),
    nvme=st.sampled_from([0, 1, 12]),
    run=st.sampled_from([1, 400, 5000]),
    unified=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_sequence_fills_every_page(
    layers: int, cell: int, recent: int, more: int, ram: int, nvme: int, run: int, unified: bool, seed: int
) -> None:
    kind = PageKind(tuple(range(layers)), None, 4, cell, 32, 32, cell == PLAIN, recent_tokens=recent)
    # Each run on disk starts a sector: room for whole sectors, at least.
    below = (ram * kind.page_nbytes + (2000 if nvme else 0), nvme * layers * 4096)

    def build(kv_hbm: int) -> PagePlan:
        return build_page_plan([kind], kv_hbm, *below, unified=unified, run_nbytes=run)

    try:
        plan = build(0)
    except PlanError as refused:
        plan = build(refused.needed + more * kind.page_nbytes)
    (one,) = plan.kinds
    made = PagerBench(one, seed, discrete=not unified)
    writing = kind.sequence_open_pages
    for page in range(one.pages):
        made.open(page)
        if page >= writing - 1:
            made.close(page - writing + 1)
    closed = range(max(one.pages - writing + 1, 0))
    made.read_all(closed)
    made.read_all(closed)
    for page in set(range(one.pages)) - set(closed):
        for layer in made.layers:
            made.check_open(layer, page)
    made.end()
