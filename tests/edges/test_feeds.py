"""Feeds bring every byte to its place, in the order that fences allow, and say what moved."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.contracts import Fence, Lease, Pool, ReadRequest, Store
from tierstore.copies.cpu import DONE, CpuCopyEngine
from tierstore.errors import CapacityError, SessionClosedError, StoreError, StoreReadError
from tierstore.events import Event, Moved
from tierstore.extents import Extent, align_up
from tierstore.feeds.direct import DirectFeed
from tierstore.feeds.parts import MIN_ROOM, cut
from tierstore.feeds.staged import StagedFeed
from tierstore.fences import Promise, nothing
from tierstore.pools.host import HostPool
from tierstore.slots import pack
from tierstore.stores.memory import MemoryStore
from tierstore.stores.workers import ReadFence
from tierstore.tensors import Block, Piece, Unit
from tierstore.testing.adversary import adversary
from tierstore.testing.poison import PoisonPool
from tierstore.testing.pool_contract import OpenFence
from tierstore.trips import Trip, TripLog

PAGE = mmap.PAGESIZE


def make_units(random: Random, *, count: int = 5, largest: int = 60_000) -> tuple[MemoryStore, list[Unit]]:
    """A store of one file of noise, and units whose blocks lie in it in any order, some in two pieces."""
    units: list[Unit] = []
    at = random.randrange(3000)
    for number in range(count):
        blocks: list[Block] = []
        for index in range(random.randrange(1, 5)):
            nbytes = random.choice([0, 1, 100, 256, random.randrange(1, largest)])
            split = random.randrange(nbytes + 1) if random.random() < 0.2 else 0
            pieces = []
            for start, end in ((0, split), (split, nbytes)):
                if end > start:
                    pieces.append(Piece(0, Extent(at, end - start), start))
                    at += end - start + random.choice([0, 0, 64, 5000])
            blocks.append(Block(f"u{number}.b{index}", nbytes, random.choice([1, 64, 256]), tuple(pieces)))
        random.shuffle(blocks)
        units.append(Unit(f"u{number}", tuple(blocks)))
    noise = torch.randint(0, 255, (at + 1,), dtype=torch.uint8, generator=torch.Generator().manual_seed(at))
    return MemoryStore({"file": noise}), units


def true_bytes(store: Store, block: Block) -> torch.Tensor:
    memory = torch.empty(block.nbytes, dtype=torch.uint8)
    store.read([ReadRequest(p.file, p.extent, memory[p.at : p.at + p.extent.nbytes]) for p in block.pieces]).wait()
    return memory


def take(pool: Pool, nbytes: int) -> Lease:
    lease = pool.lease(nbytes, align=PAGE)
    assert lease is not None
    return lease


def assert_there(feed: DirectFeed | StagedFeed, store: Store, unit: Unit, lease: Lease) -> None:
    offsets, buffer = feed.offsets(unit), cast(torch.Tensor, lease.buffer)
    assert set(offsets) == {block.name for block in unit.blocks}
    for block in unit.blocks:
        start = offsets[block.name]
        assert start % block.align == 0
        assert torch.equal(buffer[start : start + block.nbytes], true_bytes(store, block)), block.name


def moved(events: Sequence[Event], link: str) -> int:
    return sum(event.nbytes for event in events if isinstance(event, Moved) and event.link == link)


class GateableStore:
    """A store whose reads happen when the test says so; file 0 is all ones."""

    tier = "nvme"

    def __init__(self) -> None:
        self.specs = {}  # type: ignore[var-annotated]
        self.reads: list[tuple[Sequence[ReadRequest], ReadFence]] = []
        self.came = threading.Semaphore(0)
        self.refuse: StoreError | None = None
        self.at_once = False
        self._lock = threading.Lock()

    def pieces(self, name: str) -> tuple[Piece, ...]:
        raise KeyError(name)

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        if self.refuse is not None:
            raise self.refuse
        fence = ReadFence(sum(request.extent.nbytes for request in requests), requests)
        fence.expect(1)
        with self._lock:
            self.reads.append((requests, fence))
            if self.at_once:
                self.finish(-1)
        self.came.release()
        return fence

    def finish_all(self) -> None:
        """What is under way, and from now on every read at once."""
        with self._lock:
            self.at_once = True
            for number, (_, fence) in enumerate(self.reads):
                if not fence.done():
                    self.finish(number)

    def finish(self, number: int, error: StoreError | None = None) -> None:
        requests, fence = self.reads[number]
        fence.begin()
        for request in requests:
            cast(torch.Tensor, request.into).fill_(1)
        fence.finish(error)

    def close(self) -> None:
        return


def plain_unit(name: str, nbytes: int) -> Unit:
    return Unit(name, (Block(f"{name}.w", nbytes, 64, (Piece(0, Extent(0, nbytes)),)),))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_direct_feed_reads_every_block_to_its_place(seed: int) -> None:
    store, units = make_units(Random(seed))
    events: list[Event] = []
    feed = DirectFeed(store, events.append)
    with ExitStack() as stack:
        stack.callback(store.close)
        stack.callback(feed.close)
        for unit in units:
            pool = HostPool(feed.slot_nbytes(unit))
            stack.callback(pool.close)
            lease = take(pool, feed.slot_nbytes(unit))
            feed.bring(unit, lease).wait()
            assert_there(feed, store, unit, lease)
    assert moved(events, "ram->hbm") == sum(unit.nbytes for unit in units)
    assert all(isinstance(event, Moved) and event.start <= event.end for event in events)


def stream(
    store: Store, units: Sequence[Unit], random: Random, *, discrete: bool, passes: int = 3
) -> tuple[list[Event], set[str], int]:
    """Stream ``units`` in a cycle through a device ring of about two units; every byte is compared at each use."""
    device, events = adversary(random.randrange(1 << 30), discrete=discrete), list[Event]()
    kept = [unit for unit in units if random.random() < 0.4]
    ring = random.choice([2 * MIN_ROOM, 50_000, 300_000])
    with ExitStack() as stack:
        if discrete:
            padded = sum(len(unit.blocks) * 4 * PAGE + unit.nbytes for unit in kept)
            staging = device.pool(padded + ring)
            stack.callback(staging.close)
            stores = {unit.name: store for unit in units}
            feed: DirectFeed | StagedFeed = StagedFeed(stores, staging, device.engine, events.append, keep=kept)
        else:
            feed = DirectFeed(store, events.append)
        stack.callback(feed.close)
        # Three times the largest: wherever one lease lies, the largest fits beside it.
        pool = device.pool(3 * max(align_up(feed.slot_nbytes(unit), PAGE) for unit in units) + PAGE)
        coming: list[tuple[Unit, Lease, Fence]] = []
        order = [unit for _ in range(passes) for unit in units]
        ahead = list(order)

        def bring_more() -> None:
            while ahead and (lease := pool.lease(feed.slot_nbytes(ahead[0]), align=PAGE)) is not None:
                unit = ahead.pop(0)
                coming.append((unit, lease, feed.bring(unit, lease)))

        bring_more()
        for _ in order:
            unit, lease, fence = coming.pop(0)
            (fence.gate if random.random() < 0.7 else fence.wait)()
            assert_there(feed, store, unit, lease)
            lease.give_back(device.engine.mark())
            bring_more()
        feed.close()
        pool.close()
        device.engine.check()
    return events, {unit.name for unit in kept}, passes


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_staged_feed_streams_exactly_on_the_adversary(seed: int) -> None:
    random = Random(seed)
    store, units = make_units(random)
    with closing(store):
        events, kept, passes = stream(store, units, random, discrete=True)
    assert moved(events, "ram->hbm") == passes * sum(unit.nbytes for unit in units)
    assert moved(events, "ram->ram") == sum(u.nbytes * (1 if u.name in kept else passes) for u in units)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_direct_feed_waits_for_earlier_users_on_the_adversary(seed: int) -> None:
    random = Random(seed)
    store, units = make_units(random)
    with closing(store):
        events, _, passes = stream(store, units, random, discrete=False)
    assert moved(events, "ram->hbm") == passes * sum(unit.nbytes for unit in units)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), room=st.sampled_from([MIN_ROOM, 5 * PAGE, 40_000, 200_000]))
def test_parts_fit_their_room_and_cover_the_unit_once(seed: int, room: int) -> None:
    store, units = make_units(Random(seed), count=1)
    store.close()
    unit, packed = units[0], pack(units[0])
    parts = cut(unit, packed, room)
    assert all(part.layout.nbytes <= room for part in parts)
    assert sum(part.nbytes for part in parts) == unit.nbytes
    touched = torch.zeros(packed.nbytes, dtype=torch.int32)
    for part in parts:
        for _, dst, nbytes in part.copies:
            touched[dst : dst + nbytes] += 1
    for block in unit.blocks:
        start = packed.offsets[block.name]
        assert bool((touched[start : start + block.nbytes] == 1).all())
    assert bool((touched <= 1).all())


def test_a_contiguous_unit_is_one_read_and_one_copy() -> None:
    blocks = tuple(Block(str(n), 4096, 64, (Piece(0, Extent(1000 + 4096 * n, 4096)),)) for n in range(9))
    unit = Unit("layer", blocks)
    (part,) = cut(unit, pack(unit), 1 << 20)
    assert len(part.layout.reads) == 1
    assert len(part.copies) == 1


def test_uploads_start_when_bytes_arrive_not_when_compute_asks() -> None:
    store, events = GateableStore(), list[Event]()
    uploaded = threading.Event()

    class Engine(CpuCopyEngine):
        def copy(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            fence = super().copy(*args, **kwargs)
            uploaded.set()
            return fence

    staging, pool = HostPool(1 << 16), HostPool(1 << 16)
    unit = plain_unit("u", 5000)
    feed = StagedFeed({"u": store}, staging, Engine(), events.append)
    lease = take(pool, feed.slot_nbytes(unit))
    fence = feed.bring(unit, lease)
    assert store.came.acquire(timeout=10)
    assert not fence.done()
    assert not uploaded.is_set()
    store.finish(0)
    assert uploaded.wait(timeout=10)  # nobody waited for the fence
    fence.wait()
    assert fence.done()
    assert bool((cast(torch.Tensor, lease.buffer) == 1).all())
    feed.close()
    assert moved(events, "nvme->ram") == moved(events, "ram->hbm") == 5000


def test_staging_without_room_is_a_queue_not_a_deadlock() -> None:
    store = GateableStore()
    staging, pool = HostPool(2 * MIN_ROOM), HostPool(1 << 20)
    units = [plain_unit(f"u{n}", MIN_ROOM - PAGE) for n in range(5)]
    feed = StagedFeed({unit.name: store for unit in units}, staging, CpuCopyEngine(), list[Event]().append)
    fences = [feed.bring(unit, take(pool, feed.slot_nbytes(unit))) for unit in units]
    for number in range(len(fences)):
        assert store.came.acquire(timeout=10)
        if number == 1:
            assert len(store.reads) == 2  # two fit
        if number:
            store.finish(number - 1)
            fences[number - 1].wait()
    store.finish(4)
    fences[4].wait()
    assert feed.peak_staging_nbytes == 2 * (MIN_ROOM - PAGE)
    feed.close()


@pytest.mark.parametrize("where", ["refused", "failed"])
def test_a_read_that_fails_comes_out_of_its_fence_alone(where: str) -> None:
    store, events = GateableStore(), list[Event]()
    staging, pool = HostPool(1 << 16), HostPool(1 << 16)
    unit = plain_unit("u", 5000)
    feed = StagedFeed({"u": store}, staging, CpuCopyEngine(), events.append)
    if where == "refused":
        store.refuse = StoreReadError("no such luck")
        bad = feed.bring(unit, take(pool, feed.slot_nbytes(unit)))
    else:
        bad = feed.bring(unit, take(pool, feed.slot_nbytes(unit)))
        assert store.came.acquire(timeout=10)
        store.finish(0, StoreReadError("no such luck"))
    for ask in (bad.wait, bad.gate, bad.wait):
        with pytest.raises(StoreReadError, match="no such luck"):
            ask()
    assert bad.done()
    assert events == []
    store.refuse = None
    good = feed.bring(unit, take(pool, feed.slot_nbytes(unit)))
    assert store.came.acquire(timeout=10)
    store.finish(-1)
    good.wait()
    feed.close()
    assert moved(events, "ram->hbm") == 5000
    assert take(staging, 1 << 16) is not None  # everything came back


def test_a_copy_that_fails_comes_out_of_its_fence() -> None:
    class Broken(CpuCopyEngine):
        def copy(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            raise RuntimeError("the link is down")

    store, unit = MemoryStore({"w": torch.ones(5000, dtype=torch.uint8)}), plain_unit("u", 5000)
    staging, pool = HostPool(1 << 16), HostPool(1 << 16)
    feed = StagedFeed({"u": store}, staging, Broken(), list[Event]().append)
    fence = feed.bring(unit, take(pool, 5000))
    with pytest.raises(RuntimeError, match="link is down"):
        fence.wait()
    feed.close()
    store.close()
    assert take(staging, 1 << 16) is not None


def test_a_part_that_fails_ends_the_unit_after_what_was_issued() -> None:
    store = GateableStore()
    staging, pool = HostPool(2 * MIN_ROOM), HostPool(1 << 20)
    unit = plain_unit("u", 10 * MIN_ROOM)
    feed = StagedFeed({"u": store}, staging, CpuCopyEngine(), list[Event]().append)
    fence = feed.bring(unit, take(pool, feed.slot_nbytes(unit)))
    assert store.came.acquire(timeout=10)
    assert store.came.acquire(timeout=10)
    store.finish(0)
    store.finish(1, StoreReadError("bad sector"))
    store.finish_all()
    with pytest.raises(StoreReadError, match="bad sector"):
        fence.wait()
    feed.close()
    assert take(staging, 2 * MIN_ROOM) is not None


@pytest.mark.parametrize("kept", [True, False])
def test_close_ends_what_is_queued_and_under_way(kept: bool) -> None:
    store = GateableStore()
    staging, pool = HostPool(2 * MIN_ROOM + (1 << 16)), HostPool(1 << 20)
    units = [plain_unit(f"u{n}", 10_000) for n in range(6)]
    feed = StagedFeed(
        {unit.name: store for unit in units},
        staging,
        CpuCopyEngine(),
        list[Event]().append,
        keep=units[:1] if kept else (),
    )
    fences = [feed.bring(unit, take(pool, feed.slot_nbytes(unit))) for unit in units]
    assert store.came.acquire(timeout=10)
    closer = threading.Thread(target=feed.close)
    closer.start()
    store.finish_all()
    closer.join(timeout=20)
    assert not closer.is_alive()
    feed.close()
    assert all(fence.done() for fence in fences)
    with pytest.raises(SessionClosedError):
        feed.bring(units[0], take(pool, feed.slot_nbytes(units[0])))
    with pytest.raises(SessionClosedError):
        feed.kept(units[0], "u0.w")


def test_kept_units_are_read_once_and_can_be_changed() -> None:
    weights = torch.arange(200, dtype=torch.uint8).repeat(50)
    store, events = MemoryStore({"w": weights}), list[Event]()
    unit = Unit(
        "u", (Block("a", 4000, 64, (Piece(0, Extent(0, 4000)),)), Block("b", 6000, 64, (Piece(0, Extent(4000, 6000)),)))
    )
    device = adversary(3)
    staging, pool = device.pool(3 * PAGE), device.pool(3 * PAGE)
    feed = StagedFeed({"u": store}, staging, device.engine, events.append, keep=[unit])
    assert torch.equal(feed.kept(unit, "a"), weights[:4000])

    def brought() -> torch.Tensor:
        lease = take(pool, feed.slot_nbytes(unit))
        feed.bring(unit, lease).gate()
        at = feed.offsets(unit)["b"]
        seen = cast(torch.Tensor, lease.buffer)[at : at + 6000].clone()
        lease.give_back(device.engine.mark())
        return seen

    assert torch.equal(brought(), weights[4000:])
    for value in (7, 8):
        feed.write(unit, "b", torch.full((6000,), value, dtype=torch.uint8))
        assert bool((brought() == value).all())
    assert torch.equal(feed.kept(unit, "a"), weights[:4000])
    feed.close()
    device.engine.check()
    assert moved(events, "ram->ram") == 10_000
    assert moved(events, "ram->hbm") == 30_000
    store.close()


def test_a_write_waits_for_the_upload_before_it() -> None:
    """Late copies: the bytes that were asked for before the write arrive as they were then."""
    store = MemoryStore({"w": torch.ones(5000, dtype=torch.uint8)})
    unit, device = plain_unit("u", 5000), adversary(5)
    staging, pool = device.pool(2 * PAGE), device.pool(2 * PAGE)
    feed = StagedFeed({"u": store}, staging, device.engine, list[Event]().append, keep=[unit])
    lease = take(pool, 5000)
    feed.bring(unit, lease).gate()
    lease.give_back(device.engine.mark())
    lease = take(pool, 5000)
    fence = feed.bring(unit, lease)  # the bytes are there: issued at once
    feed.write(unit, "u.w", torch.zeros(5000, dtype=torch.uint8))
    fence.gate()
    assert bool((cast(torch.Tensor, lease.buffer) == 1).all())
    feed.close()
    device.engine.check()
    store.close()


def test_an_upload_never_overtakes_one_that_it_may_wait_for() -> None:
    """The second use of a kept unit comes while the first is queued, in the very memory that the first will fill."""
    store, go = GateableStore(), threading.Event()

    class SlowToStart(CpuCopyEngine):
        def copy(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            assert go.wait(timeout=10)
            return super().copy(*args, **kwargs)

    first, kept = plain_unit("first", 5000), plain_unit("kept", 5000)
    staging, pool = HostPool(16 * PAGE), HostPool(4 * PAGE)
    feed = StagedFeed({"first": store, "kept": store}, staging, SlowToStart(), list[Event]().append, keep=[kept])
    fences = [feed.bring(first, take(pool, 2 * PAGE))]
    lease = take(pool, 2 * PAGE)
    fences.append(feed.bring(kept, lease))
    assert store.came.acquire(timeout=10)
    assert store.came.acquire(timeout=10)
    store.finish_all()
    feed.kept(kept, "kept.w")  # the bytes are there, the upload is not issued
    lease.give_back(fences[1])
    again = take(pool, 2 * PAGE)
    assert list(again.after) == [fences[1]]
    use = threading.Thread(target=lambda: fences.append(feed.bring(kept, again)), daemon=True)
    use.start()
    use.join(timeout=5)
    blocked = use.is_alive()
    go.set()
    assert not blocked
    for fence in fences:
        fence.wait()
    feed.close()


def test_a_kept_unit_whose_read_failed_is_read_again() -> None:
    store, unit = GateableStore(), plain_unit("u", 5000)
    staging, pool = HostPool(2 * PAGE), HostPool(1 << 16)
    feed = StagedFeed({"u": store}, staging, CpuCopyEngine(), list[Event]().append, keep=[unit])
    bad = feed.bring(unit, take(pool, 5000))
    assert store.came.acquire(timeout=10)
    store.finish(0, StoreReadError("once"))
    with pytest.raises(StoreReadError, match="once"):
        bad.wait()
    good = feed.bring(unit, take(pool, 5000))
    assert store.came.acquire(timeout=10)
    store.finish(1)
    good.wait()
    assert bool((feed.kept(unit, "u.w") == 1).all())
    feed.close()


def test_refuses_what_staging_cannot_hold() -> None:
    store, unit = GateableStore(), plain_unit("u", 1 << 20)
    threads = threading.active_count()
    with pytest.raises(CapacityError, match=r"raise Budget\.ram"):
        StagedFeed({"u": store}, HostPool(1 << 16), CpuCopyEngine(), list[Event]().append, keep=[unit])
    assert threading.active_count() == threads
    feed = StagedFeed({"u": store}, HostPool(PAGE), CpuCopyEngine(), list[Event]().append)
    with pytest.raises(CapacityError, match=r"raise Budget\.ram"):
        feed.slot_nbytes(unit)
    feed.close()


def test_refuses_a_lease_that_does_not_suit() -> None:
    store, unit = GateableStore(), plain_unit("u", 5000)
    pool = HostPool(1 << 16)
    direct = DirectFeed(store, list[Event]().append)
    staged = StagedFeed({"u": store}, HostPool(1 << 16), CpuCopyEngine(), list[Event]().append)
    small = take(pool, 100)
    crooked = pool.lease(5000, align=64)
    assert crooked is not None
    for feed in (direct, staged):
        with pytest.raises(ValueError, match="needs a lease of 5000 bytes"):
            feed.bring(unit, small)
    with pytest.raises(ValueError, match="aligned to 4096"):
        direct.bring(unit, crooked)
    direct.close()
    staged.close()
    with pytest.raises(SessionClosedError):
        direct.bring(unit, small)


def test_a_unit_of_no_bytes_arrives() -> None:
    store, unit = MemoryStore({}), Unit("empty", (Block("e", 0, 64, ()),))
    pool, device = HostPool(0), adversary(0)
    direct = DirectFeed(store, list[Event]().append)
    staged = StagedFeed({"empty": store}, HostPool(PAGE), device.engine, list[Event]().append)
    for feed in (direct, staged):
        feed.bring(unit, take(pool, feed.slot_nbytes(unit))).wait()
        assert dict(feed.offsets(unit)) == {"e": 0}
    direct.close()
    staged.close()
    store.close()


def test_direct_feed_closes_after_its_reads() -> None:
    store, unit = GateableStore(), plain_unit("u", 5000)
    feed = DirectFeed(store, list[Event]().append)
    fence = feed.bring(unit, take(HostPool(1 << 16), feed.slot_nbytes(unit)))
    closer = threading.Thread(target=feed.close)
    closer.start()
    assert not fence.done()
    assert closer.is_alive()
    store.finish(0)
    closer.join(timeout=10)
    assert not closer.is_alive()
    assert fence.done()


def test_a_trip_is_recorded_once_and_only_when_it_arrived() -> None:
    events: list[Event] = []
    fence = OpenFence()
    trip = Trip(fence, "nvme->ram", 5, events.append)
    assert not trip.done()
    assert events == []
    fence.complete = True
    assert trip.done()
    trip.wait()
    trip.gate()
    assert [event for event in events if isinstance(event, Moved)] == events
    assert moved(events, "nvme->ram") == 5
    assert len(events) == 1

    class Failed(OpenFence):
        def wait(self) -> None:
            raise StoreReadError("lost")

    lost = Trip(Failed(complete=True), "nvme->ram", 5, events.append)
    assert lost.done()
    with pytest.raises(StoreReadError):
        lost.wait()
    assert len(events) == 1


def test_a_trip_tells_the_time_its_fence_knows() -> None:
    events: list[Event] = []
    fence = ReadFence(9, ())
    fence.expect(1)
    trip = TripLog(events.append).begin(fence, "nvme->hbm", 9)
    fence.begin()
    fence.finish()
    trip.wait()
    assert events == [Moved("nvme->hbm", 9, fence.started, fence.finished)]


def test_a_promise_ends_with_all_its_fences() -> None:
    first, second, promise = OpenFence(complete=True), OpenFence(), Promise()
    assert not promise.done()
    promise.keep([first, second])
    assert not promise.done()
    second.complete = True
    assert promise.done()
    promise.wait()
    assert nothing().done()

    ended: list[str] = []

    class Bad(OpenFence):
        def wait(self) -> None:
            ended.append("bad")
            raise StoreReadError("bad")

    class Good(OpenFence):
        def wait(self) -> None:
            ended.append("good")

    broken = Promise()
    broken.keep([Bad(complete=True), Good(complete=True)])
    with pytest.raises(StoreReadError):
        broken.wait()
    assert ended == ["bad", "good"]


def test_feed_over_a_file(tmp_path: Path) -> None:
    """The whole way from a safetensors file, alignment and all."""
    from safetensors.torch import save_file

    from tierstore.stores.safetensors import SafetensorsStore

    tensors = {f"t{n}": torch.randn(37 + 1000 * n, 3) for n in range(6)}
    save_file(tensors, tmp_path / "m.safetensors")
    store, events = SafetensorsStore(tmp_path / "m.safetensors"), list[Event]()
    unit = Unit("u", tuple(Block(n, s.nbytes, 64, store.pieces(n)) for n, s in store.specs.items()))
    device = adversary(1)
    pool = PoisonPool(1 << 20, device.engine)
    direct = DirectFeed(store, events.append)
    staged = StagedFeed({"u": store}, HostPool(8 * PAGE), device.engine, events.append)
    for feed in (direct, staged):
        lease = take(pool, feed.slot_nbytes(unit))
        feed.bring(unit, lease).wait()
        for name, tensor in tensors.items():
            at = feed.offsets(unit)[name]
            raw = cast(torch.Tensor, lease.buffer)[at : at + tensor.nbytes]
            assert torch.equal(raw.view(tensor.dtype).view(tensor.shape), tensor)
        lease.give_back(DONE)
        feed.close()
    store.close()
    assert moved(events, "nvme->hbm") == moved(events, "nvme->ram") == moved(events, "ram->hbm") == unit.nbytes
