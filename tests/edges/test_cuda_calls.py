"""The CUDA engine against a stand-in that only notes the calls: which stream waits for what, in which order.

Whether the calls do what they say is for the tests marked ``cuda``; that they come in a legal order is seen here.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch

from tierstore.contracts import Buffer
from tierstore.copies.cuda import _EVENTS, CudaCopyEngine
from tierstore.errors import DeviceError, StoreReadError
from tierstore.fences import Promise
from tierstore.testing.copy_engine_contract import HostFence

CUDA = torch.device("cuda", 0)


class Driver:
    """Notes calls as ``(what, stream or None, event or bytes)``; everything is complete unless it is in ``busy``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, Any]] = []
        self.compute = Stream(self, "compute")
        self.current = self.compute
        self.busy: set[Event] = set()
        self.broken = False
        self.clock = 0.0
        self.made = 0

    def note(self, what: str, stream: Any = None, thing: Any = None) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")
        self.calls.append((what, stream, thing))

    def take(self) -> list[tuple[str, Any, Any]]:
        calls, self.calls = self.calls, []
        return calls


class Stream:
    def __init__(self, driver: Driver, name: str) -> None:
        self.driver, self.name = driver, name

    def wait_event(self, event: Event) -> None:
        self.driver.note("wait", self.name, event)

    def synchronize(self) -> None:
        self.driver.note("synchronize", self.name)


class Event:
    def __init__(self, driver: Driver, timing: bool) -> None:
        self.driver, self.timing, self.time = driver, timing, 0.0
        driver.made += 1

    def record(self, stream: Stream) -> None:
        self.driver.clock += 1.0
        self.time = self.driver.clock
        self.driver.note("record", stream.name, self)

    def query(self) -> bool:
        self.driver.note("query", None, self)
        return self not in self.driver.busy

    def synchronize(self) -> None:
        self.driver.note("block", None, self)

    def elapsed_time(self, later: Event) -> float:
        assert self.timing
        assert later.timing
        return (later.time - self.time) * 1000


class Memory:
    """Bytes ``[address, address + nbytes)`` of the host or the device."""

    def __init__(self, driver: Driver, address: int, nbytes: int, is_cuda: bool) -> None:
        self.driver, self.address, self.nbytes, self.is_cuda = driver, address, nbytes, is_cuda

    def numel(self) -> int:
        return self.nbytes

    def data_ptr(self) -> int:
        return self.address

    def __getitem__(self, index: slice) -> Memory:
        return Memory(self.driver, self.address + index.start, index.stop - index.start, self.is_cuda)

    def copy_(self, src: Memory, *, non_blocking: bool) -> None:
        assert non_blocking
        self.driver.note("copy", self.driver.current.name, (src.address, self.address, src.nbytes))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made, names = Driver(), iter(("up", "down"))

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before, made.current = made.current, chosen
        yield
        made.current = before

    def new_stream(device: torch.device, priority: int) -> Stream:
        assert (device, priority) == (CUDA, -1)
        return Stream(made, next(names))

    def new_event(enable_timing: bool = False, blocking: bool = False) -> Event:
        return Event(made, enable_timing)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "Event", new_event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.current)
    return made


@pytest.fixture
def engine(driver: Driver) -> CudaCopyEngine:
    engine = CudaCopyEngine(CUDA)
    driver.take()
    return engine


def pair(driver: Driver, nbytes: int = 100, *, down: bool = False) -> tuple[Buffer, Buffer]:
    host, there = Memory(driver, 4096, nbytes, False), Memory(driver, 1 << 40, nbytes, True)
    return cast(tuple[Buffer, Buffer], (there, host) if down else (host, there))


@pytest.mark.parametrize("down", [False, True])
def test_a_copy_waits_on_its_own_stream_between_its_events(driver: Driver, engine: CudaCopyEngine, down: bool) -> None:
    mark = engine.mark()
    ((recorded, stream, marked),) = driver.take()
    assert (recorded, stream) == ("record", "compute")
    fence = engine.copy([pair(driver, down=down), pair(driver, 50, down=down)], after=[mark])
    calls, name = driver.take(), "down" if down else "up"
    assert [call[0] for call in calls] == ["wait", "record", "copy", "copy", "record"]
    assert {call[1] for call in calls} == {name}
    assert calls[0][2] is marked
    fence.gate()
    assert driver.take() == [("wait", "compute", calls[-1][2])]
    assert driver.current is driver.compute


def test_fences_within_fences_are_waited_for_by_the_stream(driver: Driver, engine: CudaCopyEngine) -> None:
    promise, host = Promise(), HostFence()
    promise.keep([engine.mark()])
    host.complete()
    driver.take()
    engine.copy([pair(driver)], after=[promise, host])
    assert [call[:2] for call in driver.take()][:2] == [("wait", "up"), ("record", "up")]


def test_done_and_wait_ask_the_last_event(driver: Driver, engine: CudaCopyEngine) -> None:
    fence = engine.copy([pair(driver)])
    end = driver.take()[-1][2]
    driver.busy.add(end)
    assert not fence.done()
    driver.busy.clear()
    assert fence.done()
    fence.wait()
    assert driver.take() == [("query", None, end)] * 2 + [("block", None, end)]


def test_a_copy_tells_its_times(driver: Driver, engine: CudaCopyEngine) -> None:
    fence = cast(Any, engine.copy([pair(driver)]))
    assert fence.finished - fence.started == pytest.approx(1.0)
    later = cast(Any, engine.copy([pair(driver)]))
    assert later.started - fence.finished == pytest.approx(1.0)


def test_no_event_is_made_in_the_steady_state(driver: Driver, engine: CudaCopyEngine) -> None:
    made = driver.made
    for _ in range(10):
        held = [fence for _ in range(_EVENTS) for fence in (engine.mark(), engine.copy([pair(driver)]))]
        assert len(held) == 2 * _EVENTS
        del held
    assert driver.made == made
    more = [engine.mark() for _ in range(_EVENTS + 5)]
    assert driver.made == made + 5
    del more
    assert [engine.mark() for _ in range(_EVENTS + 5)]
    assert driver.made == made + 5


def test_an_event_serves_one_fence_at_a_time(driver: Driver, engine: CudaCopyEngine) -> None:
    """Whatever order fences are dropped in, no two that are held share an event."""
    held: list[Any] = []
    for number in range(500):
        held.append(engine.copy([pair(driver)]) if number % 2 else engine.mark())
        if number % 3 == 0:
            del held[(number * 7) % len(held)]
        if len(held) > 100:
            del held[:50]
        gc.collect(0)
        events = [fence._event for fence in held]
        assert len(set(map(id, events))) == len(events)


def test_close_waits_for_both_directions(driver: Driver, engine: CudaCopyEngine) -> None:
    engine.close()
    engine.close()
    assert driver.take() == [("synchronize", "up", None), ("synchronize", "down", None)] * 2


def test_a_failed_device_is_named(driver: Driver, engine: CudaCopyEngine) -> None:
    fence = engine.copy([pair(driver)])
    driver.broken = True
    assert fence.done()
    for ask in (fence.wait, fence.gate, engine.mark, lambda: engine.copy([pair(driver)])):
        with pytest.raises(DeviceError, match="illegal memory access"):
            ask()
    engine.close()


def test_errors_of_others_keep_their_names(driver: Driver, engine: CudaCopyEngine) -> None:
    lost = HostFence(StoreReadError("lost"))
    lost.complete()
    with pytest.raises(StoreReadError, match="lost"):
        engine.copy([pair(driver)], after=[lost])


def test_directions_do_not_mix(driver: Driver, engine: CudaCopyEngine) -> None:
    up, down = pair(driver), pair(driver, down=True)
    for pairs in ([up, down], [(up[0], down[1])], [(up[1], down[0])]):
        with pytest.raises(ValueError, match="two calls"):
            engine.copy(pairs)
    assert driver.take() == []


def test_copies_are_cut_where_pinned_segments_meet(driver: Driver, engine: CudaCopyEngine) -> None:
    engine.copy([pair(driver, 600 << 20)])
    copied = [call[2] for call in driver.take() if call[0] == "copy"]
    assert [nbytes for _, _, nbytes in copied] == [(256 << 20) - 4096, 256 << 20, (88 << 20) + 4096]
    assert [src % (256 << 20) for src, _, _ in copied] == [4096, 0, 0]
