"""Laws of what errors about pages name: enough, not much more than is needed, and nothing where nothing helps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sums.test_page_plan import GIB, KIB, MIB, kind, kinds
from tierstore.errors import PlanError
from tierstore.page_needs import PageNeed, enough_hbm, has_room
from tierstore.page_plan import PageKind, build_page_plan


@settings(max_examples=60, deadline=None)
@given(
    kinds=kinds(),
    rows=st.integers(1, 9),
    tokens=st.integers(1, 3000),
    whole=st.booleans(),
    beside=st.integers(0, 5),
    ram=st.sampled_from([0, 100 * KIB, 3 * MIB]),
    nvme=st.sampled_from([0, MIB, GIB]),
    unified=st.booleans(),
)
def test_what_is_named_is_enough(
    kinds: list[PageKind], rows: int, tokens: int, whole: bool, beside: int, ram: int, nvme: int, unified: bool
) -> None:
    need = PageNeed(rows, tokens, whole, (beside,) * len(kinds))
    found = enough_hbm(kinds, need, ram, nvme, unified=unified)
    if found is None:  # pages pass through more host memory than there is
        with pytest.raises(PlanError, match=r"raise Budget\.kv_ram to"):
            build_page_plan(kinds, 1 << 45, ram, nvme, unified=unified)
        return
    plan = build_page_plan(kinds, found, ram, nvme, unified=unified)
    assert all(has_room(each, need, beside) for each in plan.kinds)
    for each in plan.kinds:
        held = rows * min(-(-tokens // each.kind.page_tokens), each.kind.sequence_pages or tokens)
        assert each.pages >= held + beside
    bound = plan.tokens
    assert bound is None or bound >= tokens
    assert (enough_hbm(kinds, need, ram, nvme, unified=unified, above=found) or 0) > found


def test_it_is_not_much_more_than_is_needed() -> None:
    one = kind(4, tokens=64)
    need = PageNeed(3, 640)
    found = enough_hbm([one], need, 0, 0, unified=True)
    assert found is not None
    assert found <= 1.3 * 30 * one.page_nbytes + 2 * one.raw_nbytes
    assert not has_room(build_page_plan([one], int(found * 0.98), 0, 0, unified=True).kinds[0], need)


@settings(max_examples=40, deadline=None)
@given(kinds=kinds(), nvme=st.sampled_from([0, GIB]))
def test_one_sequence_that_is_short_needs_what_a_plan_needs(kinds: list[PageKind], nvme: int) -> None:
    with pytest.raises(PlanError) as refused:
        build_page_plan(kinds, 0, 0, nvme, unified=True)
    found = enough_hbm(kinds, PageNeed(1, 1), 0, nvme, unified=True)
    assert found is not None
    assert refused.value.needed <= found <= 1.02 * refused.value.needed + 2


def test_what_comes_at_once_is_open_at_once() -> None:
    one = kind(4, tokens=64)
    chunked, at_once = (enough_hbm([one], PageNeed(2, 640, at_once=n), 0, GIB, unified=True) for n in (0, 640))
    assert chunked is not None
    assert at_once is not None
    plans = [build_page_plan([one], each, 0, GIB, unified=True).kinds[0] for each in (chunked, at_once)]
    assert [plan.open_pages >= 20 for plan in plans] == [False, True]
