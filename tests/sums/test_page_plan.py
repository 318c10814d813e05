"""Laws of page plans: no tier beyond its bytes, the smallest budget exactly, and what is promised has room."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tierstore.errors import PlanError
from tierstore.page_plan import KindPlan, PageKind, PagePlan, build_page_plan

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def kind(layers: int = 2, first: int = 0, *, heads: int = 2, dim: int = 8, tokens: int = 4, **more: Any) -> PageKind:
    """Layers of a bf16 model; ``ratio`` is what a closed cell has of the raw bytes, None for plain."""
    raw, ratio = heads * dim * 2, more.pop("ratio", None)
    cell = 2 * raw * tokens if ratio is None else max(1, int(2 * raw * tokens * ratio))
    named = {"window": None, "raw_key_nbytes_per_token": raw, "raw_value_nbytes_per_token": raw} | more
    return PageKind(tuple(range(first, first + layers)), page_tokens=tokens, cell_nbytes=cell, plain=not ratio, **named)


@st.composite
def kinds(draw: st.DrawFn) -> list[PageKind]:
    made: list[PageKind] = []
    for _ in range(draw(st.integers(1, 3))):
        made.append(
            kind(
                draw(st.integers(1, 5)),
                sum(len(one.layers) for one in made),
                heads=draw(st.integers(1, 8)),
                dim=draw(st.sampled_from([1, 8, 128])),
                tokens=draw(st.sampled_from([4, 64])),
                ratio=draw(st.sampled_from([None, 0.3, 0.53, 1.1])),
                window=draw(st.none() | st.integers(1, 1000)),
                recent_tokens=draw(st.sampled_from([0, 3, 64])),
            )
        )
    return made


tiers = st.sampled_from([0, 1, 5000, 100 * KIB, 3 * MIB, GIB])


@settings(max_examples=80, deadline=None)
@given(kinds=kinds(), more=tiers, ram=tiers, nvme=tiers, unified=st.booleans(), run=st.sampled_from([1, 9999, MIB]))
def test_no_tier_is_used_beyond_its_bytes(
    kinds: list[PageKind], more: int, ram: int, nvme: int, unified: bool, run: int
) -> None:
    def build(kv_hbm: int) -> PagePlan:
        return build_page_plan(kinds, kv_hbm, ram, nvme, unified=unified, run_nbytes=run)

    with pytest.raises(PlanError) as refused:
        build(0)
    assert f"raise Budget.kv_hbm to {refused.value.needed} bytes" in str(refused.value)
    with pytest.raises(PlanError, match=r"Budget\.kv_hbm to"):
        build(refused.value.needed - 1)
    frames = [one.frame_nbytes for one in kinds]
    slots = [nbytes if nbytes < 64 * KIB else -(-nbytes // 4096) * 4096 for nbytes in frames]
    if nvme and not unified and ram < 2 * sum(slots):
        with pytest.raises(PlanError, match=r"raise Budget\.kv_ram to"):
            build(refused.value.needed + more)
        return
    plan = build(refused.value.needed + more)
    assert plan.hbm_nbytes <= refused.value.needed + more
    assert plan.ram_nbytes <= ram
    assert plan.nvme_nbytes <= nvme
    assert plan.scratch_nbytes >= max(2 * one.raw_nbytes for one in kinds)
    assert tuple(one.kind for one in plan.kinds) == tuple(kinds)
    for one in plan.kinds:
        check_kind(one, ram, nvme, unified, run)
    assert len(plan.explain().splitlines()) <= 1 + 5 * len(kinds)


def check_kind(plan: KindPlan, ram: int, nvme: int, unified: bool, run: int) -> None:
    layers, spills = len(plan.kind.layers), bool(ram or nvme)
    streams = bool(nvme or (ram and not unified))
    assert (plan.ring_slots >= 2) if streams else (plan.ring_slots == 0)
    assert (plan.staging_slots >= 2) if nvme and not unified else (plan.staging_slots == 0)
    assert plan.slot_nbytes >= plan.run_cells * plan.frame_nbytes
    assert (plan.run_cells - 1) * plan.frame_nbytes < run
    assert plan.frame_nbytes % 64 == 0 <= plan.frame_nbytes - plan.kind.cell_nbytes < 64
    # A full table has room: all pages but those that one sequence writes to are closed, and a run is on its way down.
    hbm, in_ram, on_nvme = plan.tier_pages
    assert min(plan.quota, in_ram, on_nvme) >= 0
    assert in_ram * layers <= plan.ram_frames
    assert on_nvme * layers <= plan.nvme_slots
    writing = plan.kind.sequence_open_pages
    moving = (plan.run_cells if spills else 0) + (0 if plan.kind.plain else 1)
    assert hbm >= writing
    assert layers * (writing * plan.open.frames + hbm - writing + moving) <= plan.frames
    # The quota stands beside all the pages that may be open.
    assert plan.open_pages >= writing
    assert layers * (plan.quota + plan.open_pages * plan.open.frames + moving) <= plan.frames


@settings(max_examples=40, deadline=None)
@given(kinds=kinds())
def test_an_open_cell_has_a_place_for_every_token(kinds: list[PageKind]) -> None:
    for one in kinds:
        plan = build_page_plan([one], GIB, 0, 0, unified=True).kinds[0]
        layout, keys, values = plan.open, one.raw_key_nbytes_per_token, one.raw_value_nbytes_per_token
        assert layout.parts * layout.piece_tokens == one.page_tokens
        taken: dict[int, list[tuple[int, int]]] = {}
        for part in range(layout.parts):
            for (frame, at), nbytes in ((layout.keys_at(part), keys), (layout.values_at(part), values)):
                taken.setdefault(frame, []).append((at, at + nbytes * layout.piece_tokens))
        assert sorted(taken) == list(range(layout.frames))
        for pieces in taken.values():
            assert max(end for _, end in pieces) <= plan.frame_nbytes
            assert all(end <= start for (_, end), (start, _) in zip(sorted(pieces), sorted(pieces)[1:], strict=False))
        assert layout.parts == 1 or 2 * layout.piece_tokens * max(keys, values) > plan.frame_nbytes
        if one.plain:  # closing moves nothing
            assert (layout.frames, layout.offsets) == (1, (0, keys * one.page_tokens))


@pytest.mark.parametrize(("ratio", "frames"), [(None, 1), (0.53, 2), (0.3, 4), (0.17, 8)])
def test_open_cells_of_common_formats(ratio: float | None, frames: int) -> None:
    plan = build_page_plan([kind(heads=8, dim=128, tokens=64, ratio=ratio)], GIB, 0, 0, unified=True)
    assert plan.kinds[0].open.frames == frames


def test_keys_and_values_of_different_size_stand_together_where_they_fit() -> None:
    wide = PageKind((0,), None, 64, 64 * 600, 768, 256, plain=False)
    assert build_page_plan([wide], GIB, 0, 0, unified=True).kinds[0].open.offsets == (0, 32 * 768)


@settings(max_examples=30, deadline=None)
@given(
    kinds=kinds(), hbm=st.integers(0, 64 * MIB), more=st.sampled_from([0, 77, MIB, GIB]), below=tiers, ram=st.booleans()
)
def test_twice_the_bytes_never_hold_less(kinds: list[PageKind], hbm: int, more: int, below: int, ram: bool) -> None:
    """Apart from a run a layer, which waits in HBM until it is as long as the larger budget makes it."""

    def plans(times: int) -> tuple[KindPlan, ...]:
        lower = (times * below, 0) if ram else (0, times * below)
        return build_page_plan(kinds, times * hbm + more, *lower, unified=True).kinds

    try:
        before = plans(1)
    except PlanError:
        assume(False)
    for was, now in zip(before, plans(2), strict=True):
        assert now.pages + now.run_cells >= was.pages


@settings(max_examples=30, deadline=None)
@given(
    windowed=st.integers(1, 50),
    full=st.integers(1, 50),
    window=st.sampled_from([256, 1024, 4096]),
    length=st.sampled_from([64, 1000, 10_000, 100_000]),
)
def test_kinds_share_so_that_sequences_of_any_length_fit_half_as_well_as_they_could(
    windowed: int, full: int, window: int, length: int
) -> None:
    pair = [kind(windowed, tokens=64, window=window), kind(full, windowed, tokens=64)]
    budget = 4 * GIB
    held = [one.pages for one in build_page_plan(pair, budget, 0, 0, unified=True).kinds]
    wanted = [min(-(-length // 64), one.sequence_pages or length) for one in pair]
    best = budget / sum(count * one.page_nbytes for count, one in zip(wanted, pair, strict=True))
    sequences = min(have / count for have, count in zip(held, wanted, strict=True))
    assert sequences >= 0.48 * best


def test_a_small_budget_serves_one_sequence_rather_than_none_well() -> None:
    pair = [kind(20, tokens=64, window=256), kind(4, 20, tokens=64)]
    enough = 7 * 20 * pair[0].page_nbytes // 20
    plan = build_page_plan(pair, enough + 60 * pair[1].page_nbytes, 0, 0, unified=True)
    assert plan.kinds[0].pages <= 8
    assert plan.kinds[1].pages >= 40
    assert plan.tokens == plan.kinds[1].pages * 64


def test_seventy_billion_parameters() -> None:
    big = kind(80, heads=8, dim=128, tokens=64)
    assert big.page_nbytes == 20 * MIB
    plan = build_page_plan([big], 4 * GIB, 16 * GIB, 200 * GIB, unified=False)
    one = plan.kinds[0]
    assert one.run_cells * one.frame_nbytes == MIB
    assert (one.quota + one.open_pages) * big.page_nbytes >= 0.95 * 4 * GIB
    assert one.open_pages * 64 >= 2048
    assert plan.tokens is not None
    assert plan.tokens >= 0.99 * 220 * GIB / (20 * MIB) * 64
    packed = build_page_plan([kind(80, heads=8, dim=128, tokens=64, ratio=0.3)], 4 * GIB, 0, 0, unified=False)
    assert packed.tokens is not None
    assert packed.tokens >= 3 * 4 * GIB / (20 * MIB) * 64


def test_what_fits_as_it_is_can_be_written_in_one_pass() -> None:
    one = build_page_plan([kind(tokens=64)], 10 * MIB, 0, 0, unified=True).kinds[0]
    assert one.open_pages == one.pages


def test_windows_alone_have_no_end() -> None:
    plan = build_page_plan([kind(window=8)], MIB, 0, 0, unified=True)
    assert plan.tokens is None
    assert "as long as it likes" in plan.explain()
    tight = build_page_plan([kind(window=800)], 4 * KIB, 0, 0, unified=True)
    assert tight.tokens == tight.kinds[0].pages * 4


def test_people_are_told_what_fits_where() -> None:
    mixed = [kind(5, tokens=64, window=128), kind(1, 5, tokens=64)]
    text = build_page_plan(mixed, MIB, 4 * MIB, 16 * MIB, unified=False).explain()
    assert "one sequence can be up to" in text
    assert "  5 layers with a window of 128 tokens: a page of 64 tokens is 20.00 KiB in all" in text
    assert "  1 layer: a page of 64 tokens is 4.00 KiB in all" in text
    assert all(f"    {tier:<5}" in text for tier in ("hbm", "ram", "nvme", "ring"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: build_page_plan([], GIB, 0, 0, unified=True), "at least one kind"),
        (lambda: build_page_plan([kind(), kind()], GIB, 0, 0, unified=True), "a layer is of one"),
        (lambda: build_page_plan([kind()], GIB, -1, 0, unified=True), "must not be negative"),
        (lambda: build_page_plan([kind()], GIB, 0, 0, unified=True, run_nbytes=0), "must not be negative or 0"),
        (lambda: build_page_plan([kind(tokens=6, ratio=0.1)], GIB, 0, 0, unified=True), "powers of two"),
        (lambda: kind(0), "layers are needed"),
        (lambda: kind(window=0), "must be positive"),
        (lambda: PageKind((0,), None, 4, 64, 32, 32, plain=True), "its 256 raw bytes, not 64"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_disk_behind_a_device_needs_staging() -> None:
    with pytest.raises(PlanError, match=r"Budget\.kv_ram is 0 B: raise Budget\.kv_ram to 512 bytes"):
        build_page_plan([kind()], MIB, 0, MIB, unified=False)
    assert build_page_plan([kind()], MIB, 512, MIB, unified=False).kinds[0].staging_slots == 2
    assert build_page_plan([kind()], MIB, 0, MIB, unified=True).kinds[0].staging_slots == 0
