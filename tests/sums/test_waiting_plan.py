"""Laws of where micro-batches wait: within every bound, nothing moves for nothing, and as few as can be."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.batch_plan import BatchCosts, BatchJob, BatchPlan, BatchRoom, KvTier, build_batch_plan
from tierstore.waiting_plan import ALIGN, IN_TRANSIT, WaitingRoom, moves

counts = st.integers(1, 300)


@given(counts, counts)
def test_those_that_move_are_as_few_as_can_be(micro_batches: int, on_device: int) -> None:
    going = moves(micro_batches, on_device)
    moving = sum(going)
    assert len(going) == micro_batches
    if micro_batches <= on_device:
        assert not moving
    else:
        assert micro_batches - moving == max(on_device - IN_TRANSIT, 0)


@given(counts, counts)
def test_those_that_stay_are_spread_evenly(micro_batches: int, on_device: int) -> None:
    going = moves(micro_batches, on_device)
    moving = sum(going)
    for width in {1, 2, micro_batches // 2, micro_batches - 1} - {0}:
        inside = [sum(going[at : at + width]) for at in range(micro_batches - width + 1)]
        assert max(inside, default=0) - min(inside, default=0) <= 2
    assert moving == 0 or going[-1]


rooms = st.builds(
    WaitingRoom,
    st.integers(0, 10**6),
    st.integers(0, 10**8),
    st.integers(0, 10**9),
    st.integers(0, 10**10),
    st.just(1e-10),
)


@given(rooms, st.integers(1, 2048), st.data())
def test_every_plan_is_within_its_bounds(room: WaitingRoom, tokens: int, data: st.DataObject) -> None:
    most = room.most(tokens)
    assert most >= IN_TRANSIT
    micro_batches = data.draw(st.integers(1, min(most, 10**6)))
    plan = room.plan(micro_batches, tokens)
    assert plan.host_nbytes <= room.host_nbytes
    assert plan.place_nbytes >= tokens * room.nbytes_per_token
    assert plan.place_nbytes % ALIGN == 0
    assert plan.on_device == IN_TRANSIT or plan.on_device * tokens * room.nbytes_per_token <= room.device_nbytes
    assert 0 <= plan.moving <= micro_batches
    assert (plan.moving == 0) == (micro_batches <= plan.on_device)
    assert (room.seconds(micro_batches, tokens) > 0) == (plan.moving > 0 and room.moved_nbytes_per_token > 0)
    if micro_batches < most:
        assert room.seconds(micro_batches + 1, tokens) >= room.seconds(micro_batches, tokens)


def test_what_is_more_than_fits_is_refused() -> None:
    room = WaitingRoom(100, 1000, 8 * 3200, 3 * 4096, 1e-10)
    assert (room.on_device(32), room.most(32)) == (8, 8)  # three places would hold fewer than are in transit
    room = WaitingRoom(100, 1000, 8 * 3200, 9 * 4096, 1e-10)
    assert room.most(32) == 8 - IN_TRANSIT + 9
    for wrong in (0, 14):
        with pytest.raises(ValueError, match="from 1 to 13 fit"):
            room.plan(wrong, 32)


def test_a_plan_says_who_waits_where() -> None:
    room = WaitingRoom(100, 1000, 8 * 3200, 9 * 4096, 1e-10)
    assert "stay on the device, where there is room for all" in room.plan(8, 32).explain()
    said = room.plan(13, 32).explain()
    assert "hidden states of 4 waiting micro-batches stay on the device, those of 9 wait in 36.00 KiB of ram" in said


# ---- in the plan of a batch

SECONDS = {32: 0.1}


def planned(waiting: WaitingRoom | None, sequences: int = 10_000) -> BatchPlan:
    job = BatchJob(sequences, 100, 100, 100)
    room = BatchRoom(64, 10_000, [KvTier(1_000_000)], waiting=waiting)
    return build_batch_plan(BatchCosts(SECONDS, 3.0), job, room)


def test_moving_is_paid_for() -> None:
    free = planned(None)
    assert free.waiting is None
    assert free.micro_batches >= 30
    room = WaitingRoom(10_000, 10_000_000, 10 * 320_000, 1 << 30, 1e-11)
    cheap = planned(room)
    assert cheap.waiting is not None
    assert cheap.micro_batches == cheap.waiting.micro_batches >= 28
    assert cheap.waiting.moving == cheap.micro_batches - 10 + IN_TRANSIT
    assert cheap.transfer_seconds == pytest.approx(3.0 + cheap.waiting.moving * 32 * 10_000_000 * 1e-11)
    assert "wait in" in cheap.explain()
    dear = planned(WaitingRoom(10_000, 10_000_000, 10 * 320_000, 1 << 30, 1e-8))
    assert dear.waiting is not None
    assert (dear.micro_batches, dear.waiting.moving, dear.bound) == (10, 0, "hidden states")
    assert "have room to wait" in dear.explain()


def test_too_little_memory_makes_passes_smaller() -> None:
    found = planned(WaitingRoom(10_000, 10_000_000, 0, 0, 1e-11))
    assert (found.micro_batches, found.bound) == (IN_TRANSIT, "hidden states")
    assert planned(WaitingRoom(1, 1, 1 << 40, 0, 1e-11)).micro_batches == planned(None).micro_batches


@settings(max_examples=40, deadline=None)
@given(rooms, st.sampled_from([1, 30, 3000]))
def test_plans_with_little_room_are_plans(room: WaitingRoom, sequences: int) -> None:
    found = planned(room, sequences)
    assert found.waiting is not None
    assert found.micro_batches <= room.most(32)
    assert found.waiting.micro_batches == found.micro_batches
    assert found.seconds >= 0.9 * planned(None, sequences).seconds
