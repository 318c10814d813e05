"""Laws of splitting: no byte appears or is lost, the KV cache gets its share and no more, and refusals are exact."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.errors import PlanError
from tierstore.jobs.splitting import KvNeeds, Split, split_budget
from tierstore.page_plan import PageKind, build_page_plan

MIB = 1 << 20


def kind(layers: range, window: int | None = None, *, nbytes: int = 256, packed: bool = False) -> PageKind:
    cell = 64 * nbytes if packed else 2 * 64 * nbytes
    return PageKind(tuple(layers), window, 64, cell, nbytes, nbytes, plain=not packed)


@st.composite
def needs(draw: st.DrawFn) -> KvNeeds:
    kinds = [kind(range(draw(st.integers(1, 8))), packed=draw(st.booleans()))]
    if draw(st.booleans()):
        kinds.append(kind(range(8, 12), draw(st.sampled_from([100, 1000]))))
    tokens = draw(st.integers(2, 2000))
    longest = tokens * draw(st.integers(1, 20))
    return KvNeeds(kinds, draw(st.integers(1, 500)), tokens, longest, draw(st.integers(1, 1000)) * MIB)


sizes = st.sampled_from([0, 1, 100_000, 5 * MIB, 64 * MIB, 2000 * MIB])


@settings(max_examples=60, deadline=None)
@given(needs=needs(), hbm=sizes.filter(bool), ram=sizes, nvme=st.sampled_from([0, 500 * MIB]), unified=st.booleans())
def test_memory_is_divided(needs: KvNeeds, hbm: int, ram: int, nvme: int, unified: bool) -> None:
    def divide(hbm: int) -> Split:
        return split_budget(needs, hbm, ram, nvme, unified=unified)

    staging = nvme and not unified and ram < 2 * MIB
    if staging:
        with suppress(PlanError):  # some pages are so small that they do pass through it
            split = divide(hbm)
            assert (split.hbm + split.kv_hbm, split.ram + split.kv_ram) == (hbm, ram)
        return
    with pytest.raises(PlanError) as refused:
        divide(1)
    enough = refused.value.needed
    with pytest.raises(PlanError):
        divide(min(enough - 2, needs.weights_nbytes))
    split = divide(max(hbm, enough))
    hbm = max(hbm, enough)
    assert split.hbm + split.kv_hbm == hbm
    assert split.ram + split.kv_ram == ram
    assert min(split.hbm, split.ram, split.kv_ram) >= 0 < split.kv_hbm
    plan = build_page_plan(needs.kinds, split.kv_hbm, split.kv_ram, nvme, unified=unified)
    holds = plan.tokens is None or plan.tokens >= needs.longest_tokens
    assert holds == ("do not fit" not in split.reason)
    beyond = split.kv_hbm > max(hbm // 4, hbm - needs.weights_nbytes)
    # more than a quarter is for the longest sequence, or where a quarter holds none at all
    assert not beyond or holds or hbm < 2 * enough
    assert split.kv_hbm <= max(hbm // 2, hbm - needs.weights_nbytes)


def split(*, sequences: int = 1000, weights: int = 4000, longest: int = 600, hbm: int = 1000, ram: int = 0) -> Split:
    many = KvNeeds([kind(range(16))], sequences, 500, longest, weights * MIB)
    return split_budget(many, hbm * MIB, ram * MIB, 0, unified=True)


def test_a_large_job_gets_a_quarter_and_a_small_one_what_it_can_use() -> None:
    assert split().kv_hbm == 250 * MIB
    assert "250.00 MiB of hbm are for the KV cache" in split().reason
    assert split(sequences=1).kv_hbm < 20 * MIB
    assert "1 sequence of 500 tokens at once; the job has no more" in split(sequences=1).reason


def test_what_the_weights_leave_over_is_for_pages() -> None:
    assert split(weights=100).kv_hbm == 900 * MIB


def test_a_long_row_gets_up_to_a_half_and_no_more() -> None:
    assert split(longest=40_000).kv_hbm > 250 * MIB
    assert split(longest=10**6).kv_hbm == 250 * MIB
    assert "tokens do not fit, and the longest has 1000000" in split(longest=10**6).reason


def test_pages_are_in_ram_where_more_sequences_fit() -> None:
    assert split(ram=1000).kv_ram == 250 * MIB
    assert "250.00 MiB of ram" in split(ram=1000).reason
    assert "no more pages can be open" in split(ram=10_000).reason
    assert split(sequences=1, ram=1000).kv_ram == 0


def test_a_model_without_pages_keeps_all_memory() -> None:
    assert split_budget(KvNeeds([], 5, 5, 5, 5), 7, 8, 0, unified=True).hbm == 7
